//! `havm check`: what this host has and lacks, each line with a remedy.

use super::Exit;
use crate::libvirt::conn::Libvirt;
use crate::libvirt::transform::Host;
use std::path::Path;

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// What was found.
    pub found: Result<String, String>,
    /// What to do about a problem.
    pub remedy: &'static str,
}

fn ok(what: &str, found: impl Into<String>) -> Finding {
    Finding {
        what: what.into(),
        found: Ok(found.into()),
        remedy: "",
    }
}
fn bad(what: &str, found: impl Into<String>, remedy: &'static str) -> Finding {
    Finding {
        what: what.into(),
        found: Err(found.into()),
        remedy,
    }
}

/// Runs every check and prints it.
pub fn run(config: &Path) -> Exit {
    let findings = all(config);
    let mut fine = true;
    for f in &findings {
        match &f.found {
            Ok(t) => crate::cli::say(format!("ok       {}: {t}", f.what)),
            Err(t) => {
                fine = false;
                crate::cli::say(format!(
                    "PROBLEM  {}: {t}\n         remedy: {}",
                    f.what, f.remedy
                ));
            }
        }
    }
    if fine { Exit::Ok } else { Exit::Failed }
}

/// Every check.
pub fn all(config: &Path) -> Vec<Finding> {
    let mut out = vec![root(), kernel(), uffd(), pagemap(), ptrace(), tun()];
    let uri = match havm_config::load(config) {
        Ok(c) => {
            out.push(ok(
                "config",
                format!(
                    "{}: node {}, peer {}",
                    config.display(),
                    c.node.name,
                    c.peer.name
                ),
            ));
            out.push(run_dir(&c.node.run_dir));
            c.libvirt.uri
        }
        Err(e) => {
            out.push(bad(
                "config",
                e.to_string(),
                "mend the file; `havm config defaults` shows every key",
            ));
            "qemu:///system".into()
        }
    };
    out.extend(libvirt(&uri));
    out
}

fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        ok("user", "root")
    } else {
        bad(
            "user",
            "not root",
            "run havm as root: capture reads another process's memory",
        )
    }
}

fn kernel() -> Finding {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut n = release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|s| s.parse::<u32>().ok());
    match (n.next(), n.next()) {
        (Some(a), Some(b)) if (a, b) >= (6, 7) => ok("kernel", release),
        _ => bad(
            "kernel",
            release,
            "use a kernel of at least 6.7 (PAGEMAP_SCAN)",
        ),
    }
}

/// UFFDIO_API features that capture needs: see linux/userfaultfd.h.
fn uffd() -> Finding {
    match std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd") {
        Ok(_) => ok("userfaultfd", "the kernel has it"),
        Err(_) => bad(
            "userfaultfd",
            "the kernel does not have it",
            "use a kernel built with CONFIG_USERFAULTFD",
        ),
    }
}

fn pagemap() -> Finding {
    match std::fs::File::open("/proc/self/pagemap") {
        Ok(_) => ok("pagemap", "readable"),
        Err(e) => bad(
            "pagemap",
            e.to_string(),
            "use a kernel built with CONFIG_PROC_PAGE_MONITOR, and run as root",
        ),
    }
}

fn ptrace() -> Finding {
    let read = |p| {
        std::fs::read_to_string(p)
            .map(|s: String| s.trim().to_owned())
            .unwrap_or_default()
    };
    if read("/proc/sys/kernel/yama/ptrace_scope") == "3" {
        return bad(
            "ptrace",
            "yama forbids it altogether (ptrace_scope 3)",
            "set kernel.yama.ptrace_scope to 2 or lower at boot",
        );
    }
    if read("/sys/fs/selinux/booleans/deny_ptrace").starts_with('1') {
        return bad(
            "ptrace",
            "SELinux forbids it",
            "setsebool -P deny_ptrace off",
        );
    }
    let profiles = read("/sys/kernel/security/apparmor/profiles");
    if profiles
        .lines()
        .any(|l| l.starts_with("libvirt-") && l.ends_with("(enforce)"))
    {
        return bad(
            "ptrace",
            "AppArmor confines QEMU",
            "add `ptrace (tracedby) peer=unconfined,` and rw rules for the run folder to \
             /etc/apparmor.d/local/abstractions/libvirt-qemu, then restart libvirtd",
        );
    }
    ok("ptrace", "possible")
}

fn tun() -> Finding {
    if Path::new("/dev/net/tun").exists() {
        ok("tap devices", "/dev/net/tun")
    } else {
        bad(
            "tap devices",
            "no /dev/net/tun",
            "load the tun module (modprobe tun)",
        )
    }
}

fn run_dir(dir: &Path) -> Finding {
    let probe = dir
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    match nix::sys::statfs::statfs(probe) {
        Ok(s) if s.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC => {
            ok("run folder", format!("{} is on tmpfs", dir.display()))
        }
        Ok(_) => bad(
            "run folder",
            format!("{} is not on tmpfs", dir.display()),
            "use a folder below /run: what it holds must not outlive a boot",
        ),
        Err(e) => bad("run folder", e.to_string(), "name a folder below /run"),
    }
}

fn libvirt(uri: &str) -> Vec<Finding> {
    let look = || -> Result<((u32, u32), Host), String> {
        let rt = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| e.to_string())?;
        let lv = Libvirt::start(uri, "check").map_err(|e| e.to_string())?;
        rt.block_on(async { Ok((lv.versions().await?, lv.host().await?)) })
            .map_err(|e: crate::libvirt::conn::LibvirtError| e.to_string())
    };
    let dots = |v: u32| format!("{}.{}.{}", v / 1_000_000, v / 1000 % 1000, v % 1000);
    match look() {
        Err(e) => vec![bad(
            "libvirt",
            e,
            "install and start libvirt: systemctl enable --now libvirtd",
        )],
        Ok(((lib, qemu), host)) => {
            let mut out = vec![ok("libvirt", dots(lib))];
            out.push(if qemu >= 8_002_000 {
                ok("QEMU", dots(qemu))
            } else {
                bad("QEMU", dots(qemu), "use QEMU 8.2 or later")
            });
            out.push(match host.machine_aliases.get("q35") {
                Some(m) => ok(
                    "machine types",
                    format!("q35 is {m} here; guests need one that both servers have"),
                ),
                None => bad(
                    "machine types",
                    "libvirt names no q35",
                    "install qemu-system-x86",
                ),
            });
            out
        }
    }
}
