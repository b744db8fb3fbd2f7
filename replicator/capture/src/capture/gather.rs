//! Finding and copying: what a round and the end of an epoch have in common.

use super::{Capture, Collected, us};
use crate::bits::Bits;
use crate::blocks::PAGE_BYTES;
use crate::error::CaptureError;
use crate::mapping::RamFile;
use crate::page_set::{PageRange, PageSet};
use crate::pool::Latecomer;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// A block with what we know of its pages.
pub(super) struct Tracked {
    pub(super) file: Option<RamFile>,
    /// What the file held when its untouched pieces were last looked for.
    pub(super) held: Option<u64>,
    /// Dirty whatever the kernel says.
    pub(super) forced: Bits,
    /// Held by the RAM file for certain (always so for private blocks): no need to ask for holes.
    pub(super) known: Bits,
}

impl Capture {
    pub(super) fn gather(
        &mut self,
        out: &mut PageSet,
        max_pages: usize,
        workers: usize,
        reply: Option<BorrowedFd<'_>>,
    ) -> Result<Collected, CaptureError> {
        let clock = Instant::now();
        let reply = reply.filter(|_| self.crowded);
        if self.protect_first {
            self.protect_all()?;
        }
        self.find_untouched();
        self.shape_set(out);
        self.ranges.clear();
        let mut left = max_pages as u64;
        let mut more = self.take_forced(out, &mut left);
        let mut scanned = Ok(());
        let first_scanned = self.ranges.len();
        // Nothing left to take: a scan without a limit is not what was asked for.
        more |= left == 0;
        if !more {
            let result = if max_pages == usize::MAX {
                let late = Latecomer::new(reply, &self.scan_over);
                self.scanner
                    .all(&self.pool, workers, &late, &mut self.ranges)
                    .map(|()| false)
            } else {
                self.scanner.some(left, &mut self.ranges)
            };
            scanned = result.map(|m| more = m);
        }
        let scan_us = us(clock);
        let mark = Instant::now();
        let copied = match scanned {
            Ok(()) => self.copy(out, first_scanned, workers, reply),
            Err(source) => Err(CaptureError::System {
                what: "scan QEMU's page map",
                source,
            }),
        };
        match copied {
            Ok(pages) => Ok(Collected {
                pages,
                scan_us,
                copy_us: us(mark),
                more,
            }),
            Err(e) => {
                // They were protected (or lost their bit) and not copied.
                for range in &self.ranges {
                    let tracked = &mut self.tracked[usize::from(range.block)];
                    tracked.forced.set_range(range.first, range.count);
                }
                Err(e)
            }
        }
    }

    /// Moves forced pages into `ranges` until `left` is used up; holes go to the absent ranges.
    /// Returns whether there are more.
    fn take_forced(&mut self, out: &mut PageSet, left: &mut u64) -> bool {
        for (index, tracked) in self.tracked.iter_mut().enumerate() {
            let block = index as u16;
            let end = self.blocks[index].pages();
            let mut at = 0;
            while tracked.forced.count() > 0
                && let Some((first, count)) = tracked.forced.run(at, end, true)
            {
                if *left == 0 {
                    return true;
                }
                let (data, hole) = tracked.next_data(first, count);
                let count = u32::try_from(*left).map_or(data, |l| l.min(data));
                if hole > 0 {
                    tracked.forced.clear_range(first, hole);
                    out.add_absent(PageRange {
                        block,
                        first,
                        count: hole,
                    });
                }
                if count > 0 {
                    let first = first + hole;
                    tracked.forced.clear_range(first, count);
                    self.ranges.push(PageRange {
                        block,
                        first,
                        count,
                    });
                    *left -= u64::from(count);
                }
                at = first + hole + count;
            }
        }
        false
    }

    /// Copies what `ranges` names. From `first_scanned` on they come from the kernel, and may name holes.
    fn copy(
        &mut self,
        out: &mut PageSet,
        first_scanned: usize,
        workers: usize,
        reply: Option<BorrowedFd<'_>>,
    ) -> Result<usize, CaptureError> {
        self.copies.clear();
        out.begin_round();
        let mut pages = 0;
        for (i, range) in self.ranges.iter().enumerate() {
            let tracked = &mut self.tracked[usize::from(range.block)];
            let hva = self.blocks[usize::from(range.block)].hva;
            let (mut first, mut left) = (range.first, range.count);
            while left > 0 {
                let (data, hole) = if i < first_scanned {
                    (left, 0)
                } else {
                    tracked.next_data(first, left)
                };
                first += hole;
                let part = PageRange {
                    block: range.block,
                    first,
                    count: data,
                };
                let copies = &mut self.copies;
                out.place(part, |offset, n, to| {
                    let at = u64::from(first + offset) * PAGE_BYTES as u64;
                    let len = n as usize * PAGE_BYTES;
                    match &tracked.file {
                        Some(file) => copies.mapped(file.at(at), to, len),
                        None => copies.remote(hva + at, to, len),
                    }
                })
                .map_err(|source| CaptureError::System {
                    what: "make room for pages",
                    source,
                })?;
                pages += data as usize;
                first += data;
                left -= hole + data;
            }
        }
        let late = Latecomer::new(reply, &self.scan_over);
        // SAFETY: the sources lie in `RamFile` mappings of whole blocks, which `self` holds; the
        // destinations are slots of `out`, borrowed for us alone, each handed out once in this round.
        unsafe { self.copies.run(self.pid, &self.pool, workers, &late) }.map_err(|source| {
            CaptureError::System {
                what: "copy guest memory",
                source,
            }
        })?;
        Ok(pages)
    }

    pub(super) fn protect_all(&mut self) -> Result<(), CaptureError> {
        self.scanner
            .protect_all()
            .map_err(|source| CaptureError::System {
                what: "protect QEMU's memory",
                source,
            })?;
        self.protect_first = false;
        Ok(())
    }

    /// Finds the pieces that the RAM file has no page of, so that they need no scan. With the guest running
    /// a piece may be touched right after: the next scan then sees it.
    fn find_untouched(&mut self) {
        for (index, tracked) in self.tracked.iter_mut().enumerate() {
            let Some(file) = &tracked.file else { continue };
            let held = file.held();
            if held == tracked.held {
                continue;
            }
            let all = tracked.held.is_none();
            tracked.held = held;
            self.scanner.recheck(index as u16, all, |piece| {
                let from = u64::from(piece.first) * PAGE_BYTES as u64;
                let to = from + u64::from(piece.pages()) * PAGE_BYTES as u64;
                file.data(from, to.min(file.len())).is_none()
            });
        }
    }
}

impl Tracked {
    /// Of `count` pages from `first`: how many lead in as a hole, and how many after it are data (at
    /// least one page in all). As (data, hole).
    fn next_data(&mut self, first: u32, count: u32) -> (u32, u32) {
        let end = first + count;
        let Some(file) = &self.file else {
            return (count, 0);
        };
        if self.known.get(first) {
            let known = self.known.run(first, end, true).map_or(1, |(_, n)| n);
            return (known, 0);
        }
        let page = PAGE_BYTES as u64;
        let (from, to) = (u64::from(first) * page, u64::from(end) * page);
        match file.data(from, to.min(file.len())) {
            None => (0, count),
            Some((start, stop)) => {
                let (start, stop) = ((start / page) as u32, (stop / page) as u32);
                self.known.set_range(start, stop - start);
                (stop - start, start - first)
            }
        }
    }
}
