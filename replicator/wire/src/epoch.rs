//! An epoch being made on the primary: its frames, counted as they are made.
//!
//! ```text
//! AckLedger::open -> OpenEpoch ── begin, disk_sync*, pages*, disk_write*, device_state ──> AckLedger::close -> EpochEnd
//! ```
//! The frames must be queued in the order in which these methods made them. An epoch that is not
//! closed ends the stream.

use crate::decode::kind;
use crate::frame::{DiskSync, DiskWrite, Frame, MAX_EMPTY_WRITE_BYTES, Tally, WriteKind};
use crate::packed::Packed;
use crate::page::PageBatch;
use crate::raw::{Encoded, GOOD_PAYLOAD_BYTES, TooLarge};
use havm_core::ids::EpochNo;

/// Why a piece of an epoch cannot travel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EpochError {
    /// Over a bound of the wire.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The device state is out of all proportion.
    #[error(
        "the guest's device state has {0} bytes, at most {max} travel: this guest cannot be protected",
        max = Packed::MAX_RAW_BYTES
    )]
    DeviceState(usize),
    /// A sync block is larger than a frame.
    #[error("a disk block of {0} bytes does not fit a frame: use smaller sync blocks")]
    SyncBlock(usize),
    /// A device state was put into the epoch already.
    #[error("an epoch has one device state, and this one has it already")]
    SecondDeviceState,
}

/// An epoch that is not complete yet.
#[derive(Debug)]
pub struct OpenEpoch {
    n: EpochNo,
    bulk: bool,
    tally: Tally,
    has_device_state: bool,
    wire_bytes: u64,
}

impl Tally {
    /// Takes a content frame into account.
    pub(crate) fn fold(&mut self, kind: u8, len: usize, crc: u32) {
        let word = u64::from(kind) << 56 ^ (len as u64) << 32 ^ u64::from(crc);
        self.digest = (self.digest.rotate_left(17) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl OpenEpoch {
    pub(crate) fn new(n: EpochNo, bulk: bool) -> Self {
        OpenEpoch {
            n,
            bulk,
            tally: Tally::default(),
            has_device_state: false,
            wire_bytes: 0,
        }
    }

    /// Its number.
    pub fn n(&self) -> EpochNo {
        self.n
    }
    /// See [`Frame::EpochBegin`].
    pub fn is_bulk(&self) -> bool {
        self.bulk
    }
    /// What was made so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }
    /// Bytes of all frames made so far, before encryption.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }
    pub(crate) fn has_device_state(&self) -> bool {
        self.has_device_state
    }

    /// The frame that opens it; queue it before all others.
    pub fn begin(&mut self) -> Result<Encoded, EpochError> {
        let e = Frame::EpochBegin {
            n: self.n,
            bulk: self.bulk,
        }
        .encode()?;
        self.wire_bytes += e.wire_bytes() as u64;
        Ok(e)
    }

    /// A batch of pages.
    pub fn pages(&mut self, batch: PageBatch) -> Result<Encoded, EpochError> {
        self.tally.pages += batch.count();
        let e = batch.into_encoded()?;
        Ok(self.counted(e))
    }

    /// A guest's write of data, in as many frames as it needs.
    pub fn disk_write(
        &mut self,
        disk: u16,
        offset: u64,
        data: &[u8],
    ) -> Result<Vec<Encoded>, EpochError> {
        let mut out = Vec::new();
        let mut at = offset;
        for part in data.chunks(GOOD_PAYLOAD_BYTES) {
            let packed = Packed::pack(part).ok_or(EpochError::SyncBlock(part.len()))?;
            out.push(self.write(DiskWrite {
                disk,
                offset: at,
                kind: WriteKind::Data(packed),
            })?);
            at = at.saturating_add(part.len() as u64);
        }
        Ok(out)
    }

    /// A guest's write of zeroes (`punch`: their room may be given back), or a trim.
    pub fn disk_clear(
        &mut self,
        disk: u16,
        offset: u64,
        len: u64,
        how: Clear,
    ) -> Result<Vec<Encoded>, EpochError> {
        let mut out = Vec::new();
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let len = left.min(u64::from(MAX_EMPTY_WRITE_BYTES)) as u32;
            let kind = match how {
                Clear::Zero { punch } => WriteKind::Zero { punch, len },
                Clear::Trim => WriteKind::Trim { len },
            };
            out.push(self.write(DiskWrite {
                disk,
                offset: at,
                kind,
            })?);
            at = at.saturating_add(u64::from(len));
            left -= u64::from(len);
        }
        Ok(out)
    }

    /// A block of sync: applied before the epoch's guest writes, whichever comes first.
    pub fn disk_sync(&mut self, disk: u16, block: u64, data: &[u8]) -> Result<Encoded, EpochError> {
        let data = if data.iter().all(|b| *b == 0) {
            None
        } else {
            Some(Packed::pack(data).ok_or(EpochError::SyncBlock(data.len()))?)
        };
        self.tally.syncs += 1;
        let e = Frame::DiskSync(DiskSync { disk, block, data }).encode()?;
        Ok(self.counted(e))
    }

    /// The device state at the epoch's end: one, and last.
    pub fn device_state(&mut self, state: &[u8]) -> Result<Encoded, EpochError> {
        if std::mem::replace(&mut self.has_device_state, true) {
            return Err(EpochError::SecondDeviceState);
        }
        let packed = Packed::pack(state).ok_or(EpochError::DeviceState(state.len()))?;
        let e = Frame::DeviceState(packed).encode()?;
        Ok(self.counted(e))
    }

    fn write(&mut self, write: DiskWrite) -> Result<Encoded, EpochError> {
        self.tally.writes += 1;
        let e = Frame::DiskWrite(write).encode()?;
        Ok(self.counted(e))
    }

    fn counted(&mut self, e: Encoded) -> Encoded {
        debug_assert!((kind::PAGES..=kind::DEVICE_STATE).contains(&e.kind()));
        self.tally.fold(e.kind(), e.payload().len(), e.crc());
        self.wire_bytes += e.wire_bytes() as u64;
        e
    }
}

/// How a range is cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clear {
    /// Written with zeroes.
    Zero {
        /// Their room may be given back.
        punch: bool,
    },
    /// Discarded.
    Trim,
}
