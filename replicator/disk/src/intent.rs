//! The write-intent log in memory: which 1 MiB extents may be written without another flush, and
//! which of them may be let go. Pure: the caller does the IO and the locking.
//!
//! ```text
//!   absent ──want──> pending ──(transaction durable)──> active ──evict──> absent
//! ```
//! An extent is evicted only while no write is in flight in it. It is *clean* when its last write
//! is flushed here, acked, and durable at the peer; a clean one just goes, any other has its
//! blocks made durable in the bitmap first.

use crate::blocks::EXTENT_BYTES;

/// How far a sequential writer is helped ahead, extents: one flush for so many instead of each.
const AHEAD: u32 = 16;

#[derive(Debug, Clone)]
struct Slot {
    extent: u32,
    in_flight: u32,
    /// The last epoch that wrote here; 0 for a write in solo, whose block is marked instead.
    epoch: u64,
    /// The flush generation at its last write; flushed when a later generation has finished.
    write_gen: u64,
    used: u64,
    active: bool,
}

/// Which extents may be called clean.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settled {
    /// Epochs up to here are acked and durable at the peer.
    pub(crate) epoch: u64,
    /// Flush generations up to here have finished.
    pub(crate) flushed_gen: u64,
}

#[derive(Debug)]
pub(crate) struct Intent {
    /// Per extent: slot index + 1, or 0.
    slot_of: Vec<u32>,
    slots: Vec<Slot>,
    max: usize,
    clock: u64,
}

impl Intent {
    pub(crate) fn new(disk_bytes: u64, max: usize, active: &[u32]) -> Self {
        let extents = disk_bytes.div_ceil(EXTENT_BYTES) as usize;
        let mut me = Intent {
            slot_of: vec![0; extents],
            slots: Vec::new(),
            max: max.max(4),
            clock: 0,
        };
        for e in active {
            me.add(*e, true);
        }
        me
    }

    pub(crate) fn extents_of(offset: u64, len: u64) -> std::ops::RangeInclusive<u32> {
        (offset / EXTENT_BYTES) as u32..=((offset + len - 1) / EXTENT_BYTES) as u32
    }

    fn add(&mut self, extent: u32, active: bool) {
        if let Some(s) = self.slot_of.get_mut(extent as usize)
            && *s == 0
        {
            self.slots.push(Slot {
                extent,
                in_flight: 0,
                epoch: 0,
                write_gen: 0,
                used: self.clock,
                active,
            });
            *s = self.slots.len() as u32;
        }
    }

    fn slot(&mut self, extent: u32) -> Option<&mut Slot> {
        let i = *self.slot_of.get(extent as usize)?;
        self.slots.get_mut(i.checked_sub(1)? as usize)
    }

    /// Whether all of them may be written now.
    pub(crate) fn active(&self, extents: std::ops::RangeInclusive<u32>) -> bool {
        extents.into_iter().all(|e| {
            self.slot_of
                .get(e as usize)
                .and_then(|i| self.slots.get((*i as usize).checked_sub(1)?))
                .is_some_and(|s| s.active)
        })
    }

    /// How many of them are not in the log yet.
    pub(crate) fn missing(&self, extents: std::ops::RangeInclusive<u32>) -> usize {
        extents
            .into_iter()
            .filter(|e| self.slot_of.get(*e as usize).is_some_and(|i| *i == 0))
            .count()
    }

    pub(crate) fn room(&self) -> usize {
        self.max.saturating_sub(self.slots.len())
    }

    /// Counts a write in; extents not in the log are added as pending. The caller made room.
    pub(crate) fn enter(&mut self, extents: std::ops::RangeInclusive<u32>) {
        self.clock += 1;
        let (first, last) = (*extents.start(), *extents.end());
        let sequential = first > 0
            && self
                .slot_of
                .get(first as usize - 1)
                .is_some_and(|s| *s != 0)
            && self.missing(extents.clone()) > 0;
        for e in extents {
            self.add(e, false);
            let clock = self.clock;
            if let Some(s) = self.slot(e) {
                s.in_flight += 1;
                s.used = clock;
            }
        }
        if sequential {
            for e in (last..last.saturating_add(AHEAD)).skip(1) {
                if self.room() > self.max / 2 {
                    self.add(e, false);
                }
            }
        }
    }

    /// Counts it out again.
    pub(crate) fn leave(
        &mut self,
        extents: std::ops::RangeInclusive<u32>,
        epoch: u64,
        write_gen: u64,
    ) {
        for e in extents {
            if let Some(s) = self.slot(e) {
                s.in_flight = s.in_flight.saturating_sub(1);
                s.write_gen = s.write_gen.max(write_gen);
                s.epoch = s.epoch.max(epoch);
            }
        }
    }

    /// A block of this extent rides in `epoch` though no guest wrote it (resync).
    pub(crate) fn touch(&mut self, extent: u32, epoch: u64) {
        if let Some(s) = self.slot(extent) {
            s.epoch = s.epoch.max(epoch);
        }
    }

    /// Stream over: epoch numbers mean nothing any more. The caller has marked the blocks that
    /// its unsettled epochs wrote, so their extents are kept by that.
    pub(crate) fn forget_epochs(&mut self) {
        self.slots.iter_mut().for_each(|s| s.epoch = 0);
    }

    fn clean(s: &Slot, settled: Settled) -> bool {
        s.epoch <= settled.epoch && s.write_gen < settled.flushed_gen
    }

    /// Takes up to `n` extents out that no write is in: clean ones first, then those unused for
    /// longest. Returns the ones whose blocks must be durable in the bitmap before the next
    /// transaction, each with the flush generation of its last write. `needed` ones stay. `keep` tells extents that
    /// are known to differ and so are never clean.
    pub(crate) fn evict(
        &mut self,
        n: usize,
        settled: Settled,
        needed: std::ops::RangeInclusive<u32>,
        keep: impl Fn(u32) -> bool,
    ) -> Vec<(u32, u64)> {
        let mut idle: Vec<(bool, u64, u32, u64)> = self
            .slots
            .iter()
            .filter(|s| s.in_flight == 0 && !needed.contains(&s.extent))
            .map(|s| {
                (
                    !Self::clean(s, settled) || keep(s.extent),
                    s.used,
                    s.extent,
                    s.write_gen,
                )
            })
            .collect();
        idle.sort_unstable();
        idle.truncate(n);
        let out = idle.iter().filter(|v| v.0).map(|v| (v.2, v.3)).collect();
        for (_, _, e, _) in idle {
            self.drop_extent(e);
        }
        out
    }

    /// Takes out all clean extents; how many.
    pub(crate) fn drop_clean(&mut self, settled: Settled, keep: impl Fn(u32) -> bool) -> usize {
        let gone: Vec<u32> = self
            .slots
            .iter()
            .filter(|s| s.in_flight == 0 && Self::clean(s, settled) && !keep(s.extent))
            .map(|s| s.extent)
            .collect();
        gone.iter().for_each(|e| self.drop_extent(*e));
        gone.len()
    }

    fn drop_extent(&mut self, extent: u32) {
        let Some(i) = self.slot_of.get_mut(extent as usize) else {
            return;
        };
        let Some(at) = (std::mem::take(i) as usize).checked_sub(1) else {
            return;
        };
        self.slots.swap_remove(at);
        if let Some(moved) = self.slots.get(at)
            && let Some(s) = self.slot_of.get_mut(moved.extent as usize)
        {
            *s = at as u32 + 1;
        }
    }

    /// Everything that the next transaction lists.
    pub(crate) fn listing(&self) -> Vec<u32> {
        self.slots.iter().map(|s| s.extent).collect()
    }

    /// The transaction with this listing is durable. How many became active.
    pub(crate) fn activated(&mut self, listing: &[u32]) -> usize {
        let mut n = 0;
        for e in listing {
            if let Some(s) = self.slot(*e)
                && !s.active
            {
                s.active = true;
                n += 1;
            }
        }
        n
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }
}
