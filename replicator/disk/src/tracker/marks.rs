//! The sets of blocks: what is marked, what rides in epochs, and what the bitmap on disk must say.

use super::{Inner, MAX_UNSETTLED, Mode, Tracker};
use crate::blocks::{BLOCKS_PER_EXTENT, BlockSet, span};
use crate::error::Result;
use crate::meta::bitmap;
use havm_core::ids::EpochNo;
use std::ops::RangeInclusive;

/// Whether any block of the extent is in the set.
pub(super) fn marked(set: &BlockSet, extent: u32) -> bool {
    let first = extent.saturating_mul(BLOCKS_PER_EXTENT as u32);
    set.intersects_span(first, first.saturating_add(BLOCKS_PER_EXTENT as u32 - 1))
}

impl Tracker {
    pub(crate) fn dirty(&self) -> BlockSet {
        self.lock().dirty.clone()
    }

    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.lock().dirty.bytes()
    }

    /// Marks blocks, durably.
    pub(crate) fn mark(&self, set: &BlockSet) -> Result<()> {
        let mut g = self.lock();
        g.check()?;
        g.dirty.union(set);
        g.may.union(set);
        drop(g);
        self.write_bitmap()
    }

    /// These blocks are equal once `epoch` is durable at the peer: they move from the marks to
    /// that epoch's list. An epoch that is not open yet is refused.
    pub(crate) fn synced(&self, blocks: &[u32], epoch: EpochNo) -> Result<()> {
        let mut g = self.lock();
        if g.mode != Mode::Tracking || epoch.0 > g.open.epoch {
            return Err(g.wrong("synced"));
        }
        let mut moved = Vec::with_capacity(blocks.len());
        for b in blocks
            .iter()
            .filter(|b| **b < g.dirty.capacity())
            .copied()
            .collect::<Vec<_>>()
        {
            g.dirty.remove(b);
            g.intent
                .touch((u64::from(b) / BLOCKS_PER_EXTENT) as u32, epoch.0);
            moved.push(b);
        }
        if epoch.0 <= g.settled().epoch {
            // Durable there already: nothing is left to wait for.
        } else if epoch.0 == g.open.epoch {
            g.open.blocks.extend(moved);
        } else {
            g.unsettled_blocks += moved.len();
            let at = g.unsettled.partition_point(|l| l.0 < epoch.0);
            match g.unsettled.get_mut(at) {
                Some(l) if l.0 == epoch.0 => l.1.extend(moved),
                _ => g.unsettled.insert(at, (epoch.0, moved)),
            }
            g.fold();
        }
        Ok(())
    }

    /// Takes all marks off: this copy and the peer's are known to be equal and durable.
    pub(crate) fn forget_differences(&self) -> Result<()> {
        let mut g = self.lock();
        g.check()?;
        g.dirty.clear();
        drop(g);
        self.tidy()
    }
}

impl Inner {
    /// Takes `missing` extents and some more out of the log, none of `needed`; how many. Bitmap
    /// pages that must be durable before the next transaction are noted.
    pub(super) fn evict(&mut self, missing: usize, needed: RangeInclusive<u32>) -> usize {
        let before = self.intent.len();
        let n = missing.max(before / 8);
        let settled = self.settled();
        let dirty = &self.dirty;
        let marked_ones = self.intent.evict(n, settled, needed, |e| marked(dirty, e));
        for (e, write_gen) in marked_ones {
            let first = e * BLOCKS_PER_EXTENT as u32;
            let last = (first + BLOCKS_PER_EXTENT as u32 - 1).min(self.may.capacity() - 1);
            self.stale_pages.insert(bitmap::page_of(first));
            self.stale_pages.insert(bitmap::page_of(last));
            if write_gen >= settled.flushed_gen {
                self.unflushed.push((e, write_gen));
            }
        }
        before - self.intent.len()
    }

    pub(super) fn settle(&mut self) {
        let upto = self.acked.min(self.durable);
        while self.unsettled.front().is_some_and(|l| l.0 <= upto) {
            if let Some(l) = self.unsettled.pop_front() {
                self.unsettled_blocks -= l.1.len();
            }
        }
    }

    /// Bounds the lists: duplicates go first, then the oldest epochs' blocks are marked instead.
    pub(super) fn fold(&mut self) {
        if self.unsettled_blocks <= MAX_UNSETTLED {
            return;
        }
        for l in &mut self.unsettled {
            l.1.sort_unstable();
            l.1.dedup();
        }
        self.unsettled_blocks = self.unsettled.iter().map(|l| l.1.len()).sum();
        while self.unsettled_blocks > MAX_UNSETTLED / 2 {
            let Some(l) = self.unsettled.pop_front() else {
                break;
            };
            self.unsettled_blocks -= l.1.len();
            l.1.iter().for_each(|b| self.dirty.insert(*b));
        }
    }

    /// `may` = what is marked and what epochs in flight wrote, and no more.
    pub(super) fn recount(&mut self) {
        let mut may = self.dirty.clone();
        for b in self
            .unsettled
            .iter()
            .flat_map(|l| &l.1)
            .chain(&self.open.blocks)
        {
            may.insert(*b);
        }
        for r in &self.in_flight {
            let (a, b) = span(r.0, r.1 - r.0);
            may.insert_span(a, b);
        }
        let flushed = self.flushed_gen;
        self.unflushed.retain(|u| u.1 >= flushed);
        for (e, _) in &self.unflushed {
            let first = e * BLOCKS_PER_EXTENT as u32;
            (first..first + BLOCKS_PER_EXTENT as u32)
                .filter(|b| self.may.contains(*b))
                .for_each(|b| may.insert(b));
        }
        self.may = may;
    }
}
