//! The write-intent log's IO: transactions that many writers share, bitmap pages before them.

use super::marks::marked;
use super::{Inner, Tracker};
use crate::counters::add;
use crate::error::Result;
use crate::intent::{Intent, Settled};
use crate::meta::bitmap;
use std::sync::MutexGuard;

impl Tracker {
    /// Takes the extents of a write into the log; returns when they are durable there. Whoever
    /// finds the log idle writes the transaction for everybody who waits.
    pub(super) fn activate<'a>(
        &'a self,
        mut g: MutexGuard<'a, Inner>,
        offset: u64,
        len: u64,
    ) -> (MutexGuard<'a, Inner>, Result<()>) {
        let extents = Intent::extents_of(offset, len);
        loop {
            let missing = g.intent.missing(extents.clone());
            if missing <= g.intent.room() {
                break;
            }
            // Eviction belongs to an idle log: what it notes goes into the next transaction.
            if !g.log_busy && g.evict(missing, extents.clone()) > 0 {
                continue;
            }
            if let Err(e) = g.check() {
                return (g, Err(e));
            }
            g.waiters += 1;
            g = self.wait(g);
            g.waiters -= 1;
        }
        g.intent.enter(extents.clone());
        loop {
            if g.intent.active(extents.clone()) {
                return (g, Ok(()));
            }
            if let Err(e) = g.check() {
                g.intent.leave(extents, 0, 0);
                return (g, Err(e));
            }
            if g.log_busy {
                g.waiters += 1;
                g = self.wait(g);
                g.waiters -= 1;
                continue;
            }
            g = self.write_log(g);
        }
    }

    /// Writes stale pages, then one log transaction, both durably, without holding the lock.
    pub(super) fn write_log<'a>(&'a self, mut g: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        g.log_busy = true;
        g.log_seq += 1;
        let pages: Vec<(u32, Vec<u8>)> = std::mem::take(&mut g.stale_pages)
            .into_iter()
            .map(|p| (p, bitmap::encode(&g.may, p)))
            .collect();
        let (seq, listing) = (g.log_seq, g.intent.listing());
        drop(g);
        let done = (if pages.is_empty() {
            Ok(())
        } else {
            self.meta.write_encoded_pages(&pages)
        })
        .and_then(|()| self.meta.write_log(seq, &listing));
        add(&self.counters.log_writes, 1);
        let mut g = self.lock();
        g.log_busy = false;
        match done {
            Ok(()) => {
                let n = g.intent.activated(&listing);
                add(&self.counters.log_activations, n as u64);
            }
            Err(e) => g.fail(&e),
        }
        self.changed.notify_all();
        g
    }

    /// Shrinks what a crash would make us compare: rewrites the bitmap from what is known, and
    /// takes clean extents out of the log. Call it after a flush of the disk, seldom.
    pub(crate) fn tidy(&self) -> Result<()> {
        let mut g = self.lock();
        g.check()?;
        g.recount();
        drop(g);
        self.write_bitmap()?;
        let mut g = self.idle_log();
        let settled = g.settled();
        let Inner { intent, dirty, .. } = &mut *g;
        let gone = intent.drop_clean(settled, |e| marked(dirty, e));
        if gone > 0 {
            g = self.write_log(g);
        }
        g.check()
    }

    /// At a clean end, with no write in flight and the disk flushed: every mark into the bitmap,
    /// every extent out of the log, so that the next start compares exactly what differs.
    pub(crate) fn close(&self) -> Result<()> {
        self.lock().recount();
        self.write_bitmap()?;
        let mut g = self.idle_log();
        if g.in_flight.is_empty() {
            // What the bitmap now says covers all of them.
            let n = g.intent.len();
            let all = Settled {
                epoch: u64::MAX,
                flushed_gen: u64::MAX,
            };
            // No disk has that extent: none is needed any more.
            g.intent.evict(n, all, u32::MAX..=u32::MAX, |_| false);
            g = self.write_log(g);
        }
        g.check()
    }

    pub(super) fn write_bitmap(&self) -> Result<()> {
        // As a log transaction, so that no eviction writes an older page over a newer one.
        let mut g = self.idle_log();
        let pages = bitmap::pages(g.may.capacity());
        g.stale_pages.extend(0..pages);
        g = self.write_log(g);
        g.check()
    }

    fn idle_log(&self) -> MutexGuard<'_, Inner> {
        let mut g = self.lock();
        while g.log_busy {
            g.waiters += 1;
            g = self.wait(g);
            g.waiters -= 1;
        }
        g
    }
}
