//! Memory mappings: QEMU's RAM files, and the arena of a page set.

use crate::blocks::{MapEntry, PAGE_BYTES};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;

/// A mapping of `len` bytes, unmapped when dropped.
struct Raw {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory, valid in all threads until it is dropped.
unsafe impl Send for Raw {}
// SAFETY: as above; whoever writes through a pointer into it answers for that.
unsafe impl Sync for Raw {}

impl Raw {
    fn new(len: usize, prot: i32, flags: i32, fd: RawFd, offset: i64) -> io::Result<Raw> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing existing.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Raw { base, len })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Our own zeroed, populated memory.
pub(crate) struct Anonymous {
    raw: Raw,
}

impl Anonymous {
    pub(crate) fn new(len: usize) -> io::Result<Anonymous> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let raw = Raw::new(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
        // Fewer page table entries and faults where it is granted; then populated in one go.
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE] {
            // SAFETY: advice on our own fresh mapping; both keep its (zero) contents.
            unsafe { libc::madvise(raw.base.as_ptr().cast(), len, advice) };
        }
        Ok(Anonymous { raw })
    }

    /// The address of byte `offset`.
    pub(crate) fn at(&mut self, offset: usize) -> *mut u8 {
        assert!(offset < self.raw.len);
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.raw.base.as_ptr().add(offset) }
    }

    /// Page number `index`.
    pub(crate) fn page(&self, index: usize) -> &[u8; PAGE_BYTES] {
        assert!(index < self.raw.len / PAGE_BYTES);
        // SAFETY: inside the mapping, as just checked; `&self` keeps writers (`at`) away.
        unsafe { &*self.raw.base.as_ptr().add(index * PAGE_BYTES).cast() }
    }
}

/// A read-only mapping of the file behind a RAM block.
pub(crate) struct RamFile {
    raw: Raw,
    file: File,
    /// Where the block starts in the file.
    offset: u64,
    /// The file system tells holes from data exactly: tmpfs.
    exact: bool,
}

impl RamFile {
    /// Maps `len` bytes from `hva` of process `pid`, which lie in `entry`. The file is opened through
    /// /proc/PID/map_files, which works for a file already removed; else by its path.
    pub(crate) fn open(pid: u32, entry: &MapEntry, hva: u64, len: u64) -> io::Result<RamFile> {
        let by_map = format!("/proc/{pid}/map_files/{:x}-{:x}", entry.start, entry.end);
        let by_path = format!("/proc/{pid}/root{}", entry.path);
        let file = File::open(by_map).or_else(|e| File::open(by_path).map_err(|_| e))?;
        let offset = entry.file_offset + (hva - entry.start);
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let end = offset
            .checked_add(len)
            .ok_or_else(|| io::Error::other("too large"))?;
        // Reading a mapping beyond its file's end would kill us.
        if file.metadata()?.len() < end {
            return Err(io::Error::other("the file is shorter than the block"));
        }
        let at = i64::try_from(offset).map_err(io::Error::other)?;
        let raw = Raw::new(
            size,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            at,
        )?;
        let exact = nix::sys::statfs::fstatfs(&file)
            .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
        let ram = RamFile {
            raw,
            file,
            offset,
            exact,
        };
        ram.populate();
        Ok(ram)
    }

    /// Fills our page table for what the file holds, so that the first copies do not fault.
    fn populate(&self) {
        let mut at = 0;
        while let Some((from, to)) = self.data(at, self.raw.len as u64) {
            // SAFETY: the range lies in the mapping; populating reads only.
            unsafe {
                let start = self.raw.base.as_ptr().add(from as usize);
                libc::madvise(start.cast(), (to - from) as usize, libc::MADV_POPULATE_READ);
            }
            at = to;
        }
    }

    /// The first run of pages in [from, to) (bytes in the block) that the file holds: start and
    /// end, or `None`. The rest is holes, which read as zero. Where the file system cannot tell,
    /// everything counts as held.
    pub(crate) fn data(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        if from >= to {
            return None;
        }
        if !self.exact {
            return Some((from, to));
        }
        let seek = |at: u64, whence| {
            // SAFETY: seeks on our own descriptor, which nobody reads through.
            let r = unsafe { libc::lseek(self.file.as_raw_fd(), at as libc::off_t, whence) };
            if r < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(r as u64)
            }
        };
        let page = PAGE_BYTES as u64;
        let start = match seek(self.offset + from, libc::SEEK_DATA) {
            Ok(at) => at.saturating_sub(self.offset).max(from) / page * page,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return None,
            Err(_) => return Some((from, to)),
        };
        if start >= to {
            return None;
        }
        let end = match seek(self.offset + start, libc::SEEK_HOLE) {
            Ok(at) => at
                .saturating_sub(self.offset)
                .next_multiple_of(page)
                .clamp(start, to),
            Err(_) => to,
        };
        Some((start, end.max(start + page).min(to)))
    }

    /// The address of byte `offset` of the block. The guest writes there while we read.
    pub(crate) fn at(&self, offset: u64) -> *const u8 {
        assert!((offset as usize) < self.raw.len);
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.raw.base.as_ptr().add(offset as usize) }
    }

    /// How much the file holds; grows with every page that is touched for the first time. `None` where
    /// that cannot be relied on.
    pub(crate) fn held(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        self.file
            .metadata()
            .ok()
            .filter(|_| self.exact)
            .map(|m| m.blocks())
    }

    pub(crate) fn len(&self) -> u64 {
        self.raw.len as u64
    }
}
