//! What a primary's replicator sends to the standby's, in one order.
//!
//! ```text
//! StreamStart  ( EpochBegin  ( Pages | DiskSync | DiskWrite | DeviceState )*  EpochEnd )*  Bye
//! ```
//! Requests (`HashRange`, `PeerSetRequest`, `Verify*`) may stand anywhere after `StreamStart`.

use crate::packed::Packed;
use bytes::Bytes;
use havm_core::ids::{EpochNo, GuestName, LifeId, StreamId, Term};
use havm_core::order::StreamBase;

/// Most RAM blocks of a guest.
pub const MAX_BLOCKS: usize = 256;
/// Most disks of a guest.
pub const MAX_DISKS: usize = 64;
/// Longest name of a RAM block or machine type, bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest text for a person, bytes.
pub const MAX_TEXT_BYTES: usize = 1000;
/// Most hashes in one frame.
pub const MAX_HASHES: usize = 64 * 1024;
/// Most bytes one write frame covers where it carries no data (zero, trim).
pub const MAX_EMPTY_WRITE_BYTES: u32 = 1 << 30;

/// A block hash: the first 16 bytes of a BLAKE3.
pub type BlockHash = [u8; 16];

/// A RAM block of the guest, as its QEMU lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name for it (`pc.ram`, `pc.bios`, ...).
    pub name: String,
    /// Length, bytes; a multiple of the page size.
    pub len: u64,
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// In a shared named file (such a block is not part of the promotion stream).
    pub shared: bool,
}

/// A disk of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskShape {
    /// Length, bytes.
    pub size: u64,
    /// Unit of sync, bytes; a power of two from 512 to 1 MiB.
    pub block_bytes: u32,
}

/// The first frame of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamStart {
    /// The guest.
    pub guest: GuestName,
    /// The term.
    pub term: Term,
    /// This capture session.
    pub stream: StreamId,
    /// The primary's life.
    pub my_life: LifeId,
    /// The standby's.
    pub peer_life: LifeId,
    /// What is equal already.
    pub base: StreamBase,
    /// RAM blocks; `Pages::block` is an index into these.
    pub blocks: Vec<RamBlock>,
    /// Disks; `disk` fields are indexes into these.
    pub disks: Vec<DiskShape>,
    /// The versioned machine type, `pc-q35-10.0`.
    pub machine: String,
}

/// What a guest write does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteKind {
    /// Writes these bytes.
    Data(Packed),
    /// Writes `len` zeroes.
    Zero {
        /// The room may be given back to the file system.
        punch: bool,
        /// Bytes.
        len: u32,
    },
    /// Discards `len` bytes; they read as zeroes.
    Trim {
        /// Bytes.
        len: u32,
    },
}

/// A guest's write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWrite {
    /// Which disk.
    pub disk: u16,
    /// Where, bytes.
    pub offset: u64,
    /// What.
    pub kind: WriteKind,
}

impl DiskWrite {
    /// Bytes of disk that it covers.
    pub fn len(&self) -> u64 {
        match &self.kind {
            WriteKind::Data(d) => d.raw_len() as u64,
            WriteKind::Zero { len, .. } | WriteKind::Trim { len } => u64::from(*len),
        }
    }
    /// It covers none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A block brought up to date by sync or resync: applied before the guest writes of its epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSync {
    /// Which disk.
    pub disk: u16,
    /// Which block, in units of the disk's `block_bytes`.
    pub block: u64,
    /// Its content (shorter at the disk's end); none where it is all zero.
    pub data: Option<Packed>,
}

/// Hashes of consecutive disk blocks or pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashRange {
    /// Names the answer.
    pub id: u64,
    /// Disk or RAM block.
    pub object: u16,
    /// First block or page.
    pub first: u64,
    /// One hash each.
    pub hashes: Vec<BlockHash>,
}

/// The end of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochEnd {
    /// Its number.
    pub n: EpochNo,
    /// The standby that has it complete may become eligible, once its record says so (rule 3).
    pub eligible: bool,
    /// The guest shut itself down in this epoch.
    pub shutdown: bool,
    /// What it holds.
    pub tally: Tally,
}

/// Counts and digest of an epoch's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Page entries.
    pub pages: u64,
    /// Guest write frames.
    pub writes: u64,
    /// Sync block frames.
    pub syncs: u64,
    /// Folds kind, length and checksum of each content frame in order.
    pub digest: u64,
}

/// What a primary says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// First.
    StreamStart(Box<StreamStart>),
    /// An epoch opens.
    EpochBegin {
        /// Its number: one more than the last.
        n: EpochNo,
        /// Sync is going on: pages and sync blocks are applied as they come, as nothing of this
        /// image counts yet. Such an epoch is never eligible.
        bulk: bool,
    },
    /// Pages of one RAM block.
    Pages {
        /// Which.
        block: u16,
        /// See [`crate::page`].
        entries: Bytes,
    },
    /// A guest's write.
    DiskWrite(DiskWrite),
    /// A block of sync.
    DiskSync(DiskSync),
    /// The device state at the epoch's end.
    DeviceState(Packed),
    /// The epoch closes.
    EpochEnd(EpochEnd),
    /// Which of these blocks differ on your disk? Answered by [`crate::back::Back::HashReply`].
    HashRange(HashRange),
    /// Which blocks do you know to differ? Answered by [`crate::back::Back::PeerSet`].
    PeerSetRequest {
        /// Which disk.
        disk: u16,
    },
    /// Compare what follows with the image of the last epoch sent. Answered by
    /// [`crate::back::Back::Verified`] after [`Frame::VerifyEnd`].
    VerifyAt {
        /// Names the answer.
        id: u64,
        /// The epoch at which it holds.
        n: EpochNo,
    },
    /// Hashes of pages; `object` is the RAM block.
    VerifyRam(HashRange),
    /// Hashes of disk blocks; `object` is the disk.
    VerifyDisk(HashRange),
    /// The comparison is complete.
    VerifyEnd {
        /// Which.
        id: u64,
    },
    /// The stream ends on purpose.
    Bye {
        /// For a person.
        reason: String,
    },
}

impl Frame {
    /// Its name, for errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Frame::StreamStart(_) => "StreamStart",
            Frame::EpochBegin { .. } => "EpochBegin",
            Frame::Pages { .. } => "Pages",
            Frame::DiskWrite(_) => "DiskWrite",
            Frame::DiskSync(_) => "DiskSync",
            Frame::DeviceState(_) => "DeviceState",
            Frame::EpochEnd(_) => "EpochEnd",
            Frame::HashRange(_) => "HashRange",
            Frame::PeerSetRequest { .. } => "PeerSetRequest",
            Frame::VerifyAt { .. } => "VerifyAt",
            Frame::VerifyRam(_) => "VerifyRam",
            Frame::VerifyDisk(_) => "VerifyDisk",
            Frame::VerifyEnd { .. } => "VerifyEnd",
            Frame::Bye { .. } => "Bye",
        }
    }

    /// Content of an epoch: counted by its [`Tally`].
    pub fn is_content(&self) -> bool {
        matches!(
            self,
            Frame::Pages { .. } | Frame::DiskWrite(_) | Frame::DiskSync(_) | Frame::DeviceState(_)
        )
    }
}
