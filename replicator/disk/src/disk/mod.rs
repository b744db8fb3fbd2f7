//! One guest disk: what the NBD workers, the epoch pump and the standby share.

mod open;

pub use open::{DiskConfig, Stores};

use crate::backing::{Backing, Durability};
use crate::blocks::{BlockSet, blocks_of};
use crate::counters::{Counters, Live, add};
use crate::epoch::{EpochWrites, WriteOp};
use crate::error::{DiskError, Result};
use crate::journal::replay::Replayed;
use crate::meta::Superblock;
use crate::pool::Pool;
use crate::tracker::{Mode, Tracker};
use havm_core::ids::{EpochNo, GenId, StreamId};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// The largest single write, bytes: what an NBD client may send.
pub const MAX_WRITE_BYTES: u64 = 32 << 20;
/// One guest disk. See the crate's page for its states.
#[derive(Debug)]
pub struct Disk {
    pub(crate) tracker: Tracker,
    pub(crate) backing: Arc<Backing>,
    pub(crate) counters: Arc<Live>,
    pub(crate) size: u64,
    pool: Arc<Pool>,
    /// Larger zeroes are cut, so that one request never needs the whole write-intent log.
    zero_piece: u64,
    replayed: Replayed,
    /// The superblock says `inconsistent` already.
    inconsistent: AtomicBool,
    flusher: Mutex<Option<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
}

impl Disk {
    // ---- what it is

    /// Its size, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many 64 KiB blocks it has.
    pub fn blocks(&self) -> u32 {
        blocks_of(self.size)
    }

    /// Its mode.
    pub fn mode(&self) -> Mode {
        self.tracker.mode()
    }

    /// What the replay at open found.
    pub fn replayed(&self) -> Replayed {
        self.replayed
    }

    /// The superblock.
    pub fn superblock(&self) -> Superblock {
        self.tracker.meta().superblock()
    }

    /// Records which data this is, durably (at every take).
    pub fn set_generation(&self, current: GenId, parent: GenId) -> Result<()> {
        self.tracker.meta().update_superblock(|sb| {
            sb.generation = current.0;
            sb.parent = parent.0;
        })
    }

    /// Counters since open.
    pub fn counters(&self) -> Counters {
        self.counters.read()
    }

    /// Why nothing is promised any more: an fsync or a metadata or journal write failed.
    pub fn failed(&self) -> Option<String> {
        self.tracker.failed().or_else(|| self.backing.failed())
    }

    // ---- guest IO

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(DiskError::OutOfRange {
                offset,
                len,
                size: self.size,
            }),
        }
    }

    fn seen<T>(&self, r: Result<T>) -> Result<T> {
        if r.is_err() {
            add(&self.counters.errors, 1);
        }
        r
    }

    /// Reads; served in every mode.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let r = self.check_range(offset, buf.len() as u64).and_then(|()| {
            self.backing
                .read(offset, buf)
                .map_err(DiskError::io("reading the disk"))
        });
        add(&self.counters.reads, 1);
        add(&self.counters.read_bytes, buf.len() as u64);
        self.seen(r)
    }

    /// An empty buffer with room for a write: memory of epochs that are done with, where possible.
    pub fn buffer(&self, len: usize) -> Vec<u8> {
        self.pool.take(len)
    }

    /// Writes, at most [`MAX_WRITE_BYTES`]. The buffer is emptied where the epoch keeps it, and
    /// left alone otherwise.
    pub fn write(&self, offset: u64, buf: &mut Vec<u8>, fua: bool) -> Result<()> {
        let len = buf.len() as u64;
        let r = self.check_range(offset, len).and_then(|()| {
            if len > MAX_WRITE_BYTES {
                return Err(DiskError::OutOfRange {
                    offset,
                    len,
                    size: MAX_WRITE_BYTES,
                });
            }
            if len == 0 {
                return Ok(());
            }
            let t = self.tracker.begin(offset, len)?;
            let done = self.backing.write(offset, buf);
            let op = t
                .keep_data
                .then(|| WriteOp::Data(self.pool.share(std::mem::take(buf))));
            self.tracker.end(t, done.is_ok(), op);
            done?;
            if fua { self.flush_store() } else { Ok(()) }
        });
        add(&self.counters.writes, 1);
        add(&self.counters.write_bytes, len);
        self.seen(r)
    }

    /// Makes a range read as zeroes; with `punch` it may become a hole (a trim, or zeroes without
    /// NO_HOLE).
    pub fn zero(&self, offset: u64, len: u64, punch: bool, fua: bool) -> Result<()> {
        let r = self.check_range(offset, len).and_then(|()| {
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let n = (end - at).min(self.zero_piece);
                let t = self.tracker.begin(at, n)?;
                let done = self.backing.zero(at, n, punch);
                let op = t.keep_data.then_some(WriteOp::Zero(n));
                self.tracker.end(t, done.is_ok(), op);
                done?;
                at += n;
            }
            if fua { self.flush_store() } else { Ok(()) }
        });
        add(&self.counters.writes, 1);
        add(&self.counters.write_bytes, len);
        self.seen(r)
    }

    /// A guest's flush: what was written before it is durable here. Never waits for the standby.
    pub fn flush(&self) -> Result<()> {
        add(&self.counters.flushes, 1);
        if self.mode() == Mode::Standby {
            // Nothing of a guest's is here to be flushed; the journal has its own order.
            return Ok(());
        }
        let r = self.flush_store();
        self.seen(r)
    }

    fn flush_store(&self) -> Result<()> {
        let g = self.tracker.flush_begins()?;
        self.tracker.flush_ended(g, self.backing.flush())
    }

    /// The first range at or after `from`, before `end`, that may hold anything but zeroes.
    pub fn next_data(&self, from: u64, end: u64) -> Result<Option<std::ops::Range<u64>>> {
        if self.backing.covered(from, end) {
            return Ok(Some(from..end));
        }
        self.backing
            .store()
            .next_data(from, end)
            .map_err(DiskError::io("looking for holes"))
    }

    // ---- modes and epochs, primary

    /// Standby (or freshly opened) -> solo: guest writes are taken and marked for the peer.
    pub fn go_solo(&self) -> Result<()> {
        self.backing.seal()?;
        self.tracker.go_solo()
    }

    /// Solo -> tracking: every write from now on is in an epoch, the first being `first`.
    pub fn begin_tracking(&self, stream: StreamId, first: EpochNo) -> Result<()> {
        self.tracker.begin_tracking(stream, first)
    }

    /// Closes the open epoch and opens the next. To be called while the guest's vCPUs stand and
    /// QEMU has drained; a write still in flight (another client's) goes into the next epoch.
    /// [`DiskError::TrackingLost`]: more waited than the hard limit; the disk is solo, the blocks
    /// are marked, the stream must be started anew.
    pub fn barrier(&self) -> Result<EpochWrites> {
        self.tracker.barrier()
    }

    /// The standby acked all epochs up to `n`.
    pub fn acked(&self, n: EpochNo) {
        self.tracker.acked(n);
    }

    /// The standby reported all epochs up to `n` durable.
    pub fn peer_durable(&self, n: EpochNo) {
        self.tracker.peer_durable(n);
    }

    /// Tracking -> solo: what is not durable at the peer is marked.
    pub fn end_tracking(&self) -> Result<()> {
        self.tracker.end_tracking()
    }

    /// More guest writes wait for the standby than the limit: close epochs faster, or throttle.
    pub fn over_limit(&self) -> bool {
        let (held, limit) = self.tracker.held();
        held > limit
    }

    /// Bytes of guest writes held for the standby, in open and closed epochs.
    pub fn held_bytes(&self) -> u64 {
        self.tracker.held().0
    }

    // ---- standby

    /// Solo or tracking -> standby. The marks stay: they are this side's part of the resync set.
    /// Waits for writes in flight, and for the journal of an earlier promotion.
    pub fn become_standby(&self) -> Result<()> {
        self.tracker.become_standby();
        self.flush_store()?;
        self.backing.unseal()
    }

    fn standby(&self, op: &'static str) -> Result<()> {
        match self.mode() {
            Mode::Standby => Ok(()),
            m => Err(DiskError::WrongMode {
                op,
                mode: m.to_string(),
            }),
        }
    }

    /// A stream begins; its first epoch is the one after `last`. What an older stream staged and
    /// did not commit never happened.
    pub fn begin_receiving(&self, stream: StreamId, last: EpochNo) -> Result<()> {
        self.standby("begin_receiving")?;
        self.backing.new_stream(stream, last)
    }

    /// Appends an epoch to the journal: it outlives this process, and is not visible yet. Waits
    /// while the journal is full.
    pub fn stage(&self, e: &Arc<EpochWrites>) -> Result<()> {
        self.standby("stage")?;
        self.backing.stage(e)
    }

    /// Makes staged epochs up to `n` the disk's content, all or (at a crash) none. With
    /// [`Durability::Disk`] returns once they are durable.
    pub fn commit(&self, n: EpochNo, durability: Durability) -> Result<()> {
        self.standby("commit")?;
        self.backing.commit(n, durability)
    }

    /// Stages and commits in one step.
    pub fn commit_epochs(&self, epochs: &[Arc<EpochWrites>], d: Durability) -> Result<()> {
        let Some(last) = epochs.last() else {
            return Ok(());
        };
        epochs.iter().try_for_each(|e| self.stage(e))?;
        self.commit(last.epoch, d)
    }

    /// Writes a not eligible epoch in place, without the journal. The disk is marked inconsistent
    /// durably first.
    pub fn commit_direct(&self, e: &EpochWrites) -> Result<()> {
        self.standby("commit_direct")?;
        self.mark_inconsistent()?;
        self.backing.commit_direct(e)
    }

    /// The last epoch committed, and the last that a power failure here cannot take back.
    pub fn progress(&self) -> (EpochNo, EpochNo) {
        self.backing.progress()
    }

    /// The last epoch that a power failure here cannot take back.
    pub fn durable_upto(&self) -> EpochNo {
        self.progress().1
    }

    /// Stops committing; returns the last committed epoch. Costs one small journal record.
    pub fn seal(&self) -> Result<EpochNo> {
        self.standby("seal")?;
        self.backing.seal()
    }

    /// Sealed standby -> solo, at once, whatever the backlog. Follow with
    /// [`Disk::flush_after_promotion`].
    pub fn promote(&self) -> Result<EpochNo> {
        if !self.is_consistent() {
            tracing::warn!("promoting a copy that is in the middle of a sync");
        }
        let n = self.seal()?;
        self.tracker.go_solo()?;
        Ok(n)
    }

    /// Makes all that was committed before the promotion durable in place. After it the record may
    /// say `cold`. Takes as long as the backlog; the guest writes meanwhile.
    pub fn flush_after_promotion(&self) -> Result<()> {
        self.backing.settle()?;
        self.flush_store()
    }

    /// Whether this copy is one consistent state (not in the middle of a sync).
    pub fn is_consistent(&self) -> bool {
        !self.inconsistent.load(SeqCst)
    }

    pub(crate) fn mark_inconsistent(&self) -> Result<()> {
        if !self.inconsistent.load(SeqCst) {
            self.tracker
                .meta()
                .update_superblock(|sb| sb.inconsistent = true)?;
            self.inconsistent.store(true, SeqCst);
        }
        Ok(())
    }

    /// The sync is complete and the copy is the primary's state at an epoch: flushes, and says so
    /// durably.
    pub fn mark_consistent(&self) -> Result<()> {
        if self.is_consistent() {
            return Ok(());
        }
        self.backing.drain_or_sync()?;
        self.tracker
            .meta()
            .update_superblock(|sb| sb.inconsistent = false)?;
        self.inconsistent.store(false, SeqCst);
        Ok(())
    }

    // ---- what differs

    /// The blocks that may differ from the peer's and are in no epoch. The resync set is the union
    /// of both sides' (rule 14).
    pub fn out_of_sync(&self) -> BlockSet {
        self.tracker.dirty()
    }

    /// The size of [`Disk::out_of_sync`], bytes.
    pub fn out_of_sync_bytes(&self) -> u64 {
        self.tracker.dirty_bytes()
    }

    /// Adds blocks (the peer's set, or all), durably.
    pub fn mark_out_of_sync(&self, set: &BlockSet) -> Result<()> {
        self.tracker.mark(set)
    }

    /// Primary: the standby has these blocks as they were in `epoch` (sent in it, or found equal).
    /// They count as equal once that epoch is durable there.
    pub fn synced(&self, blocks: &[u32], epoch: EpochNo) -> Result<()> {
        self.tracker.synced(blocks, epoch)
    }

    /// Takes all marks off. Only where both copies are known to be equal *and durable*: on a
    /// standby after a full resync whose last epoch is durable here, with the primary's flush
    /// after promotion reported.
    pub fn forget_differences(&self) -> Result<()> {
        self.flush_store()?;
        self.tracker.forget_differences()
    }

    /// Flushes, and shrinks the log and bitmap to what is really open. The flusher of a primary
    /// does it every minute.
    pub fn tidy(&self) -> Result<()> {
        self.flush_store()?;
        self.tracker.tidy()
    }

    /// A clean end: everything durable, the log empty, so that the next open knows exactly what
    /// differs. No guest IO may come any more.
    pub fn close(&self) -> Result<()> {
        self.stop_flusher();
        if self.mode() == Mode::Tracking {
            self.tracker.end_tracking()?;
        }
        self.backing.drain_or_sync()?;
        self.flush_store()?;
        self.tracker.close()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.stop_flusher();
    }
}
