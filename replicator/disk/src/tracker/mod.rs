//! Every guest write passes here twice: [`Tracker::begin`] before it touches the disk, and
//! [`Tracker::end`] after. In between lies what must be true of it:
//!
//! - its extents are durable in the write-intent log (rule 14);
//! - no other write overlaps it (so the order of records is the order of effects);
//!
//! and after it, it is either in the open epoch (tracking) or marked as different (solo).
//!
//! ```text
//!           begin_tracking                    barrier, barrier, …
//!   SOLO ───────────────────────> TRACKING ───────────────────────┐
//!    ^  <──── end_tracking ─────────  ^ └─────────────────────────┘
//!    │        (or over every bound: blocks of unsettled epochs are marked)
//!    └── promote ── STANDBY <── become_standby ── SOLO, TRACKING
//! ```
//!
//! Three sets of blocks: `dirty` differs from the peer and is for resync; the lists in `unsettled`
//! belong to epochs that the peer has not made durable; `may` holds at least both, and is what the
//! bitmap on disk is written from.

mod log;
mod marks;

use crate::blocks::{BlockSet, span};
use crate::counters::Live;
use crate::epoch::{Charge, DiskWrite, EpochWrites, WriteOp};
use crate::error::{DiskError, Result};
use crate::intent::{Intent, Settled};
use crate::meta::{MetaFile, Opened};
use havm_core::ids::{EpochNo, StreamId};
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What a disk does with guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Primary without a stream: writes are marked for the peer.
    Solo,
    /// Primary with a stream: writes ride in epochs.
    Tracking,
    /// Guest writes are refused, reads served.
    Standby,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Solo => "solo",
            Mode::Tracking => "tracking",
            Mode::Standby => "standby",
        })
    }
}

#[derive(Debug, Default)]
struct Open {
    epoch: u64,
    writes: Vec<DiskWrite>,
    bytes: u64,
    blocks: Vec<u32>,
}

#[derive(Debug)]
struct Inner {
    mode: Mode,
    stream: Option<StreamId>,
    /// Byte ranges of the writes in flight.
    in_flight: Vec<(u64, u64)>,
    waiters: usize,
    intent: Intent,
    log_seq: u64,
    log_busy: bool,
    open: Open,
    /// Tracking ended by itself: over every bound.
    lost: bool,
    unsettled: VecDeque<(u64, Vec<u32>)>,
    unsettled_blocks: usize,
    acked: u64,
    durable: u64,
    dirty: BlockSet,
    may: BlockSet,
    /// Bitmap pages that the next log transaction must be preceded by.
    stale_pages: BTreeSet<u32>,
    /// Extents in the bitmap only because their last write (of that flush generation) may not be
    /// flushed here.
    unflushed: Vec<(u32, u64)>,
    flush_gen: u64,
    flushed_gen: u64,
    failed: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tracker {
    inner: Mutex<Inner>,
    changed: Condvar,
    meta: MetaFile,
    held: Arc<AtomicU64>,
    limit_bytes: u64,
    counters: Arc<Live>,
}

/// A write that has begun. Give it back to [`Tracker::end`].
#[must_use]
#[derive(Debug)]
pub(crate) struct Ticket {
    offset: u64,
    len: u64,
    /// The write's data will be kept: hand it over.
    pub(crate) keep_data: bool,
}

/// The most entries in the lists of unsettled epochs before the oldest are folded into the marks
/// (4 MiB of memory): a standby that acks but never flushes must not cost unbounded memory.
const MAX_UNSETTLED: usize = 1 << 20;
/// At this multiple of the limit the data is dropped and the stream is over.
const HARD_LIMIT: u64 = 4;

impl Tracker {
    pub(crate) fn new(
        opened: Opened,
        log_extents: usize,
        limit_bytes: u64,
        counters: Arc<Live>,
    ) -> Self {
        let size = opened.meta.superblock().size;
        let inner = Inner {
            mode: Mode::Standby,
            stream: None,
            in_flight: Vec::new(),
            waiters: 0,
            intent: Intent::new(size, log_extents, &opened.extents),
            log_seq: opened.log_seq,
            log_busy: false,
            open: Open::default(),
            lost: false,
            unsettled: VecDeque::new(),
            unsettled_blocks: 0,
            acked: 0,
            durable: 0,
            dirty: opened.may_differ.clone(),
            may: opened.may_differ,
            stale_pages: BTreeSet::new(),
            unflushed: Vec::new(),
            flush_gen: 1,
            flushed_gen: 0,
            failed: None,
        };
        Tracker {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            meta: opened.meta,
            held: Arc::default(),
            limit_bytes,
            counters,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, g: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed.wait(g).unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn meta(&self) -> &MetaFile {
        &self.meta
    }

    pub(crate) fn mode(&self) -> Mode {
        self.lock().mode
    }

    /// Before a write of `len > 0` bytes, inside the disk.
    pub(crate) fn begin(&self, offset: u64, len: u64) -> Result<Ticket> {
        let mut g = self.lock();
        loop {
            if g.mode == Mode::Standby {
                return Err(DiskError::ReadOnly);
            }
            g.check()?;
            if !g
                .in_flight
                .iter()
                .any(|r| r.0 < offset + len && offset < r.1)
            {
                break;
            }
            g.waiters += 1;
            g = self.wait(g);
            g.waiters -= 1;
        }
        g.in_flight.push((offset, offset + len));
        let extents = Intent::extents_of(offset, len);
        if g.intent.active(extents.clone()) {
            g.intent.enter(extents);
        } else {
            let (back, done) = self.activate(g, offset, len);
            g = back;
            if let Err(e) = done {
                g.in_flight.retain(|r| r.0 != offset);
                self.changed.notify_all();
                return Err(e);
            }
        }
        Ok(Ticket {
            offset,
            len,
            keep_data: g.mode == Mode::Tracking,
        })
    }

    /// After the write: `op` is what it did (the data where the ticket asked for it).
    pub(crate) fn end(&self, t: Ticket, ok: bool, op: Option<WriteOp>) {
        let mut g = self.lock();
        let (first, last) = span(t.offset, t.len);
        g.may.insert_span(first, last);
        let mut epoch = 0;
        match op {
            Some(op) if ok && g.mode == Mode::Tracking => {
                epoch = g.open.epoch;
                let bytes = match &op {
                    WriteOp::Data(d) => d.len() as u64,
                    WriteOp::Zero(_) => 0,
                } + std::mem::size_of::<DiskWrite>() as u64;
                g.open.writes.push(DiskWrite {
                    offset: t.offset,
                    op,
                });
                g.open.bytes += bytes;
                let held = self.held.fetch_add(bytes, Relaxed) + bytes;
                for b in first..=last {
                    if g.open.blocks.last() != Some(&b) {
                        g.open.blocks.push(b);
                    }
                }
                if held > self.limit_bytes.saturating_mul(HARD_LIMIT) {
                    tracing::warn!(
                        held,
                        "disk writes waiting for the standby outgrew every bound"
                    );
                    self.stop_tracking(&mut g);
                    g.lost = true;
                }
            }
            // Solo; a failed write (nobody knows what it left); or a write that began before
            // tracking did and whose data is gone.
            _ => g.dirty.insert_span(first, last),
        }
        let write_gen = g.flush_gen;
        g.intent
            .leave(Intent::extents_of(t.offset, t.len), epoch, write_gen);
        if let Some(i) = g.in_flight.iter().position(|r| r.0 == t.offset) {
            g.in_flight.swap_remove(i);
        }
        if g.waiters > 0 {
            self.changed.notify_all();
        }
    }

    /// Solo -> tracking; the first epoch is `first`.
    pub(crate) fn begin_tracking(&self, stream: StreamId, first: EpochNo) -> Result<()> {
        let mut g = self.lock();
        g.check()?;
        if g.mode != Mode::Solo {
            return Err(g.wrong("begin_tracking"));
        }
        g.mode = Mode::Tracking;
        g.stream = Some(stream);
        g.lost = false;
        g.open = Open {
            epoch: first.0.max(1),
            ..Open::default()
        };
        g.acked = g.open.epoch - 1;
        g.durable = g.acked;
        g.intent.forget_epochs();
        Ok(())
    }

    /// Closes the open epoch and opens the next. Cheap: a swap.
    pub(crate) fn barrier(&self) -> Result<EpochWrites> {
        let mut g = self.lock();
        if g.lost {
            return Err(DiskError::TrackingLost(
                self.limit_bytes.saturating_mul(HARD_LIMIT),
            ));
        }
        if g.mode != Mode::Tracking {
            return Err(g.wrong("barrier"));
        }
        let next = Open {
            epoch: g.open.epoch + 1,
            ..Open::default()
        };
        let done = std::mem::replace(&mut g.open, next);
        if !done.blocks.is_empty() {
            g.unsettled_blocks += done.blocks.len();
            g.unsettled.push_back((done.epoch, done.blocks));
            g.fold();
        }
        let charge = Charge {
            used: self.held.clone(),
            bytes: done.bytes,
        };
        Ok(EpochWrites::charged(
            EpochNo(done.epoch),
            done.writes,
            charge,
        ))
    }

    pub(crate) fn acked(&self, n: EpochNo) {
        let mut g = self.lock();
        if g.mode == Mode::Tracking {
            g.acked = g.acked.max(n.0).min(g.open.epoch - 1);
            g.settle();
        }
    }

    pub(crate) fn peer_durable(&self, n: EpochNo) {
        let mut g = self.lock();
        if g.mode == Mode::Tracking {
            g.durable = g.durable.max(n.0).min(g.open.epoch - 1);
            g.settle();
        }
    }

    /// Tracking -> solo: what unsettled epochs wrote is marked.
    pub(crate) fn end_tracking(&self) -> Result<()> {
        let mut g = self.lock();
        match g.mode {
            Mode::Tracking => self.stop_tracking(&mut g),
            Mode::Solo => g.lost = false,
            Mode::Standby => return Err(g.wrong("end_tracking")),
        }
        Ok(())
    }

    fn stop_tracking(&self, g: &mut Inner) {
        let open = std::mem::take(&mut g.open);
        self.held.fetch_sub(open.bytes, Relaxed);
        let lists = std::mem::take(&mut g.unsettled);
        g.unsettled_blocks = 0;
        for b in lists.iter().flat_map(|l| &l.1).chain(&open.blocks) {
            g.dirty.insert(*b);
            g.may.insert(*b);
        }
        g.mode = Mode::Solo;
        g.stream = None;
        g.acked = 0;
        g.durable = 0;
        g.intent.forget_epochs();
    }

    /// To standby, once no write is in flight.
    pub(crate) fn become_standby(&self) {
        let mut g = self.lock();
        if g.mode == Mode::Tracking {
            self.stop_tracking(&mut g);
        }
        g.lost = false;
        g.mode = Mode::Standby;
        self.changed.notify_all();
        while !g.in_flight.is_empty() {
            g.waiters += 1;
            g = self.wait(g);
            g.waiters -= 1;
        }
    }

    /// Standby -> solo.
    pub(crate) fn go_solo(&self) -> Result<()> {
        let mut g = self.lock();
        g.check()?;
        if g.mode == Mode::Tracking {
            return Err(g.wrong("go_solo"));
        }
        g.mode = Mode::Solo;
        Ok(())
    }

    /// Around a flush of the disk: before it.
    pub(crate) fn flush_begins(&self) -> Result<u64> {
        let mut g = self.lock();
        g.check()?;
        g.flush_gen += 1;
        Ok(g.flush_gen)
    }

    /// After it.
    pub(crate) fn flush_ended(&self, generation: u64, r: std::io::Result<()>) -> Result<()> {
        let mut g = self.lock();
        match r {
            Ok(()) => {
                g.flushed_gen = g.flushed_gen.max(generation);
                Ok(())
            }
            Err(e) => {
                let e = DiskError::io("flushing the disk")(e);
                g.fail(&e);
                Err(e)
            }
        }
    }

    pub(crate) fn failed(&self) -> Option<String> {
        self.lock().failed.clone()
    }

    /// Bytes of writes that wait for the standby, and the limit.
    pub(crate) fn held(&self) -> (u64, u64) {
        (self.held.load(Relaxed), self.limit_bytes)
    }
}

impl Inner {
    fn check(&self) -> Result<()> {
        match &self.failed {
            Some(why) => Err(DiskError::Failed(why.clone())),
            None => Ok(()),
        }
    }

    fn fail(&mut self, e: &DiskError) {
        if self.failed.is_none() {
            tracing::error!(error = %e, "the disk failed; nothing more is promised");
            self.failed = Some(e.to_string());
        }
    }

    fn wrong(&self, op: &'static str) -> DiskError {
        DiskError::WrongMode {
            op,
            mode: self.mode.to_string(),
        }
    }

    fn settled(&self) -> Settled {
        Settled {
            epoch: self.acked.min(self.durable),
            flushed_gen: self.flushed_gen,
        }
    }
}
