//! What one host of the lab keeps outside: its disks, its configuration, its logs.
//!
//! ```text
//!   DIR/HOST/lib-libvirt …   bound to the same places that a real host has: survive a power off
//!            run             tmpfs, bound to /run: emptied by it
//!            lib-libvirt/qemu/ram   tmpfs for guest RAM: emptied by it
//!            boot.d/         executables that are started at power on, in order of their names
//!            log/            what libvirtd and they print
//! ```

use crate::names::Host;
use crate::place;
use crate::procs::Process;
use crate::run::run;
use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of the host, place inside it.
pub const BINDS: [(&str, &str); 8] = [
    ("run", "/run"),
    ("etc-libvirt", "/etc/libvirt"),
    ("lib-libvirt", "/var/lib/libvirt"),
    ("log-libvirt", "/var/log/libvirt"),
    ("cache-libvirt", "/var/cache/libvirt"),
    ("etc-havm", "/etc/havm"),
    ("lib-havm", "/var/lib/havm"),
    ("log-havm", "/var/log/havm"),
];

/// File of the host, file inside it.
pub const FILE_BINDS: [(&str, &str); 2] =
    [("hosts", "/etc/hosts"), ("machine-id", "/etc/machine-id")];

/// Where guest RAM lies, seen from inside.
const RAM_INSIDE: &str = "/var/lib/libvirt/qemu/ram";
const RAM_OUTSIDE: &str = "lib-libvirt/qemu/ram";

/// One host's folder.
#[derive(Debug, Clone)]
pub struct HostFiles {
    /// Which host.
    pub host: Host,
    /// Its folder.
    pub dir: PathBuf,
}

impl HostFiles {
    /// Under a lab's folder.
    pub fn new(lab_dir: &Path, host: Host) -> HostFiles {
        HostFiles {
            host,
            dir: lab_dir.join(host.name()),
        }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Removes what an earlier lab left.
    pub fn forget(&self, keep_disks: bool, keep_boot: bool) -> Result<()> {
        for entry in fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            let is_boot = entry.file_name() == "boot.d";
            if if is_boot { keep_boot } else { keep_disks } {
                continue;
            }
            let path = entry.path();
            let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
            let removed = if is_dir {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.with_context(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }

    /// Makes what is missing. What an admin changed meanwhile stays.
    pub fn prepare(&self) -> Result<()> {
        let dirs = BINDS.iter().map(|b| b.0).chain([
            "boot.d",
            "log",
            "lib-libvirt/images",
            "log-libvirt/qemu",
            RAM_OUTSIDE,
        ]);
        for name in dirs {
            let path = self.path(name);
            fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        }
        self.write("hosts", HOSTS)?;
        let n = self.host.number();
        self.write("machine-id", &format!("{n:032x}\n"))?;
        if self.host.has_libvirt() {
            self.configure_libvirt()?;
            self.copy_guest_kernel()?;
            self.warm_cache()?;
        }
        Ok(())
    }

    fn configure_libvirt(&self) -> Result<()> {
        let etc = self.path("etc-libvirt");
        if etc.join("qemu.conf").exists() {
            return Ok(());
        }
        run(Command::new("cp")
            .args(["-a", "/etc/libvirt/.", "."])
            .current_dir(&etc))
        .context("copying /etc/libvirt: is libvirt installed? Run scripts/deps.sh")?;
        for dir in ["qemu/networks/autostart", "qemu/autostart"] {
            if let Ok(entries) = fs::read_dir(etc.join(dir)) {
                for entry in entries.filter_map(Result::ok) {
                    fs::remove_file(entry.path()).with_context(|| format!("{:?}", entry.path()))?;
                }
            }
        }
        let n = self.host.number();
        self.write(
            "etc-libvirt/libvirtd.conf",
            &format!(
                "listen_tls = 0\nlisten_tcp = 0\nunix_sock_rw_perms = \"0700\"\n\
                 auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n\
                 host_uuid = \"7700000{n}-0000-4000-8000-00000000000{n}\"\n\
                 log_outputs = \"2:file:/var/log/libvirt/libvirtd.log\"\n"
            ),
        )?;
        // No cgroups and no log daemon in here; the rest keeps QEMU's files plain to look at.
        self.write(
            "etc-libvirt/qemu.conf",
            &format!(
                "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\n\
                 dynamic_ownership = 0\nremember_owner = 0\nnamespaces = []\n\
                 cgroup_controllers = []\nstdio_handler = \"file\"\n\
                 memory_backing_dir = \"{RAM_INSIDE}\"\n"
            ),
        )
    }

    /// Puts the testifying guest's kernel where its definition expects it, where it was built.
    fn copy_guest_kernel(&self) -> Result<()> {
        let built = havm_guest::image::GuestFiles::in_target(&place::target_dir()?);
        let boot = self.path("lib-libvirt/boot");
        fs::create_dir_all(&boot).with_context(|| format!("making {}", boot.display()))?;
        for (from, name) in [
            (built.vmlinuz(), "vmlinuz"),
            (built.initramfs(), "initramfs.cpio"),
        ] {
            if from.exists() {
                fs::copy(&from, boot.join(name))
                    .with_context(|| format!("copying {}", from.display()))?;
            }
        }
        Ok(())
    }

    /// libvirt's probe of QEMU takes 8 s; a kept copy of its result saves that.
    fn warm_cache(&self) -> Result<()> {
        let kept = kept_cache()?;
        let cache = self.path("cache-libvirt");
        if kept.join("qemu").exists() && !cache.join("qemu").exists() {
            copy_tree(&kept, &cache)?;
        }
        Ok(())
    }

    /// A kept copy of libvirt's probe exists.
    pub fn cache_is_warm() -> Result<bool> {
        Ok(kept_cache()?.join("qemu").exists())
    }

    /// Keeps the result of libvirt's probe for the next lab.
    pub fn keep_cache(&self) -> Result<()> {
        let cache = self.path("cache-libvirt");
        let probed = fs::read_dir(cache.join("qemu/capabilities"))
            .is_ok_and(|d| d.filter_map(Result::ok).next().is_some());
        let kept = kept_cache()?;
        if !probed || kept.join("qemu").exists() {
            return Ok(());
        }
        let fresh = kept.with_extension(format!("new{}", std::process::id()));
        copy_tree(&cache, &fresh)?;
        // Lost against another lab that did the same: its copy is as good.
        if fs::rename(&fresh, &kept).is_err() {
            fs::remove_dir_all(&fresh).with_context(|| format!("removing {}", fresh.display()))?;
        }
        Ok(())
    }

    /// Mounts what a power off empties.
    pub fn mount_tmpfs(&self) -> Result<()> {
        for (name, size) in [
            ("run", "size=64m,mode=0755"),
            (RAM_OUTSIDE, "size=8g,mode=0755"),
        ] {
            let at = self.path(name);
            mount(
                Some("havm-lab"),
                &at,
                Some("tmpfs"),
                MsFlags::empty(),
                Some(size),
            )
            .with_context(|| format!("mounting a tmpfs at {}", at.display()))?;
        }
        for dir in ["lock", "libvirt", "havm"] {
            let path = self.path("run").join(dir);
            fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        }
        Ok(())
    }

    /// Writes an executable that is started at every power on.
    pub fn add_boot(&self, name: &str, script: &str) -> Result<()> {
        let path = self.path("boot.d").join(name);
        fs::create_dir_all(self.path("boot.d"))
            .and_then(|()| fs::write(&path, script))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// The host's process 1 as it was recorded at power on.
    pub fn recorded_init(&self) -> Option<Process> {
        serde_json::from_str(&fs::read_to_string(self.path("init.json")).ok()?).ok()
    }

    /// The host's process 1, where it is alive.
    pub fn init(&self) -> Option<Process> {
        self.recorded_init().filter(Process::alive)
    }
}

const HOSTS: &str = "127.0.0.1 localhost\n10.78.0.1 alpha\n10.78.0.2 beta\n10.78.0.3 gamma\n\
10.77.0.1 alpha-rep0\n10.77.0.2 beta-rep0\n10.77.1.1 alpha-rep1\n10.77.1.2 beta-rep1\n\
10.9.0.2 client\n";

/// Unmounts everything that is mounted below a folder, what was mounted last first.
pub fn unmount_below(dir: &Path) -> Result<()> {
    // Several mounts may lie over each other: once more until none is left.
    for _ in 0..8 {
        let text = fs::read_to_string("/proc/self/mountinfo").context("reading mountinfo")?;
        let points: Vec<PathBuf> = text
            .lines()
            .filter_map(|l| Some(PathBuf::from(l.split(' ').nth(4)?.replace("\\040", " "))))
            .filter(|p| p.starts_with(dir))
            .collect();
        if points.is_empty() {
            return Ok(());
        }
        for point in points.iter().rev() {
            // A mount that is still used goes as soon as its last user does.
            let _ =
                umount2(point, MntFlags::empty()).or_else(|_| umount2(point, MntFlags::MNT_DETACH));
        }
    }
    anyhow::bail!("something below {} cannot be unmounted", dir.display())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    run(Command::new("cp").arg("-a").arg(from.join(".")).arg(to)).map(drop)
}

/// Where libvirt's probe result is kept: a name that changes with QEMU and libvirt.
fn kept_cache() -> Result<PathBuf> {
    let mut key = String::new();
    for program in ["/usr/bin/qemu-system-x86_64", "/usr/sbin/libvirtd"] {
        let m = File::open(program)
            .and_then(|f| f.metadata())
            .with_context(|| format!("{program} is not there: run scripts/deps.sh"))?;
        key += &format!("-{:x}-{:x}", m.mtime(), m.len());
    }
    Ok(place::target_dir()?
        .join("guest")
        .join(format!("libvirt-cache{key}")))
}
