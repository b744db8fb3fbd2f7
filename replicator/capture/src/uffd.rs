//! The userfaultfd that tracks QEMU's memory: made inside QEMU, used from here.
//!
//! QEMU keeps its copy of the descriptor. So tracking survives our own end, and a successor finds
//! the same descriptor in /proc/PID/fd and takes it again.

use crate::error::CaptureError;
use crate::inject;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `userfaultfd` flag: faults of user mode only; what unprivileged processes may have.
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFD_API: u64 = 0xaa;
/// Faults are resolved by the kernel itself (6.7).
const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// Protecting reaches pages that were never touched (6.4).
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// Protection on shared files (5.19).
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURES: u64 = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM;
const REGISTER_MODE_WP: u64 = 1 << 1;

/// Numbers of the ioctls, from linux/userfaultfd.h: direction, size, type 0xAA, number.
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;

/// The tracker of one process.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
    pub(crate) taken_again: bool,
}

impl Uffd {
    /// Takes over the tracker that a predecessor left in QEMU, or makes one.
    pub(crate) fn take(pid: u32, pidfd: &OwnedFd) -> Result<Uffd, CaptureError> {
        for (number, features) in existing(pid)? {
            if features != 0 && features & FEATURES != FEATURES {
                continue; // somebody else's (QEMU's own postcopy, a background snapshot)
            }
            let Ok(fd) = getfd(pidfd, number) else {
                continue;
            };
            if features == 0 && api(&fd).is_err() {
                continue;
            }
            return Ok(Uffd {
                fd,
                taken_again: true,
            });
        }
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        let number = inject::userfaultfd_in(pid, flags)?;
        let fd = getfd(pidfd, number).map_err(|source| CaptureError::Trace {
            pid,
            what: "take its userfaultfd",
            source,
        })?;
        api(&fd).map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => CaptureError::Kernel {
                missing: "asynchronous write protection",
            },
            _ => CaptureError::System {
                what: "UFFDIO_API",
                source,
            },
        })?;
        Ok(Uffd {
            fd,
            taken_again: false,
        })
    }

    /// Tracks writes to [start, start + len) of QEMU. Doing it again is harmless.
    pub(crate) fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut arg = [start, len, REGISTER_MODE_WP, 0];
        self.ioctl(UFFDIO_REGISTER, &mut arg)
    }

    fn ioctl<const N: usize>(&self, request: u64, arg: &mut [u64; N]) -> io::Result<()> {
        ioctl(self.fd.as_raw_fd(), request, arg)
    }
}

fn ioctl<const N: usize>(fd: RawFd, request: u64, arg: &mut [u64; N]) -> io::Result<()> {
    // The size that the request's number carries must be what we pass.
    debug_assert_eq!((request >> 16 & 0x3fff) as usize, N * 8);
    // SAFETY: `arg` is a live array of exactly the size that the request reads and writes.
    let r = unsafe { libc::ioctl(fd, request as libc::Ioctl, arg.as_mut_ptr()) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn api(fd: &OwnedFd) -> io::Result<()> {
    ioctl(fd.as_raw_fd(), UFFDIO_API, &mut [UFFD_API, FEATURES, 0])
}

/// A pidfd of a process.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    owned(fd)
}

fn getfd(pidfd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    owned(fd)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The userfaultfds of a process: number and enabled features (0: not set up yet).
fn existing(pid: u32) -> Result<Vec<(RawFd, u64)>, CaptureError> {
    let error = |source| CaptureError::System {
        what: "list QEMU's open files",
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(error)? {
        let Ok(entry) = entry else { continue };
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if target.as_os_str() != "anon_inode:[userfaultfd]" {
            continue;
        }
        let Some(number) = entry.file_name().to_str().and_then(|s| s.parse().ok()) else {
            continue;
        };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        if let Some(features) = enabled_features(&info) {
            found.push((number, features));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// `API:  aa:<enabled>:<all>` of fdinfo (fs/userfaultfd.c), in hexadecimal.
fn enabled_features(fdinfo: &str) -> Option<u64> {
    let line = fdinfo.lines().find_map(|l| l.strip_prefix("API:"))?;
    let word = line.trim().split(':').nth(1)?;
    // The kernel keeps an "is set up" mark in bit 31 there.
    Some(u64::from_str_radix(word, 16).ok()? & 0x7fff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_tells_the_enabled_features() {
        assert_eq!(
            enabled_features("pos:\t0\npending:\t0\ntotal:\t0\nAPI:\taa:b000:1ffff\n"),
            Some(0xb000)
        );
        assert_eq!(enabled_features("API:\taa:8000b000:1ffff\n"), Some(0xb000));
        assert_eq!(enabled_features("API:\taa:0:1ffff\n"), Some(0));
        assert_eq!(enabled_features("pos: 0\n"), None);
    }
}
