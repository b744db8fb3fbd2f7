//! A writable mapping of a guest's RAM file. The only `unsafe` of this crate.
//!
//! The mapping keeps the file's memory alive after QEMU and its name are gone.

use crate::PAGE_BYTES;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

/// A shared, writable mapping.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the mapping is plain memory owned by this value; access goes through `&self`/`&mut self`.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len` bytes from the start of `file`.
    pub(crate) fn new(file: File, len: usize) -> io::Result<Mapping> {
        if file.metadata()?.len() < len as u64 {
            return Err(io::Error::other(format!(
                "the file is shorter than {len} bytes"
            )));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice; length checked above.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(p.cast()).ok_or_else(|| io::Error::other("mapped at null"))?;
        Ok(Mapping { base, len, file })
    }

    /// The page at byte offset `at` (a multiple of the page size), if it lies inside.
    pub(crate) fn page(&self, at: usize) -> Option<&[u8; PAGE_BYTES]> {
        self.inside(at)?;
        // SAFETY: inside the mapping, aligned to 1. QEMU does not write it while it waits; a torn
        // read would only be a wrong hash.
        Some(unsafe { &*self.base.as_ptr().add(at).cast() })
    }

    /// The same, to write.
    pub(crate) fn page_mut(&mut self, at: usize) -> Option<&mut [u8; PAGE_BYTES]> {
        self.inside(at)?;
        // SAFETY: inside the mapping; `&mut self` is the only access of this process, and the
        // waiting QEMU does not touch guest RAM.
        Some(unsafe { &mut *self.base.as_ptr().add(at).cast() })
    }

    /// Copies a page without giving room to a page that was never written.
    pub(crate) fn read(&self, at: usize, to: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        self.file.read_exact_at(to, at as u64)
    }

    /// Makes it all zero.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, mode, 0, self.len as libc::off_t)?)
    }

    fn inside(&self, at: usize) -> Option<()> {
        (at.is_multiple_of(PAGE_BYTES) && at.checked_add(PAGE_BYTES)? <= self.len).then_some(())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
