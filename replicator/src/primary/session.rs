//! One stream to the standby, from the guest's thread's side: numbering, encoding, sending.

use super::sync::Bulk;
use crate::disks::Disks;
use crate::nics::Nics;
use havm_capture::PageSet;
use havm_core::ids::{EpochId, EpochNo};
use havm_core::order::StreamBase;
use havm_disk::{EpochWrites, WriteOp};
use havm_links::outgoing::Outgoing;
use havm_wire::acked::AckLedger;
use havm_wire::back::Back;
use havm_wire::epoch::{Clear, OpenEpoch};
use havm_wire::frame::{Frame, StreamStart};
use havm_wire::page::{PageBatch, PageEncoder, Sent};
use havm_wire::raw::Encoded;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a frame may wait for room in the window. While all links are cut the stream just waits: only
/// an order ends it.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// What a stream starts from.
pub struct Begin {
    /// The stream, with epoch 0.
    pub id: EpochId,
    /// What it announces.
    pub start: StreamStart,
    /// The links.
    pub out: Arc<Outgoing>,
    /// Numbering and acks, shared with the thread that hears the standby.
    pub ledger: Arc<Mutex<AckLedger>>,
    /// Memory for deltas, MiB.
    pub delta_cache_mib: usize,
    /// Epochs are eligible from the first one on (after a handover).
    pub eligible: bool,
}

enum Phase {
    /// Pages and blocks are brought over while the guest runs.
    Bulk(Box<Bulk>),
    /// The first whole epoch is on its way.
    Settling(Option<EpochNo>),
    /// Epoch after epoch.
    Live,
}

/// See the module.
pub struct Session {
    id: EpochId,
    base: StreamBase,
    out: Arc<Outgoing>,
    ledger: Arc<Mutex<AckLedger>>,
    encoder: PageEncoder,
    phase: Phase,
    eligible: bool,
    started: Option<StreamStart>,
}

type Result<T> = std::result::Result<T, String>;

impl Session {
    /// A new stream; nothing is sent yet.
    pub fn new(b: Begin, disks: &Disks) -> Session {
        let base = b.start.base;
        let phase = match base {
            StreamBase::Unknown => Phase::Bulk(Box::new(Bulk::new(disks))),
            StreamBase::Equal => Phase::Live,
        };
        Session {
            id: b.id,
            base,
            out: b.out,
            ledger: b.ledger,
            encoder: PageEncoder::new(b.delta_cache_mib),
            phase,
            eligible: b.eligible,
            started: Some(b.start),
        }
    }

    /// The stream, with epoch 0.
    pub fn id(&self) -> EpochId {
        self.id
    }

    /// All pages count as dirty at first.
    pub fn base_unknown(&self) -> bool {
        self.base == StreamBase::Unknown
    }

    pub(super) fn is_bulk(&self) -> bool {
        matches!(self.phase, Phase::Bulk(_))
    }

    pub(super) fn is_eligible(&self) -> bool {
        self.eligible && matches!(self.phase, Phase::Live)
    }

    pub(super) fn take_bulk(&mut self) -> Option<Box<Bulk>> {
        match std::mem::replace(&mut self.phase, Phase::Settling(None)) {
            Phase::Bulk(b) => Some(b),
            other => {
                self.phase = other;
                None
            }
        }
    }

    pub(super) fn put_bulk(&mut self, b: Box<Bulk>) {
        self.phase = Phase::Bulk(b);
    }

    pub(super) fn acked(&self) -> EpochNo {
        self.ledger().acked()
    }

    pub(super) fn in_flight(&self) -> u64 {
        let l = self.ledger();
        l.closed().0 - l.acked().0
    }

    fn ledger(&self) -> MutexGuard<'_, AckLedger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True once: the first whole epoch came over.
    pub(super) fn settled(&mut self) -> bool {
        match self.phase {
            Phase::Settling(Some(n)) if self.acked() >= n => {
                self.phase = Phase::Live;
                true
            }
            _ => false,
        }
    }

    /// From the next epoch on the standby may become eligible; output is held from now on.
    pub(super) fn arm(&mut self, nics: &Nics) {
        self.eligible = true;
        nics.hold(self.id.stream, self.id.term, self.ledger().closed().next());
    }

    pub(super) fn open(&mut self, bulk: bool) -> Result<OpenEpoch> {
        if let Some(start) = self.started.take() {
            self.frame(&Frame::StreamStart(Box::new(start)))?;
        }
        let mut e = self.ledger().open(bulk).map_err(text)?;
        self.send(e.begin().map_err(text)?)?;
        Ok(e)
    }

    /// Sends the pages of a set, and empties it.
    pub(super) fn pages(&mut self, e: &mut OpenEpoch, pages: &PageSet) -> Result<()> {
        let mut batch: Option<PageBatch> = None;
        for (block, index, page) in pages.iter() {
            if batch
                .as_ref()
                .is_some_and(|b| b.block() != block || b.is_full())
                && let Some(full) = batch.take()
            {
                self.batch(e, full)?;
            }
            let b = batch.get_or_insert_with(|| PageBatch::new(block));
            let _: Sent = self.encoder.push(b, u64::from(index), page);
        }
        match batch {
            Some(b) => self.batch(e, b),
            None => Ok(()),
        }
    }

    fn batch(&self, e: &mut OpenEpoch, b: PageBatch) -> Result<()> {
        if b.is_empty() {
            return Ok(());
        }
        self.send(e.pages(b).map_err(text)?)
    }

    /// Sends the guest's writes of the epoch, disk by disk.
    pub(super) fn writes(&self, e: &mut OpenEpoch, disks: &[EpochWrites]) -> Result<()> {
        for (i, w) in disks.iter().enumerate() {
            for write in &w.writes {
                let disk = i as u16;
                let frames = match &write.op {
                    WriteOp::Data(d) => e.disk_write(disk, write.offset, d),
                    WriteOp::Zero(len) => {
                        e.disk_clear(disk, write.offset, *len, Clear::Zero { punch: true })
                    }
                };
                for f in frames.map_err(text)? {
                    self.send(f)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn sync_block(
        &self,
        e: &mut OpenEpoch,
        disk: u16,
        block: u32,
        data: &[u8],
    ) -> Result<()> {
        self.send(e.disk_sync(disk, u64::from(block), data).map_err(text)?)
    }

    /// Sends the device state, and closes the epoch.
    pub(super) fn close_epoch(
        &mut self,
        mut e: OpenEpoch,
        device_state: Option<&[u8]>,
        shutdown: bool,
    ) -> Result<EpochNo> {
        let n = e.n();
        let eligible = self.eligible && !e.is_bulk();
        if let Some(d) = device_state {
            self.send(e.device_state(d).map_err(text)?)?;
        }
        let end = self.ledger().close(e, eligible, shutdown).map_err(text)?;
        self.send(end)?;
        if let Phase::Settling(first @ None) = &mut self.phase {
            *first = Some(n);
        }
        Ok(n)
    }

    pub(super) fn frame(&self, f: &Frame) -> Result<()> {
        self.send(f.encode().map_err(text)?)
    }

    fn send(&self, e: Encoded) -> Result<()> {
        self.out.send(e, PATIENCE).map_err(text)
    }

    /// A message of the standby that is not an ack.
    pub(super) fn hear(&mut self, back: Back, disks: &Disks) -> Result<()> {
        match &mut self.phase {
            Phase::Bulk(b) => b.hear(back, disks),
            _ => Ok(()),
        }
    }

    /// Ends the stream.
    pub(super) fn close(&self) {
        self.out.abort();
    }
}

/// An error as the text that a person reads.
pub(super) fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
