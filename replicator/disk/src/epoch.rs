//! The disk's part of an epoch: what the guest wrote between two barriers, in order.

use crate::blocks::{BlockSet, span};
use bytes::Bytes;
use havm_core::ids::EpochNo;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a write does to its range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteOp {
    /// These bytes.
    Data(Bytes),
    /// This many zero bytes (a trim, or zeroes written): a hole where the disk can have one.
    Zero(u64),
}

/// One write of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWrite {
    /// Where it begins, bytes.
    pub offset: u64,
    /// What it does.
    pub op: WriteOp,
}

impl DiskWrite {
    /// Bytes that it covers.
    pub fn len(&self) -> u64 {
        match &self.op {
            WriteOp::Data(d) => d.len() as u64,
            WriteOp::Zero(n) => *n,
        }
    }

    /// Whether it covers nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len())
    }
}

/// Bytes held for the standby; given back when the epoch that holds them is dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    pub(crate) used: Arc<AtomicU64>,
    pub(crate) bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Relaxed);
    }
}

/// All writes of one epoch, in an order whose effect is that on the primary's disk. Share it by
/// `Arc`; its memory counts against the primary's limit until the last owner lets go.
#[derive(Debug)]
pub struct EpochWrites {
    /// The epoch.
    pub epoch: EpochNo,
    /// Its writes.
    pub writes: Vec<DiskWrite>,
    _charge: Option<Charge>,
}

impl EpochWrites {
    /// An epoch as it came over the wire.
    pub fn new(epoch: EpochNo, writes: Vec<DiskWrite>) -> Self {
        EpochWrites {
            epoch,
            writes,
            _charge: None,
        }
    }

    pub(crate) fn charged(epoch: EpochNo, writes: Vec<DiskWrite>, charge: Charge) -> Self {
        EpochWrites {
            epoch,
            writes,
            _charge: Some(charge),
        }
    }

    /// Bytes of data that it carries (zeroes carry none).
    pub fn data_bytes(&self) -> u64 {
        self.writes
            .iter()
            .map(|w| match &w.op {
                WriteOp::Data(d) => d.len() as u64,
                WriteOp::Zero(_) => 0,
            })
            .sum()
    }

    /// The blocks that it touches, over a disk of `blocks` blocks.
    pub fn blocks(&self, blocks: u32) -> BlockSet {
        let mut set = BlockSet::new(blocks);
        for w in self.writes.iter().filter(|w| !w.is_empty()) {
            let (a, b) = span(w.offset, w.len());
            set.insert_span(a, b);
        }
        set
    }
}
