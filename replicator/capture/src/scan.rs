//! Finds written pages over all blocks, with several threads where that pays.
//!
//! Protecting while scanning makes the kernel announce the whole scanned range to KVM, which then
//! drops every second-level entry in it (`do_pagemap_scan` calls the MMU notifier for
//! [start, end)). With KVM a first walk therefore only looks, and a second one protects, close around
//! what was found. What counts is what the second one reports, so nothing is lost in between.

use crate::page_set::PageRange;
use crate::pagemap::{Pagemap, Region};
use crate::pool::{Latecomer, Pool, Tickets};
use std::io;
use std::sync::{Mutex, PoisonError};

/// Pages in a piece of work: 16 MiB, some 10 microseconds of walking.
const PIECE_PAGES: u32 = 4096;
/// Regions taken from the kernel at a time (its own buffer holds 512).
const REGIONS: usize = 2048;
/// Finds closer together than this are protected by one call.
const CLUSTER_BYTES: u64 = 256 * 1024;

/// A part of one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// Nothing was ever written there: skipped.
    pub untouched: bool,
    pub block: u16,
    pub first: u32,
    hva: u64,
    end: u64,
}

impl Piece {
    pub(crate) fn pages(&self) -> u32 {
        ((self.end - self.hva) / 4096) as u32
    }
}

/// What one worker found.
#[derive(Default)]
struct Found {
    regions: Vec<Region>,
    hints: Vec<Region>,
    ranges: Vec<PageRange>,
    error: Option<io::Error>,
}

/// The scanner of one process.
pub(crate) struct Scanner {
    pagemap: Pagemap,
    pieces: Vec<Piece>,
    found: Vec<Mutex<Found>>,
    /// Look first, protect second (KVM).
    gentle: bool,
    /// Where a limited scan goes on: piece, address.
    cursor: Option<(usize, u64)>,
}

impl Scanner {
    pub(crate) fn new(pagemap: Pagemap, workers: usize, gentle: bool) -> Scanner {
        let found = (0..workers).map(|_| {
            Mutex::new(Found {
                regions: vec![Region::default(); REGIONS],
                hints: vec![Region::default(); if gentle { REGIONS } else { 0 }],
                ranges: Vec::with_capacity(16 * 1024),
                error: None,
            })
        });
        Scanner {
            pagemap,
            pieces: Vec::new(),
            found: found.collect(),
            gentle,
            cursor: None,
        }
    }

    /// Sets what is scanned: address and pages of each block.
    pub(crate) fn shape(&mut self, blocks: impl Iterator<Item = (u64, u32)>) {
        self.pieces.clear();
        self.cursor = None;
        for (index, (hva, pages)) in blocks.enumerate() {
            for first in (0..pages).step_by(PIECE_PAGES as usize) {
                let count = PIECE_PAGES.min(pages - first);
                let start = hva + u64::from(first) * 4096;
                let end = start + u64::from(count) * 4096;
                self.pieces.push(Piece {
                    untouched: false,
                    block: index as u16,
                    first,
                    hva: start,
                    end,
                });
            }
        }
    }

    /// Protects everything and forgets what was written.
    pub(crate) fn protect_all(&mut self) -> io::Result<()> {
        self.cursor = None;
        self.pieces
            .iter()
            .try_for_each(|p| self.pagemap.protect(p.hva, p.end))
    }

    /// Asks `empty` about the pieces of a block: those untouched so far, or all.
    pub(crate) fn recheck(&mut self, block: u16, all: bool, empty: impl Fn(&Piece) -> bool) {
        let pieces = self.pieces.iter_mut().filter(|p| p.block == block);
        for piece in pieces.filter(|p| all || p.untouched) {
            piece.untouched = empty(piece);
        }
    }

    /// Scans all RAM from the start, protects what was written, and adds it to `out`. On an error
    /// `out` holds what had been protected by then.
    pub(crate) fn all(
        &mut self,
        pool: &Pool,
        workers: usize,
        late: &Latecomer<'_>,
        out: &mut Vec<PageRange>,
    ) -> io::Result<()> {
        self.cursor = None;
        let workers = workers.min(self.found.len());
        let tickets = Tickets::new(self.pieces.len());
        let this = &*self;
        pool.run(workers, &|n| {
            late.hold(n, workers);
            let mut found = this.found[n].lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(i) = tickets.take() {
                if this.pieces[i].untouched {
                    continue;
                }
                if let Err(e) = this.piece(&this.pieces[i], &mut found) {
                    found.error = Some(e);
                    break;
                }
            }
            late.release(n);
        });
        let mut result = Ok(());
        for found in &mut self.found {
            let found = found.get_mut().unwrap_or_else(PoisonError::into_inner);
            out.append(&mut found.ranges);
            if let Some(e) = found.error.take() {
                result = Err(e);
            }
        }
        result
    }

    /// Scans from where the last limited scan stopped, until about `max_pages` are found or the end is
    /// reached. Returns whether more is left. `out` as in [`Scanner::all`].
    pub(crate) fn some(&mut self, max_pages: u64, out: &mut Vec<PageRange>) -> io::Result<bool> {
        let (mut at, mut address) = self.cursor.take().unwrap_or((0, 0));
        let mut left = max_pages;
        let mut guard = self.found[0].lock().unwrap_or_else(PoisonError::into_inner);
        let found = &mut *guard;
        let mut result = Ok(false);
        while at < self.pieces.len() {
            let mut piece = self.pieces[at];
            if piece.untouched {
                (at, address) = (at + 1, 0);
                continue;
            }
            let start = piece.hva.max(address);
            piece.first += ((start - piece.hva) / 4096) as u32;
            piece.hva = start;
            let before = found.ranges.len();
            let outcome = self.step(&piece, start, left, found);
            left -= found.ranges[before..]
                .iter()
                .map(|r| u64::from(r.count))
                .sum::<u64>()
                .min(left);
            match outcome {
                Err(e) => {
                    result = Err(e);
                    break;
                }
                Ok(end) if end >= piece.end => (at, address) = (at + 1, 0),
                Ok(end) => address = end,
            }
            if left == 0 && at < self.pieces.len() {
                result = Ok(true);
                break;
            }
        }
        out.append(&mut found.ranges);
        drop(guard);
        if matches!(result, Ok(true)) {
            self.cursor = Some((at, address));
        }
        result
    }

    /// Scans one piece to its end.
    fn piece(&self, piece: &Piece, found: &mut Found) -> io::Result<()> {
        let mut at = piece.hva;
        while at < piece.end {
            at = self.step(piece, at, 0, found)?;
        }
        Ok(())
    }

    /// One step from `at`: returns where to go on.
    fn step(&self, piece: &Piece, at: u64, max: u64, found: &mut Found) -> io::Result<u64> {
        if !self.gentle {
            return self.protect(piece, at, piece.end, max, found);
        }
        let hints = self
            .pagemap
            .scan(at, piece.end, &mut found.hints, max, false)?;
        let (n, end) = hints;
        let mut i = 0;
        while i < n {
            let (start, mut stop) = (found.hints[i].start, found.hints[i].end);
            i += 1;
            while i < n && found.hints[i].start < stop.saturating_add(CLUSTER_BYTES) {
                stop = found.hints[i].end;
                i += 1;
            }
            let mut from = start;
            while from < stop {
                from = self.protect(piece, from, stop, 0, found)?;
            }
        }
        Ok(end)
    }

    fn protect(
        &self,
        piece: &Piece,
        from: u64,
        to: u64,
        max: u64,
        found: &mut Found,
    ) -> io::Result<u64> {
        let (n, end) = self.pagemap.scan(from, to, &mut found.regions, max, true)?;
        for region in &found.regions[..n] {
            // The kernel reports inside what was asked for; a range beyond it would be a defect there.
            let start = region.start.clamp(piece.hva, piece.end);
            let stop = region.end.clamp(start, piece.end);
            found.ranges.push(PageRange {
                block: piece.block,
                first: piece.first + ((start - piece.hva) / 4096) as u32,
                count: ((stop - start) / 4096) as u32,
            });
        }
        if end <= from && n == 0 {
            return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
        }
        Ok(end)
    }
}
