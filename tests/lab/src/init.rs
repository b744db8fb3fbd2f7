//! Process 1 of a host.
//!
//! ```text
//!   lab power on ──spawns──> outer: cgroup, network namespace, new UTS and PID namespace
//!                              └──spawns──> process 1: own mounts, libvirtd, boot.d, then reaps
//!                            outer records process 1 and leaves
//! ```
//!
//! Killing process 1 ends everything on the host at once: that is the power switch.

use crate::cgroup::Cgroup;
use crate::hostfiles::{BINDS, FILE_BINDS, HostFiles};
use crate::names::Host;
use crate::net::netns;
use crate::procs::{Process, wait_until};
use crate::run::netns_path;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, sethostname, setsid};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Exists (in the host's /run) once libvirtd answers and boot.d was started.
pub const READY: &str = "lab-ready";
/// libvirtd's first start, with a cold cache on a busy machine, may take this long.
const LIBVIRT_TIME: Duration = Duration::from_secs(60);
/// The socket is there before the drivers are: an answer to a real call counts. This one also makes
/// libvirt probe QEMU, where that was not done before.
const LIBVIRT_WAIT: &str = "until [ -S /run/libvirt/libvirt-sock ] && \
    virsh -q -c qemu:///system version >/dev/null 2>&1; do sleep 0.02; done; : >/run/lab-libvirt";
const LIBVIRT_ANSWERS: &str = "/run/lab-libvirt";

/// The outer part. Returns when process 1 runs.
pub fn outer(lab: &str, lab_dir: &Path, host: Host) -> Result<()> {
    setsid().context("leaving the terminal's session")?;
    let files = HostFiles::new(lab_dir, host);
    Cgroup::of(lab, host.name())?.join()?;
    let path = netns_path(&netns(lab, host.name()));
    let net = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    setns(&net, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
    // Not yet the mount namespace: process 1 puts another /proc in it, and this one is needed here.
    unshare(CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWPID)
        .context("making namespaces: this needs root")?;
    let exe = std::env::current_exe().context("finding this program")?;
    let child = Command::new(exe)
        .args(["__init", "--inner", "--name", lab, "--dir"])
        .arg(lab_dir)
        .arg(host.name())
        .stdin(Stdio::null())
        .spawn()
        .context("starting process 1")?;
    let Some(process) = Process::now(child.id() as i32) else {
        bail!("process 1 of {host} ended at once, see its log/init.log");
    };
    let record = files.path("init.json");
    fs::write(&record, serde_json::to_string(&process)?)
        .with_context(|| format!("writing {}", record.display()))
}

/// Process 1. Never returns on success.
pub fn inner(lab_dir: &Path, host: Host) -> Result<()> {
    if std::process::id() != 1 {
        bail!("this is started by `lab power on` only");
    }
    let files = HostFiles::new(lab_dir, host);
    // Only what is unmounted outside reaches in here, nothing gets out.
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).context("own mounts")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mounting /proc")?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("mounting /sys")?;
    for (from, to) in BINDS {
        fs::create_dir_all(to).with_context(|| format!("making {to}"))?;
        bind(&files.path(from), to)?;
    }
    for (from, to) in FILE_BINDS
        .into_iter()
        .filter(|(_, to)| Path::new(to).exists())
    {
        bind(&files.path(from), to)?;
    }
    sethostname(host.name()).context("setting the host name")?;
    std::env::set_current_dir("/").context("going to /")?;
    // libvirt waits for the end of QEMU processes that are children of process 1: they must be
    // taken in from the first moment on, so the rest is another thread's.
    let starter = std::thread::spawn(move || {
        if let Err(e) = start_all(&files) {
            // The power switch finds no process 1 and shows this.
            eprintln!("{e:#}");
            std::process::exit(1);
        }
    });
    drop(starter);
    reap()
}

/// Starts what the host runs; may wait for no child: they are all taken in by [`reap`].
fn start_all(files: &HostFiles) -> Result<()> {
    if files.host.has_libvirt() {
        start(files, Path::new("/usr/sbin/libvirtd"), "libvirtd", &[])?;
        start(
            files,
            Path::new("/bin/sh"),
            "libvirt-wait",
            &["-c", LIBVIRT_WAIT],
        )?;
        if !wait_until(LIBVIRT_TIME, || Path::new(LIBVIRT_ANSWERS).exists()) {
            bail!("libvirtd does not answer, see log/libvirtd.log and log-libvirt/libvirtd.log");
        }
    }
    start_boot(files)?;
    let ready = Path::new("/run").join(READY);
    fs::write(&ready, "").with_context(|| format!("writing {}", ready.display()))
}

fn bind(from: &Path, to: &str) -> Result<()> {
    let none: Option<&str> = None;
    mount(
        Some(from),
        to,
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )
    .with_context(|| format!("binding {} to {to}", from.display()))
}

/// Starts a program in the background with its output in the host's log folder.
fn start(files: &HostFiles, program: &Path, name: &str, args: &[&str]) -> Result<()> {
    let path = files.path("log").join(format!("{name}.log"));
    let log = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("HAVM_LAB_HOST", files.host.name())
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("sharing a log file")?)
        .stderr(log);
    for pass in ["RUST_LOG", "RUST_BACKTRACE", "HAVM_LOG"] {
        if let Some(value) = std::env::var_os(pass) {
            command.env(pass, value);
        }
    }
    command
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    Ok(())
}

fn start_boot(files: &HostFiles) -> Result<()> {
    let dir = files.path("boot.d");
    let mut programs: Vec<_> = fs::read_dir(&dir)
        .with_context(|| format!("reading {}", dir.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| {
            fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
        .collect();
    programs.sort();
    for program in programs {
        let name = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // One that does not start must not keep the others from it.
        if let Err(e) = start(files, &program, &name, &[]) {
            eprintln!("{e:#}");
        }
    }
    Ok(())
}

/// Takes in the dead, for ever.
fn reap() -> Result<()> {
    loop {
        match waitpid(Pid::from_raw(-1), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => std::thread::sleep(Duration::from_millis(50)),
            Err(e) => return Err(e).context("waiting for children"),
        }
    }
}
