//! What the standby's threads share: the queue of work in stream order, and how far it has come.

use havm_core::ids::{EpochId, EpochNo, LifeId};
use havm_image::RamImage;
use havm_wire::assemble::CompleteEpoch;
use havm_wire::frame::{Frame, StreamStart};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Staged bytes over which the receiver waits for the committer.
const MAX_QUEUED_BYTES: usize = 256 << 20;

/// Work for the committer, in the order of the stream.
pub(super) enum Work {
    /// A stream begins.
    Begin(Box<StreamStart>),
    /// Bulk content, applied at once.
    Direct(Frame),
    /// A complete epoch, and its size in bytes.
    Commit(Box<CompleteEpoch>, usize),
    /// A question that is answered from the state so far.
    Request(Frame),
    /// The image moves into this fresh waiting QEMU's RAM.
    Rehome(RamImage),
}

impl Work {
    fn bytes(&self) -> usize {
        match self {
            Work::Direct(Frame::Pages { entries, .. }) => entries.len(),
            Work::Direct(Frame::DiskSync(s)) => s.data.as_ref().map_or(0, |d| d.packed_len()),
            Work::Commit(_, bytes) => *bytes,
            _ => 0,
        }
    }
}

/// How far the copy has come.
#[derive(Default)]
pub(super) struct Progress {
    pub queue: VecDeque<Work>,
    pub queued_bytes: usize,
    /// The committer works on an item that it took out of the queue.
    pub busy: bool,
    /// The record says eligible: acks may be sent.
    pub confirmed: bool,
    /// No commit and no ack any more.
    pub sealed: bool,
    /// The last complete eligible epoch, staged or committed.
    pub complete: Option<EpochId>,
    /// The last committed one.
    pub committed: EpochNo,
    /// The last acked one.
    pub acked: EpochNo,
    /// A shutdown of the guest was committed: this image is never run.
    pub guest_shut_down: bool,
    /// The first eligible epoch is committed, and was reported.
    pub image_reported: bool,
    /// The copy is spoilt or given up.
    pub end: bool,
}

/// See the module.
pub(super) struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    pub life: LifeId,
    /// Acks wait for the disk.
    pub ack_after_commit: bool,
}

impl Shared {
    pub(super) fn new(life: LifeId, ack_after_commit: bool, confirmed: bool) -> Shared {
        let progress = Progress {
            confirmed,
            ..Progress::default()
        };
        Shared {
            progress: Mutex::new(progress),
            changed: Condvar::new(),
            life,
            ack_after_commit,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Queues work; waits while too much is queued. `complete`: the work is this eligible epoch. False when
    /// the copy was sealed or ended.
    pub(super) fn push(&self, work: Work, complete: Option<EpochId>) -> bool {
        let mut p = self.lock();
        // A sealed image still moves into a waiting QEMU: its promotion waits for that.
        let moves = matches!(work, Work::Rehome(_));
        while p.queued_bytes > MAX_QUEUED_BYTES && !p.sealed && !p.end {
            p = self.changed.wait(p).unwrap_or_else(PoisonError::into_inner);
        }
        if (p.sealed && !moves) || p.end {
            return false;
        }
        p.queued_bytes += work.bytes();
        p.queue.push_back(work);
        p.complete = complete.or(p.complete);
        self.notify();
        true
    }

    /// The next item, for the committer; `None` where none came in time.
    pub(super) fn pop(&self, patience: Duration) -> Option<Work> {
        let mut p = self.lock();
        p.busy = false;
        self.notify();
        if p.queue.is_empty() && !p.end {
            p = self
                .changed
                .wait_timeout(p, patience)
                .map_or_else(|e| e.into_inner().0, |(g, _)| g);
        }
        let work = p.queue.pop_front()?;
        p.queued_bytes = p.queued_bytes.saturating_sub(work.bytes());
        p.busy = true;
        self.notify();
        Some(work)
    }

    /// Waits until nothing is queued or in work.
    pub(super) fn drain(&self) {
        let mut p = self.lock();
        while (p.busy || !p.queue.is_empty()) && !p.end {
            p = self
                .changed
                .wait_timeout(p, Duration::from_millis(100))
                .map_or_else(|e| e.into_inner().0, |(g, _)| g);
        }
    }
}
