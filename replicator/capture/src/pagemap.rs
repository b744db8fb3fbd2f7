//! `ioctl(PAGEMAP_SCAN)` (Linux 6.7): which pages were written since they were protected.

use crate::blocks::PAGE_BYTES;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// _IOWR('f', 16, struct pm_scan_arg), which has twelve 64-bit words.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// Protect what is reported, in the same step.
const WP_MATCHING: u64 = 1;
/// Fail where write tracking is not set up, instead of saying "not written".
const CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 2;

/// A range of pages as the kernel reports it: start and end address, categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub start: u64,
    pub end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// /proc/PID/pagemap of QEMU.
pub(crate) struct Pagemap {
    file: File,
}

impl Pagemap {
    pub(crate) fn open(pid: u32) -> io::Result<Pagemap> {
        Ok(Pagemap {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
        })
    }

    /// Reports written ranges in [start, end) into `out` (as many as it holds), protecting them if
    /// `protect`; at most `max_pages` pages (0: no limit). Returns how many ranges, and where it
    /// stopped: `end`, or the address to go on from.
    pub(crate) fn scan(
        &self,
        start: u64,
        end: u64,
        out: &mut [Region],
        max_pages: u64,
        protect: bool,
    ) -> io::Result<(usize, u64)> {
        // Exactly this mask takes the kernel's fast path, and that also reports entries that are
        // empty: a page written and then reclaimed leaves such a one. A page never touched whose
        // neighbours were looks the same; the caller sorts those out by the file's holes.
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: CHECK_WPASYNC | if protect { WP_MATCHING } else { 0 },
            start,
            end,
            vec: out.as_mut_ptr() as u64,
            vec_len: out.len() as u64,
            max_pages,
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..ScanArg::default()
        };
        let n = self.ioctl(&mut arg)?;
        Ok((n.min(out.len()), arg.walk_end.clamp(start, end)))
    }

    /// Protects every page in [start, end) that has a page table, and reports nothing.
    pub(crate) fn protect(&self, start: u64, end: u64) -> io::Result<()> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: CHECK_WPASYNC | WP_MATCHING,
            start,
            end,
            category_mask: PAGE_IS_WRITTEN,
            ..ScanArg::default()
        };
        self.ioctl(&mut arg).map(drop)
    }

    fn ioctl(&self, arg: &mut ScanArg) -> io::Result<usize> {
        loop {
            // SAFETY: `arg` is the structure that the request takes; `vec` and `vec_len` in it, where
            // set, describe a live mutable slice of the kernel's `struct page_region`.
            let r = unsafe {
                libc::ioctl(
                    self.file.as_raw_fd(),
                    PAGEMAP_SCAN as libc::Ioctl,
                    std::ptr::from_mut(arg),
                )
            };
            if r >= 0 {
                return Ok(r as usize);
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
    }
}

/// Whether this kernel has PAGEMAP_SCAN.
pub(crate) fn supported() -> io::Result<bool> {
    let own = Pagemap::open(std::process::id())?;
    let page = vec![0u8; 2 * PAGE_BYTES];
    let start = (page.as_ptr() as u64).next_multiple_of(PAGE_BYTES as u64);
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start,
        end: start + PAGE_BYTES as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..ScanArg::default()
    };
    let mut out = [Region::default(); 1];
    arg.vec = out.as_mut_ptr() as u64;
    arg.vec_len = 1;
    match own.ioctl(&mut arg) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => Ok(false),
        Err(e) => Err(e),
    }
}
