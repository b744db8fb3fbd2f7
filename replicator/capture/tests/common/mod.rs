//! A small QEMU guest whose init dirties memory, for tests and for the pause example.
//!
//! Needs root, `qemu-system-x86_64`, `/bin/busybox` (static) and the guest kernel that
//! `scripts/deps.sh` puts under target/guest/kernel.

#![allow(dead_code, missing_docs)]

use havm_qmp::Qmp;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Guest {
    child: Child,
    pub dir: tempfile::TempDir,
    pub qmp: PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Spec<'a> {
    pub ram_mib: u32,
    /// Shell commands that init runs before it is ready.
    pub first: &'a str,
    /// Shell loop body run by init, for ever.
    pub work: &'a str,
    pub extra: &'a [&'a str],
    /// Run QEMU as this user, who must be able to read the guest kernel's folder.
    pub user: Option<u32>,
}

pub fn kernel() -> PathBuf {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(top.join("target"), PathBuf::from);
    let kernel = target.join("guest/kernel/vmlinuz");
    assert!(
        kernel.exists(),
        "no guest kernel {}: run scripts/deps.sh",
        kernel.display()
    );
    kernel
}

impl Guest {
    /// Starts a guest and waits until its init works.
    pub fn start(spec: &Spec<'_>) -> Guest {
        let guest = Guest::spawn(spec);
        let serial = guest.dir.path().join("serial");
        let end = Instant::now() + Duration::from_secs(180);
        while !std::fs::read_to_string(&serial)
            .unwrap_or_default()
            .contains("havm-ready")
        {
            assert!(Instant::now() < end, "the guest did not boot");
            std::thread::sleep(Duration::from_millis(50));
        }
        guest
    }

    /// Starts its QEMU only: for one that waits for a stream.
    pub fn spawn(spec: &Spec<'_>) -> Guest {
        let shm = if Path::new("/dev/shm").is_dir() {
            "/dev/shm"
        } else {
            "/tmp"
        };
        let dir = tempfile::Builder::new()
            .prefix("havm-capture-")
            .tempdir_in(shm)
            .expect("tempdir");
        std::fs::write(
            dir.path().join("init.cpio"),
            initramfs(spec.first, spec.work),
        )
        .expect("initramfs");
        let ram = dir.path().join("ram");
        let qmp = dir.path().join("qmp");
        let serial = dir.path().join("serial");
        let image = dir.path().join("kernel");
        std::fs::copy(kernel(), &image).expect("copy the kernel");
        let mut command = Command::new("qemu-system-x86_64");
        if let Some(user) = spec.user {
            use std::os::unix::fs::{PermissionsExt, chown};
            use std::os::unix::process::CommandExt;
            chown(dir.path(), Some(user), Some(user)).expect("needs root");
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))
                .expect("chmod");
            command.uid(user).gid(user);
        }
        let child = command
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-cpu",
                "qemu64",
                "-accel",
                "tcg",
            ])
            .args(["-M", "pc-q35-10.0,memory-backend=pc.ram", "-m"])
            .arg(format!("{}M", spec.ram_mib))
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=pc.ram,share=on,mem-path={},size={}M",
                ram.display(),
                spec.ram_mib
            ))
            .arg("-kernel")
            .arg(&image)
            .arg("-initrd")
            .arg(dir.path().join("init.cpio"))
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 random.trust_cpu=on",
            ])
            .arg("-serial")
            .arg(format!("file:{}", serial.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .arg("-qmp")
            .arg(format!("unix:{}2,server=on,wait=off", qmp.display()))
            .args(spec.extra)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 starts");
        Guest { child, dir, qmp }
    }

    pub fn connect(&self) -> Qmp {
        Qmp::connect(&self.qmp, Duration::from_secs(10)).expect("monitor")
    }

    /// A second monitor, as an admin's.
    pub fn connect_second(&self) -> Qmp {
        let path = format!("{}2", self.qmp.display());
        Qmp::connect(path.as_ref(), Duration::from_secs(10)).expect("second monitor")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

/// Reads QEMU's memory by a way of its own, /proc/PID/mem.
pub fn read_memory(pid: u32, hva: u64, len: u64) -> Vec<u8> {
    let mem = File::open(format!("/proc/{pid}/mem")).expect("needs root");
    let mut bytes = vec![0; len as usize];
    mem.read_exact_at(&mut bytes, hva).expect("readable");
    bytes
}

fn initramfs(first: &str, work: &str) -> Vec<u8> {
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         mount -t proc p /proc; mount -t devtmpfs d /dev; mkdir /m; mount -t tmpfs -o size=95% t /m\n{first}\n\
         echo havm-ready > /dev/ttyS0\n\
         while :; do\n{work}\ndone\n"
    );
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let mut out = Vec::new();
    for dir in ["bin", "proc", "dev"] {
        entry(&mut out, dir, 0o040_755, &[]);
    }
    entry(&mut out, "bin/busybox", 0o100_755, &busybox);
    entry(&mut out, "init", 0o100_755, init.as_bytes());
    entry(&mut out, "TRAILER!!!", 0, &[]);
    out
}

/// One member of a cpio archive in "newc" form.
fn entry(out: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let ino = out.len() as u32 + 1;
    let mut head = String::from("070701");
    for field in [
        ino,
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ] {
        head.push_str(&format!("{field:08x}"));
    }
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}
