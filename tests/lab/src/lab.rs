//! The lab as a whole.

use crate::cgroup::Cgroup;
use crate::hostfiles::{HostFiles, unmount_below};
use crate::init::READY;
use crate::names::{CLIENT, Host, SWITCH, check_lab_name};
use crate::net::{self, LinkState, Links, netns};
use crate::place;
use crate::procs::{in_netns_files, wait_until};
use crate::run::{netns_path, run};
use anyhow::{Context, Result, bail};
use havm_guest::domain::Domain;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// How long a host may take from power on until libvirt answers (a cold cache costs 8 s).
const POWER_ON_TIME: Duration = Duration::from_secs(70);

const NAMES_DIR: &str = "/run/havm-lab";

/// Which lab.
#[derive(Debug, Clone)]
pub struct Options {
    /// Starts the names of its namespaces and cgroups: two labs at once need two names.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Start from the disks that are there instead of empty ones.
    pub keep_disks: bool,
    /// Start what an earlier lab's hosts had in their boot.d too.
    pub keep_boot: bool,
    /// Executables that hosts start at every power on, the first included: host, name, script.
    pub boot: Vec<(Host, String, String)>,
}

impl Options {
    /// A lab of this name, in `target/lab` (for the name `havm`) or `target/lab-NAME`.
    pub fn named(name: &str) -> Result<Options> {
        check_lab_name(name)?;
        let folder = if name == "havm" {
            "lab".to_owned()
        } else {
            format!("lab-{name}")
        };
        Ok(Options {
            name: name.to_owned(),
            dir: place::target_dir()?.join(folder),
            keep_disks: false,
            keep_boot: false,
            boot: Vec::new(),
        })
    }
}

/// When a host's power was cut.
#[derive(Debug, Clone, Copy)]
pub struct PowerCut {
    /// The moment when its last process stood.
    pub at: Instant,
    /// The same by the wall clock.
    pub wall: SystemTime,
    /// How long it took from the call until then: the figure's uncertainty.
    pub took: Duration,
}

/// A lab. One made by [`Lab::up`] is torn down when dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
    dir: PathBuf,
    down_on_drop: bool,
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.down_on_drop
            && let Err(e) = self.down()
        {
            eprintln!(
                "lab {}: {e:#}; `lab --name {} down` tries again",
                self.name, self.name
            );
        }
    }
}

impl Lab {
    /// The lab of this name, whether it is up or not.
    pub fn open(options: &Options) -> Result<Lab> {
        check_lab_name(&options.name)?;
        let dir = std::path::absolute(&options.dir).context("the lab's folder")?;
        Ok(Lab {
            name: options.name.clone(),
            dir,
            down_on_drop: false,
        })
    }

    /// Removes what is left of an older lab of this name, then brings up a new one with all hosts
    /// powered on.
    pub fn up(options: &Options) -> Result<Lab> {
        let mut lab = Lab::open(options)?;
        lab.down()?;
        let _lock = lab.lock()?;
        for host in Host::ALL {
            lab.files(host)
                .forget(options.keep_disks, options.keep_boot)?;
        }
        for (host, name, script) in &options.boot {
            lab.files(*host).add_boot(name, script)?;
        }
        lab.down_on_drop = true;
        lab.claim_name()?;
        lab.save_links(&Links::default())?;
        Cgroup::of(&lab.name, CLIENT)?.make()?;
        net::make(&lab.name)?;
        // The first start ever probes QEMU for long: once, not on both hosts at once.
        if HostFiles::cache_is_warm()? {
            std::thread::scope(|s| {
                let starts = Host::ALL.map(|host| {
                    let lab = &lab;
                    s.spawn(move || lab.power_on(host))
                });
                starts.into_iter().try_for_each(|t| match t.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })?;
        } else {
            for host in Host::ALL {
                lab.power_on(host)?;
            }
        }
        Ok(lab)
    }

    /// Leaves the lab up when this value is dropped.
    pub fn keep(&mut self) {
        self.down_on_drop = false;
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A host's folder: disks, logs, boot.d.
    pub fn files(&self, host: Host) -> HostFiles {
        HostFiles::new(&self.dir, host)
    }

    fn lock(&self) -> Result<Flock<File>> {
        fs::create_dir_all(&self.dir).with_context(|| format!("making {}", self.dir.display()))?;
        let path = self.dir.join("lock");
        let file = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| e)
            .with_context(|| {
                format!(
                    "lab {} is just being brought up or down by another process",
                    self.name
                )
            })
    }

    /// Where the folder of the lab that uses this name now is written down: names are the machine's,
    /// folders belong to a checkout.
    fn name_file(&self) -> PathBuf {
        Path::new(NAMES_DIR).join(&self.name)
    }

    fn claim_name(&self) -> Result<()> {
        let file = self.name_file();
        fs::create_dir_all(NAMES_DIR)
            .and_then(|()| fs::write(&file, self.dir.as_os_str().as_encoded_bytes()))
            .with_context(|| format!("writing {}", file.display()))
    }

    /// Frees the name, and unmounts what a lab of this name in another folder had mounted.
    fn free_name(&self) -> Result<()> {
        let file = self.name_file();
        let Ok(other) = fs::read_to_string(&file) else {
            return Ok(());
        };
        if !other.is_empty() {
            unmount_below(Path::new(&other))?;
        }
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
        // The last lab removes the folder.
        let _ = fs::remove_dir(NAMES_DIR);
        Ok(())
    }

    /// Takes everything down. Logs and disks stay in the folder; nothing else is left. Works also
    /// on a half-made lab, and on none.
    pub fn down(&self) -> Result<()> {
        let _lock = self.lock()?;
        let mut first_error = Ok(());
        let mut note = |result: Result<()>| {
            if let Err(e) = result
                && first_error.is_ok()
            {
                first_error = Err(e);
            }
        };
        for host in Host::ALL {
            if let Some(init) = self.files(host).init() {
                note(init.kill());
            }
        }
        for at in Host::ALL.into_iter().map(Host::name).chain([CLIENT]) {
            note(Cgroup::of(&self.name, at).and_then(|c| c.remove()));
        }
        // What somebody started by hand in one of the namespaces.
        let spaces: Vec<_> = net::boxes()
            .map(|b| netns_path(&netns(&self.name, b)))
            .collect();
        let emptied = wait_until(Duration::from_secs(10), || {
            let left = in_netns_files(&spaces);
            left.iter().for_each(|p| note(p.kill()));
            left.is_empty()
        });
        if !emptied {
            note(Err(anyhow::anyhow!(
                "processes in the lab's namespaces do not end"
            )));
        }
        note(unmount_below(&self.dir));
        note(self.free_name());
        note(net::remove(&self.name));
        for host in Host::ALL {
            let record = self.files(host).path("init.json");
            if record.exists() {
                note(fs::remove_file(&record).context("removing init.json"));
            }
        }
        first_error.with_context(|| format!("taking down lab {}", self.name))
    }

    /// The lab's namespaces are there.
    pub fn is_up(&self) -> bool {
        netns_path(&netns(&self.name, SWITCH)).exists()
    }

    fn need_up(&self) -> Result<()> {
        if !self.is_up() {
            bail!("lab {} is not up: `lab up` first", self.name);
        }
        Ok(())
    }

    /// A host has power.
    pub fn is_on(&self, host: Host) -> bool {
        self.files(host).init().is_some()
    }

    /// Powers a host on: process 1, libvirtd, boot.d. Returns when libvirt answers and the programs
    /// in boot.d were started. No error where it is on already.
    pub fn power_on(&self, host: Host) -> Result<()> {
        self.need_up()?;
        if self.is_on(host) {
            return Ok(());
        }
        let files = self.files(host);
        self.clear(&files)?;
        files.prepare()?;
        files.mount_tmpfs()?;
        Cgroup::of(&self.name, host.name())?.make()?;
        net::plug(&self.name, host, &self.links()?, true)?;
        let log_path = files.path("log/init.log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .with_context(|| format!("opening {}", log_path.display()))?;
        let status = Command::new(place::program("lab")?)
            .args(["__init", "--name", &self.name, "--dir"])
            .arg(&self.dir)
            .arg(host.name())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing a log file")?)
            .stderr(log)
            .status()
            .context("starting the host's process 1")?;
        let said = || fs::read_to_string(&log_path).unwrap_or_default();
        if !status.success() {
            bail!("{host} cannot be powered on: {}", said().trim());
        }
        let ready = files.path("run").join(READY);
        let came = wait_until(POWER_ON_TIME, || ready.exists() || files.init().is_none());
        if !came || !ready.exists() {
            bail!("{host} did not come up: {}", said().trim());
        }
        if host.has_libvirt() {
            files.keep_cache()?;
        }
        Ok(())
    }

    /// Cuts a host's power: first every process of it stands in the same moment, then its cables
    /// are dead, then everything is killed. So nothing of it is heard after [`PowerCut::at`], not even
    /// the end of a connection. Its disks stay as they are (what was written but not synced is
    /// kept: the machine under the lab does not lose power).
    pub fn power_off(&self, host: Host) -> Result<PowerCut> {
        self.need_up()?;
        let files = self.files(host);
        let Some(init) = files.init() else {
            bail!("{host} is off already")
        };
        let cgroup = Cgroup::of(&self.name, host.name())?;
        let start = Instant::now();
        // One that sleeps in the kernel and cannot be frozen shall not keep the plug in.
        if let Err(e) = cgroup.freeze(Duration::from_millis(300)) {
            eprintln!("power off {host}: {e:#}; going on");
        }
        let cut = PowerCut {
            at: Instant::now(),
            wall: SystemTime::now(),
            took: start.elapsed(),
        };
        net::plug(&self.name, host, &self.links()?, false)?;
        cgroup.kill()?;
        init.kill()?;
        if !init.gone_within(Duration::from_secs(10)) {
            bail!("process 1 of {host} does not end");
        }
        self.clear(&files)?;
        Ok(cut)
    }

    /// Removes what a host that is off may have left: cgroup, tmpfs, the record of process 1.
    fn clear(&self, files: &HostFiles) -> Result<()> {
        Cgroup::of(&self.name, files.host.name())?.remove()?;
        unmount_below(&files.dir)?;
        let record = files.path("init.json");
        if record.exists() {
            fs::remove_file(&record).with_context(|| format!("removing {}", record.display()))?;
        }
        Ok(())
    }

    /// Stops all processes of a host; its network stack still answers at the lowest level.
    pub fn freeze(&self, host: Host) -> Result<()> {
        self.need_up()?;
        if !self.is_on(host) {
            bail!("{host} is off");
        }
        Cgroup::of(&self.name, host.name())?.freeze(Duration::from_secs(2))
    }

    /// Lets them go on.
    pub fn thaw(&self, host: Host) -> Result<()> {
        self.need_up()?;
        Cgroup::of(&self.name, host.name())?.thaw()
    }

    /// All processes of a host stand.
    pub fn is_frozen(&self, host: Host) -> bool {
        Cgroup::of(&self.name, host.name()).is_ok_and(|c| c.frozen())
    }

    /// The state of all links.
    pub fn links(&self) -> Result<Links> {
        let path = self.dir.join("links.json");
        match fs::read_to_string(&path) {
            Ok(text) => {
                serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Links::default()),
            Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
        }
    }

    fn save_links(&self, links: &Links) -> Result<()> {
        let path = self.dir.join("links.json");
        fs::write(&path, serde_json::to_string(links)?)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Brings a link into a state. Links: rep0 rep1 lan-alpha lan-beta lan-client mgmt-alpha
    /// mgmt-beta mgmt-gamma.
    pub fn set_link(&self, link: &str, state: LinkState) -> Result<()> {
        self.need_up()?;
        let powered = |at: &str| at.parse::<Host>().map_or(true, |h| self.is_on(h));
        net::set_link(&self.name, link, &state, powered)?;
        let mut links = self.links()?;
        links.set(link, state);
        self.save_links(&links)
    }

    /// A command on a host, to be given arguments and started. Where the host is off it fails.
    pub fn command(&self, host: Host, program: &str) -> Result<Command> {
        let Some(init) = self.files(host).init() else {
            bail!("{host} is off: `lab power on {host}`");
        };
        let mut command = self.joined(host.name())?;
        command.args([
            "nsenter",
            "-t",
            &init.pid.to_string(),
            "-m",
            "-n",
            "-u",
            "-p",
            "--",
        ]);
        command.arg(program);
        Ok(command)
    }

    /// A command of the outside world.
    pub fn client_command(&self, program: &str) -> Result<Command> {
        self.need_up()?;
        self.outside(CLIENT, program)
    }

    /// A command in the namespace of the switches, where every frame passes: for recorders.
    pub fn switch_command(&self, program: &str) -> Result<Command> {
        self.need_up()?;
        self.outside(SWITCH, program)
    }

    /// The testifying guest's client ([`havm_guest::client`]) in the outside world, or, with
    /// `record` first, its recorder at the switches, where the ports are called lan-alpha, lan-beta…
    pub fn testify(&self, arguments: &[&str]) -> Result<Command> {
        let lab = place::program("lab")?;
        let program = lab
            .to_str()
            .context("the path of `lab` is not plain text")?;
        let mut command = match arguments.first() {
            Some(&"record") => self.switch_command(program)?,
            _ => self.client_command(program)?,
        };
        command.arg("__testify").args(arguments);
        Ok(command)
    }

    fn outside(&self, at: &str, program: &str) -> Result<Command> {
        let mut command = self.joined(CLIENT)?;
        let net = netns_path(&netns(&self.name, at));
        command
            .arg("nsenter")
            .arg(format!("--net={}", net.display()))
            .arg("--")
            .arg(program);
        Ok(command)
    }

    /// A shell that joins a box's cgroup, so that freeze and power off reach what it becomes.
    fn joined(&self, at: &str) -> Result<Command> {
        let procs = Cgroup::of(&self.name, at)?.procs_file();
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "echo 0 >\"$0\" && exec \"$@\""])
            .arg(procs);
        // So that `lab exec alpha havm status` finds this build's programs.
        if let Some(dir) = place::program("lab")?.parent() {
            let path = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{}:{path}", dir.display()));
        }
        Ok(command)
    }

    /// libvirt of a host, for a client outside of it.
    pub fn libvirt_uri(&self, host: Host) -> String {
        let socket = self.files(host).path("run/libvirt/libvirt-sock");
        format!("qemu+unix:///system?socket={}", socket.display())
    }

    /// Defines a testifying guest on a host, with a new empty disk; it is not started.
    pub fn define_guest(&self, host: Host, domain: &Domain, disk_bytes: u64) -> Result<()> {
        let files = self.files(host);
        let image = format!("lib-libvirt/images/{}.raw", domain.name);
        havm_guest::image::make_disk(&files.path(&image), disk_bytes)?;
        let xml = files.path("run").join(format!("{}.xml", domain.name));
        fs::write(&xml, domain.xml()).with_context(|| format!("writing {}", xml.display()))?;
        let inside = format!("/run/{}.xml", domain.name);
        run(self.command(host, "virsh")?.args(["-q", "define", &inside])).map(drop)
    }
}
