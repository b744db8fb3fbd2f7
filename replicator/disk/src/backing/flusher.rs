//! Moving the journal on: fsync, apply in place, free a segment. Runs in the background, and in
//! the foreground of whoever cannot go on before the journal is empty.

use super::Backing;
use crate::error::{DiskError, Result};
use crate::journal::segment::RECORDS_AT;
use crate::store::Store;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError};

impl Backing {
    /// Makes every record appended so far durable.
    pub(super) fn sync_journal(&self) -> Result<()> {
        let (dirty, upto, epoch, stream, disk_first) = {
            let g = self.lock();
            g.check()?;
            let dirty: Vec<(usize, u64, Arc<dyn Store>)> = g
                .segments
                .iter()
                .enumerate()
                .filter(|(_, s)| s.synced < s.writes)
                .map(|(i, s)| (i, s.writes, s.store.clone()))
                .collect();
            let epoch = g.staged.back().map_or(g.committed, |r| r.epoch);
            (dirty, g.next_seq - 1, epoch, g.stream, g.disk_unflushed)
        };
        if dirty.is_empty() && !disk_first {
            return Ok(());
        }
        // What was written in place before these records must not be less durable than they.
        let done = (if disk_first {
            self.store.flush()
        } else {
            Ok(())
        })
        .and_then(|()| dirty.iter().try_for_each(|(_, _, s)| s.flush()))
        .map_err(DiskError::io("flushing the disk journal"));
        let mut g = self.lock();
        g.note(done)?;
        for (i, writes, _) in dirty {
            let s = &mut g.segments[i];
            s.synced = s.synced.max(writes);
        }
        g.synced_seq = g.synced_seq.max(upto);
        if disk_first {
            g.disk_unflushed = false;
        }
        if g.stream == stream {
            g.durable = g.durable.max(epoch);
        }
        drop(g);
        self.changed.notify_all();
        Ok(())
    }

    /// Moves the journal on: fsync, apply in place, free a segment. With `drain` also the segment
    /// in use. Whether there was anything to do.
    pub(crate) fn step(&self, drain: bool) -> Result<bool> {
        let _one = self.stepping.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.active.load(SeqCst) {
            return Ok(false);
        }
        self.sync_journal()?;
        let mut worked = false;
        loop {
            let next = {
                let g = self.lock();
                g.pending
                    .front()
                    .filter(|r| r.seq <= g.synced_seq)
                    .map(|r| (r.seq, r.writes.clone()))
            };
            let Some((seq, writes)) = next else { break };
            worked = true;
            let done = writes.writes.iter().try_for_each(|w| self.put(w));
            let mut g = self.lock();
            g.note(done)?;
            g.pending.pop_front();
            drop(g);
            let mut o = self.overlay.write().unwrap_or_else(PoisonError::into_inner);
            writes.writes.iter().for_each(|w| o.remove(w, seq));
        }
        Ok(self.free_segments(drain)? || worked)
    }

    fn free_segments(&self, drain: bool) -> Result<bool> {
        let free: Vec<usize> = {
            let mut g = self.lock();
            let (cur, other) = (g.current, 1 - g.current);
            if (drain || g.sealed)
                && g.segments[cur].head.in_use
                && g.segments[cur].tail > RECORDS_AT
                && !g.segments[other].head.in_use
                && g.staged.is_empty()
            {
                // What comes now goes to the other one, so that this one can be freed.
                let (seq, chain) = (g.next_seq, g.chain);
                let r = g.segments[other].set_head(true, seq, chain);
                g.note(r)?;
                g.current = other;
            }
            let cur = g.current;
            (0..2)
                .filter(|i| *i != cur && g.segments[*i].head.in_use)
                .filter(|i| !g.pending.iter().chain(&g.staged).any(|r| r.segment == *i))
                .collect()
        };
        for i in &free {
            // In place must be durable before the record that could repeat it goes.
            let done = self
                .store
                .flush()
                .map_err(DiskError::io("flushing the disk"));
            let store = {
                let mut g = self.lock();
                g.note(done)?;
                let (seq, chain) = (g.next_seq, g.chain);
                let r = g.segments[*i].set_head(false, seq, chain);
                g.note(r)?;
                g.segments[*i].head.in_use = true; // not to be used again before it is durable
                g.segments[*i].store.clone()
            };
            let done = store
                .flush()
                .map_err(DiskError::io("flushing the disk journal"));
            let mut g = self.lock();
            g.note(done)?;
            g.segments[*i].head.in_use = false;
            g.segments[*i].synced = g.segments[*i].writes;
            g.held[*i].clear();
            drop(g);
            self.changed.notify_all();
        }
        let g = self.lock();
        let cur = &g.segments[g.current];
        if cur.tail == RECORDS_AT
            && !g.segments[1 - g.current].head.in_use
            && g.pending.is_empty()
            && g.staged.is_empty()
            && g.synced_seq >= g.seal_seq
        {
            self.active.store(false, SeqCst);
        }
        Ok(!free.is_empty())
    }

    /// Until the journal is empty and everything in place is durable.
    pub(crate) fn drain(&self) -> Result<()> {
        while self.active.load(SeqCst) {
            self.lock().check()?;
            if self.lock().staged.is_empty() {
                self.step(true)?;
            } else {
                return Err(DiskError::WrongMode {
                    op: "draining the journal",
                    mode: "standby with staged epochs".into(),
                });
            }
        }
        Ok(())
    }

    /// Makes durable everything that was sealed: after this the disk alone is enough.
    pub(crate) fn settle(&self) -> Result<()> {
        let upto = self.lock().seal_seq;
        loop {
            {
                let g = self.lock();
                g.check()?;
                let left = g
                    .segments
                    .iter()
                    .any(|s| s.head.in_use && s.tail > RECORDS_AT && s.head.first_seq <= upto);
                if !left {
                    break;
                }
            }
            self.step(true)?;
        }
        self.sync_journal()?;
        let done = self
            .store
            .flush()
            .map_err(DiskError::io("flushing the disk"));
        let mut g = self.lock();
        g.note(done)?;
        g.disk_unflushed = false;
        g.durable = g.committed;
        Ok(())
    }

    /// Empties the journal where nothing is staged, else makes it durable; flushes the disk.
    pub(crate) fn drain_or_sync(&self) -> Result<()> {
        if self.lock().staged.is_empty() {
            self.drain()?;
        } else {
            self.sync_journal()?;
        }
        let done = self
            .store
            .flush()
            .map_err(DiskError::io("flushing the disk"));
        let mut g = self.lock();
        g.note(done)?;
        Ok(())
    }

    /// Flushes what was written in place without the journal, so that `progress` moves on.
    pub(crate) fn flush_direct(&self) -> Result<bool> {
        let (direct, stream) = {
            let g = self.lock();
            if !g.disk_unflushed || g.direct <= g.durable {
                return Ok(false);
            }
            (g.direct, g.stream)
        };
        let done = self
            .store
            .flush()
            .map_err(DiskError::io("flushing the disk"));
        let mut g = self.lock();
        g.note(done)?;
        if g.stream == stream {
            g.durable = g.durable.max(direct);
        }
        Ok(true)
    }

    /// Sleeps until something was committed, sealed or staged into a full journal, or the time is
    /// over; false when there is nothing to do.
    pub(crate) fn wait_work(&self, at_most: std::time::Duration) -> bool {
        let g = self.lock();
        if g.has_work() {
            return true;
        }
        let (g, _) = self
            .changed
            .wait_timeout(g, at_most)
            .unwrap_or_else(PoisonError::into_inner);
        g.has_work()
    }

    /// Wakes the flusher (at the end).
    pub(crate) fn wake(&self) {
        self.changed.notify_all();
    }
}
