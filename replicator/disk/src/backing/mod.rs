//! The disk with its journal in front: what a standby commits, and what is left of that after
//! promotion.
//!
//! ```text
//!   stage ──> journal record ──(commit)──> visible (overlay) ──(journal fsynced)──> in place
//!                                                                    └─> durable_upto    │
//!                            segment free <──(disk flushed, header reset, fsynced) <─────┘
//! ```
//! No byte of an epoch reaches its place before the epoch's record is durable, so at any crash the
//! disk plus the journal's prefix is one committed state. With `Durability::Memory` a commit does
//! not wait for that: until then reads look into the overlay.
//!
//! **Promotion** costs one small record (a seal: what was staged and not committed never happened).
//! From then on, guest writes:
//! - go through the journal while the seal is not durable (else a power loss could keep them
//!   and lose the epoch below them), a matter of one fsync;
//! - later only where the journal still holds their blocks (else a replay would undo them);
//! - straight to the disk everywhere else, and everywhere once the journal is empty.
//!
//! A guest flush meanwhile flushes the journal and the disk; it never waits for the backlog.

mod flusher;

use crate::blocks::{BlockSet, blocks_of, span};
use crate::counters::{Live, add};
use crate::epoch::{DiskWrite, EpochWrites, WriteOp};
use crate::error::{DiskError, Result};
use crate::journal::record::{Head, Kind};
use crate::journal::replay::{self, Files, Replayed};
use crate::journal::segment::{RECORDS_AT, Segment};
use crate::overlay::Overlay;
use crate::store::Store;
use havm_core::ids::{EpochNo, StreamId};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

/// When a committed epoch counts as such on the standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// Once it is in the journal's page cache: survives the replicator, not the machine.
    Memory,
    /// Once the journal is fsynced.
    Disk,
}

#[derive(Debug)]
struct Rec {
    seq: u64,
    segment: usize,
    epoch: u64,
    writes: Arc<EpochWrites>,
}

#[derive(Debug)]
struct State {
    segments: [Segment; 2],
    current: usize,
    next_seq: u64,
    chain: u32,
    stream: Option<StreamId>,
    /// Appended, not committed.
    staged: VecDeque<Rec>,
    /// Committed, not in place.
    pending: VecDeque<Rec>,
    /// Per segment, the blocks that a replay of it would write.
    held: [BlockSet; 2],
    committed: u64,
    durable: u64,
    synced_seq: u64,
    sealed: bool,
    seal_seq: u64,
    /// Written in place without the journal and not flushed since.
    disk_unflushed: bool,
    /// Last epoch committed without the journal.
    direct: u64,
    failed: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Backing {
    store: Arc<dyn Store>,
    size: u64,
    state: Mutex<State>,
    changed: Condvar,
    overlay: RwLock<Overlay>,
    /// The journal or the overlay holds something: reads and writes must look.
    active: AtomicBool,
    sealing: AtomicBool,
    /// One at a time moves the journal on.
    stepping: Mutex<()>,
    segment_bytes: u64,
    counters: Arc<Live>,
}

impl Backing {
    /// Replays what the journal holds and opens it empty.
    pub(crate) fn open(
        store: Arc<dyn Store>,
        size: u64,
        journal: Files,
        upto: Option<(StreamId, EpochNo)>,
        counters: Arc<Live>,
    ) -> Result<(Self, Replayed)> {
        let segment_bytes = journal.segment_bytes;
        let (segments, done, next_seq) = replay::open(&*store, size, journal, upto)?;
        let state = State {
            segments,
            current: 0,
            next_seq,
            chain: 0,
            stream: None,
            staged: VecDeque::new(),
            pending: VecDeque::new(),
            held: [
                BlockSet::new(blocks_of(size)),
                BlockSet::new(blocks_of(size)),
            ],
            committed: 0,
            durable: 0,
            synced_seq: next_seq - 1,
            sealed: false,
            seal_seq: 0,
            disk_unflushed: false,
            direct: 0,
            failed: None,
        };
        let me = Backing {
            store,
            size,
            state: Mutex::new(state),
            changed: Condvar::new(),
            overlay: RwLock::default(),
            active: AtomicBool::new(false),
            sealing: AtomicBool::new(false),
            stepping: Mutex::new(()),
            segment_bytes,
            counters,
        };
        Ok((me, done))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Reads what is committed.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if !self.active.load(SeqCst) {
            return self.store.read_at(offset, buf);
        }
        // Held over both steps: a piece leaves the overlay only after it is in place.
        let overlay = self.overlay.read().unwrap_or_else(PoisonError::into_inner);
        self.store.read_at(offset, buf)?;
        overlay.patch(offset, buf);
        Ok(())
    }

    /// Whether reads of this range must look into the overlay.
    pub(crate) fn covered(&self, start: u64, end: u64) -> bool {
        self.active.load(SeqCst)
            && self
                .overlay
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .touches(start, end)
    }

    /// A guest's write.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let op = || WriteOp::Data(bytes::Bytes::copy_from_slice(data));
        if self.active.load(SeqCst) && self.journal_guest_write(offset, data.len() as u64, op)? {
            return Ok(());
        }
        self.store
            .write_at(offset, data)
            .map_err(DiskError::io("writing the disk"))
    }

    /// A guest's zeroes or trim.
    pub(crate) fn zero(&self, offset: u64, len: u64, punch: bool) -> Result<()> {
        if self.active.load(SeqCst)
            && self.journal_guest_write(offset, len, || WriteOp::Zero(len))?
        {
            return Ok(());
        }
        self.store
            .zero_at(offset, len, punch)
            .map_err(DiskError::io("zeroing the disk"))
    }

    /// Makes what the guest wrote durable, wherever it is.
    pub(crate) fn flush(&self) -> std::io::Result<()> {
        if self.active.load(SeqCst) {
            self.sync_journal().map_err(std::io::Error::other)?;
        }
        self.store.flush()
    }

    /// True where the write went into the journal.
    fn journal_guest_write(
        &self,
        offset: u64,
        len: u64,
        op: impl FnOnce() -> WriteOp,
    ) -> Result<bool> {
        let mut g = self.lock();
        g.check()?;
        let (first, last) = span(offset, len.max(1));
        if g.synced_seq >= g.seal_seq && !g.held.iter().any(|h| h.intersects_span(first, last)) {
            return Ok(false);
        }
        let w = DiskWrite { offset, op: op() };
        let writes = Arc::new(EpochWrites::new(EpochNo(0), vec![w]));
        if let Some(rec) = self.append(&mut g, Kind::Guest, 0, writes, || false)? {
            let mut o = self.overlay.write().unwrap_or_else(PoisonError::into_inner);
            rec.writes.writes.iter().for_each(|w| o.insert(w, rec.seq));
            g.pending.push_back(rec);
        }
        self.changed.notify_all();
        Ok(true)
    }

    fn append(
        &self,
        g: &mut State,
        kind: Kind,
        epoch: u64,
        writes: Arc<EpochWrites>,
        stop: impl Fn() -> bool,
    ) -> Result<Option<Rec>> {
        let cur = g.current;
        if !g.segments[cur].head.in_use {
            let (seq, chain) = (g.next_seq, g.chain);
            let r = g.segments[cur].set_head(true, seq, chain);
            g.note(r)?;
        } else if g.segments[cur].full(self.segment_bytes) && !g.segments[1 - cur].head.in_use {
            let (seq, chain) = (g.next_seq, g.chain);
            let r = g.segments[1 - cur].set_head(true, seq, chain);
            g.note(r)?;
            g.current = 1 - cur;
        }
        let cur = g.current;
        let head = Head {
            kind,
            seq: g.next_seq,
            chain: g.chain,
            crc: 0,
            stream: g.stream.map_or([0; 16], |s| s.0),
            epoch,
            payload: 0,
            entries: 0,
        };
        let before = g.segments[cur].tail;
        let r = g.segments[cur].append(head, &writes.writes, stop);
        let Some(head) = g.note(r)? else {
            return Ok(None);
        };
        add(&self.counters.journal_bytes, g.segments[cur].tail - before);
        g.chain = head.crc;
        g.next_seq += 1;
        for w in writes.writes.iter().filter(|w| !w.is_empty()) {
            let (first, last) = span(w.offset, w.len());
            g.held[cur].insert_span(first, last);
        }
        self.active.store(true, SeqCst);
        Ok(Some(Rec {
            seq: head.seq,
            segment: cur,
            epoch,
            writes,
        }))
    }

    /// A new stream: what an older one staged never happened.
    pub(crate) fn new_stream(&self, stream: StreamId, last: EpochNo) -> Result<()> {
        let mut g = self.lock();
        g.check()?;
        if g.sealed {
            return Err(DiskError::Sealed);
        }
        self.drop_staged(&mut g)?;
        g.stream = Some(stream);
        g.committed = last.0;
        g.durable = last.0;
        g.direct = last.0;
        Ok(())
    }

    fn drop_staged(&self, g: &mut State) -> Result<()> {
        let Some(first) = g.staged.front().map(|r| r.seq) else {
            return Ok(());
        };
        let empty = Arc::new(EpochWrites::new(EpochNo(0), Vec::new()));
        if let Some(rec) = self.append(g, Kind::Drop, first - 1, empty, || false)? {
            g.staged.clear();
            g.pending.push_back(rec);
        }
        Ok(())
    }

    /// Appends an epoch to the journal. Waits while the journal is full. The writes must lie
    /// inside the disk.
    pub(crate) fn stage(&self, e: &Arc<EpochWrites>) -> Result<()> {
        if e.writes.iter().any(|w| w.end() > self.size) {
            return Err(DiskError::BadWire("an epoch that writes outside the disk"));
        }
        let mut g = self.lock();
        loop {
            g.check()?;
            if g.sealed {
                return Err(DiskError::Sealed);
            }
            let cur = &g.segments[g.current];
            if !cur.full(self.segment_bytes)
                || !g.segments[1 - g.current].head.in_use
                || !g.has_work()
            {
                break;
            }
            self.changed.notify_all();
            g = self.changed.wait(g).unwrap_or_else(PoisonError::into_inner);
        }
        let last = g.staged.back().map_or(g.committed, |r| r.epoch);
        if e.epoch.0 != last + 1 {
            return Err(DiskError::OutOfOrder {
                last,
                got: e.epoch.0,
            });
        }
        let sealing = || self.sealing.load(SeqCst);
        match self.append(&mut g, Kind::Epoch, e.epoch.0, e.clone(), sealing)? {
            Some(rec) => g.staged.push_back(rec),
            None => return Err(DiskError::Sealed),
        }
        Ok(())
    }

    /// Makes staged epochs up to `n` visible.
    pub(crate) fn commit(&self, n: EpochNo, durability: Durability) -> Result<()> {
        let mut g = self.lock();
        g.check()?;
        if g.sealed {
            return Err(DiskError::Sealed);
        }
        let last = g.staged.back().map_or(g.committed, |r| r.epoch);
        if n.0 > last {
            return Err(DiskError::OutOfOrder { last, got: n.0 });
        }
        let mut seq = 0;
        {
            let mut o = self.overlay.write().unwrap_or_else(PoisonError::into_inner);
            while g.staged.front().is_some_and(|r| r.epoch <= n.0) {
                let Some(rec) = g.staged.pop_front() else {
                    break;
                };
                rec.writes.writes.iter().for_each(|w| o.insert(w, rec.seq));
                seq = rec.seq;
                g.committed = rec.epoch;
                add(&self.counters.commits, 1);
                g.pending.push_back(rec);
            }
        }
        drop(g);
        self.changed.notify_all();
        if durability == Durability::Disk && seq > 0 {
            self.sync_journal()?;
        }
        Ok(())
    }

    /// Writes epochs in place, without the journal: for a copy that is not consistent anyway. The
    /// caller has said so durably. Waits for the journal to be empty.
    pub(crate) fn commit_direct(&self, e: &EpochWrites) -> Result<()> {
        if e.writes.iter().any(|w| w.end() > self.size) {
            return Err(DiskError::BadWire("an epoch that writes outside the disk"));
        }
        self.direct_begins()?;
        {
            let g = self.lock();
            let last = g.staged.back().map_or(g.committed, |r| r.epoch);
            if e.epoch.0 != last + 1 {
                return Err(DiskError::OutOfOrder {
                    last,
                    got: e.epoch.0,
                });
            }
        }
        for w in &e.writes {
            self.put(w)?;
        }
        let mut g = self.lock();
        g.committed = e.epoch.0;
        g.direct = e.epoch.0;
        g.disk_unflushed = true;
        Ok(())
    }

    /// Before anything is written in place without the journal.
    pub(crate) fn direct_begins(&self) -> Result<()> {
        if self.lock().sealed {
            return Err(DiskError::Sealed);
        }
        self.drain()?;
        self.lock().disk_unflushed = true;
        Ok(())
    }

    /// One write in place.
    pub(crate) fn put(&self, w: &DiskWrite) -> Result<()> {
        match &w.op {
            WriteOp::Data(d) => self.store.write_at(w.offset, d),
            WriteOp::Zero(n) => self.store.zero_at(w.offset, *n, true),
        }
        .map_err(DiskError::io("writing the disk"))
    }

    /// Stops committing for good (until [`Backing::unseal`]). Returns the last committed epoch.
    pub(crate) fn seal(&self) -> Result<EpochNo> {
        self.sealing.store(true, SeqCst);
        let mut g = self.lock();
        g.check()?;
        if !g.sealed {
            self.drop_staged(&mut g)?;
            g.sealed = true;
            // Where the journal is empty there is nothing that guest writes would have to wait for.
            g.seal_seq = g.next_seq - 1;
        }
        self.changed.notify_all();
        Ok(EpochNo(g.committed))
    }

    /// A standby again: the journal is emptied, epochs may be staged.
    pub(crate) fn unseal(&self) -> Result<()> {
        self.drain()?;
        self.sealing.store(false, SeqCst);
        let mut g = self.lock();
        g.sealed = false;
        Ok(())
    }

    /// The last epoch committed, and the last whose loss a power failure here cannot cause.
    pub(crate) fn progress(&self) -> (EpochNo, EpochNo) {
        let g = self.lock();
        (EpochNo(g.committed), EpochNo(g.durable.min(g.committed)))
    }

    pub(crate) fn failed(&self) -> Option<String> {
        self.lock().failed.clone()
    }
}

impl State {
    fn check(&self) -> Result<()> {
        match &self.failed {
            Some(why) => Err(DiskError::Failed(why.clone())),
            None => Ok(()),
        }
    }

    fn note<T>(&mut self, r: Result<T>) -> Result<T> {
        if let Err(e) = &r
            && self.failed.is_none()
        {
            tracing::error!(error = %e, "the disk or its journal failed");
            self.failed = Some(e.to_string());
        }
        r
    }

    fn has_work(&self) -> bool {
        let other = 1 - self.current;
        let freeable =
            self.segments[other].head.in_use && !self.staged.iter().any(|r| r.segment == other);
        self.failed.is_none()
            && (!self.pending.is_empty()
                || freeable
                || self.sealed && self.segments[self.current].tail > RECORDS_AT)
    }
}
