//! Builds what a testifying guest boots from: the initramfs, and its empty disk.
//!
//! `scripts/deps.sh` fetched the kernel and its modules before; here the static program is built
//! and packed with them.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where everything of the guest lies: `target/guest`.
#[derive(Debug, Clone)]
pub struct GuestFiles {
    dir: PathBuf,
}

impl GuestFiles {
    /// Under this target folder.
    pub fn in_target(target: &Path) -> GuestFiles {
        GuestFiles {
            dir: target.join("guest"),
        }
    }

    /// The kernel.
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join("kernel/vmlinuz")
    }

    /// The initramfs, after [`GuestFiles::build`].
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.cpio")
    }

    fn modules(&self) -> PathBuf {
        self.dir.join("kernel/modules")
    }

    /// Builds the static program and packs the initramfs. Quick when nothing changed.
    pub fn build(&self, workspace: &Path) -> Result<()> {
        ensure!(
            self.vmlinuz().exists() && self.modules().join("order").exists(),
            "no guest kernel in {}: run scripts/deps.sh",
            self.dir.join("kernel").display()
        );
        let program = self.build_program(workspace)?;
        let image = self.pack(&program)?;
        let path = self.initramfs();
        if fs::read(&path).is_ok_and(|old| old == image) {
            return Ok(());
        }
        // Another lab may be reading the old one: replace it in one step.
        let fresh = path.with_extension(format!("new{}", std::process::id()));
        fs::write(&fresh, image)
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Static, on the usual gnu target: `--target` keeps the flag away from build scripts.
    fn build_program(&self, workspace: &Path) -> Result<PathBuf> {
        const TARGET: &str = "x86_64-unknown-linux-gnu";
        let out = self.dir.join("build");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let done = Command::new(&cargo)
            .current_dir(workspace)
            .args([
                "build",
                "--quiet",
                "--release",
                "-p",
                "havm-guest",
                "--no-default-features",
            ])
            .args(["--bin", "testify", "--target", TARGET, "--target-dir"])
            .arg(&out)
            .env(
                "RUSTFLAGS",
                "-C target-feature=+crt-static -C strip=symbols",
            )
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("starting {}", cargo.to_string_lossy()))?;
        ensure!(
            done.success(),
            "the guest program could not be built: {done}"
        );
        Ok(out.join(TARGET).join("release/testify"))
    }

    fn pack(&self, program: &Path) -> Result<Vec<u8>> {
        let mut cpio = Cpio::default();
        for dir in ["dev", "proc", "sys", "modules"] {
            cpio.dir(dir);
        }
        // The kernel opens it for process 1 before /dev is mounted.
        cpio.char_device("dev/console", 5, 1);
        let read = |p: &Path| fs::read(p).with_context(|| format!("reading {}", p.display()));
        cpio.file("init", 0o755, &read(program)?);
        let order = self.modules().join("order");
        cpio.file("modules/order", 0o644, &read(&order)?);
        for name in fs::read_to_string(&order)?.lines() {
            if name.is_empty() || name.starts_with('#') {
                continue;
            }
            if name.contains('/') {
                bail!("{}: {name:?} is not a file name", order.display());
            }
            cpio.file(
                &format!("modules/{name}"),
                0o644,
                &read(&self.modules().join(name))?,
            );
        }
        Ok(cpio.finish())
    }
}

/// Makes an empty raw disk, sparse. An existing one is replaced.
pub fn make_disk(path: &Path, bytes: u64) -> Result<()> {
    File::create(path)
        .and_then(|mut f| {
            f.flush()?;
            f.set_len(bytes)
        })
        .with_context(|| format!("making a disk of {bytes} bytes at {}", path.display()))
}

/// A cpio archive in the `newc` form (kernel: Documentation/driver-api/early-userspace/buffer-format).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let links = if mode & 0o170000 == 0o040000 { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime: the same content makes the same archive
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum, not used in this form
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn dir(&mut self, name: &str) {
        self.entry(name, 0o040755, (0, 0), &[]);
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, 0o100000 | mode, (0, 0), content);
    }

    fn char_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020600, (major, minor), &[]);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The archive must be what cpio itself reads: else the kernel finds no /init.
    #[test]
    fn cpio_reads_the_archive() {
        let mut cpio = Cpio::default();
        cpio.dir("dev");
        cpio.file("init", 0o755, b"four");
        cpio.file("modules-x", 0o644, b"odd");
        let bytes = cpio.finish();
        let Ok(mut child) = Command::new("cpio")
            .args(["-tv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            eprintln!("skipped: no cpio here");
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let names: Vec<_> = out
            .lines()
            .filter_map(|l| l.split_whitespace().last())
            .collect();
        assert_eq!(names, ["dev", "init", "modules-x"]);
        assert!(out.contains("-rwxr-xr-x"), "{out}");
    }
}
