//! The format of a journal record.
//!
//! Head (64 bytes): magic u32, kind u8, 3 bytes 0, seq u64, chain u32, checksum u32, stream 16
//! bytes, epoch u64, payload bytes u64, entries u32, 4 bytes 0. Payload: entries of (offset u64,
//! length u64, top bit set for zeroes), then the data of all entries in order. The checksum covers
//! head (itself as 0) and payload.

use crate::epoch::{DiskWrite, WriteOp};

/// Bytes of a record's head.
pub(crate) const HEAD: usize = 64;
/// Bytes of one entry.
pub(crate) const ENTRY: usize = 16;
const MAGIC: u32 = 0x524a_5648;
const ZERO_BIT: u64 = 1 << 63;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The writes of one epoch.
    Epoch,
    /// A write of the guest after promotion, over blocks that the journal still holds.
    Guest,
    /// Epoch records after sequence number `epoch` (the field) and before this one never happened.
    Drop,
}

/// A record's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// Its number; the chain has no gaps.
    pub seq: u64,
    /// Checksum of the record before it.
    pub chain: u32,
    /// Its own.
    pub crc: u32,
    /// The stream of an epoch.
    pub stream: [u8; 16],
    /// The epoch's number, or for [`Kind::Drop`] the last sequence number that counts.
    pub epoch: u64,
    /// Bytes after the head.
    pub payload: u64,
    /// How many writes.
    pub entries: u32,
}

impl Head {
    /// The bytes, with the checksum as it stands.
    pub(crate) fn encode(&self) -> [u8; HEAD] {
        let mut o = [0u8; HEAD];
        o[..4].copy_from_slice(&MAGIC.to_le_bytes());
        o[4] = match self.kind {
            Kind::Epoch => 1,
            Kind::Guest => 2,
            Kind::Drop => 3,
        };
        o[8..16].copy_from_slice(&self.seq.to_le_bytes());
        o[16..20].copy_from_slice(&self.chain.to_le_bytes());
        o[20..24].copy_from_slice(&self.crc.to_le_bytes());
        o[24..40].copy_from_slice(&self.stream);
        o[40..48].copy_from_slice(&self.epoch.to_le_bytes());
        o[48..56].copy_from_slice(&self.payload.to_le_bytes());
        o[56..60].copy_from_slice(&self.entries.to_le_bytes());
        o
    }

    /// Reads a head; none if it is not one.
    pub(crate) fn decode(o: &[u8; HEAD]) -> Option<Head> {
        let u32_at = |i: usize| u32::from_le_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        let kind = match o[4] {
            1 => Kind::Epoch,
            2 => Kind::Guest,
            3 => Kind::Drop,
            _ => return None,
        };
        let mut stream = [0u8; 16];
        stream.copy_from_slice(&o[24..40]);
        let h = Head {
            kind,
            seq: u64_at(8),
            chain: u32_at(16),
            crc: u32_at(20),
            stream,
            epoch: u64_at(40),
            payload: u64_at(48),
            entries: u32_at(56),
        };
        let fits = u64::from(h.entries) * ENTRY as u64 <= h.payload;
        (u32_at(0) == MAGIC && fits && h.encode() == *o).then_some(h)
    }

    /// The head as the checksum sees it.
    pub(crate) fn for_crc(&self) -> [u8; HEAD] {
        Head { crc: 0, ..*self }.encode()
    }
}

/// An entry's bytes.
pub(crate) fn encode_entry(w: &DiskWrite) -> [u8; ENTRY] {
    let mut o = [0u8; ENTRY];
    let len = match &w.op {
        WriteOp::Data(d) => d.len() as u64,
        WriteOp::Zero(n) => n | ZERO_BIT,
    };
    o[..8].copy_from_slice(&w.offset.to_le_bytes());
    o[8..].copy_from_slice(&len.to_le_bytes());
    o
}

/// An entry: offset, length, and whether it is zeroes (without data in the payload).
pub(crate) fn decode_entry(o: &[u8]) -> Option<(u64, u64, bool)> {
    let a: [u8; 8] = o.get(..8)?.try_into().ok()?;
    let b: [u8; 8] = o.get(8..16)?.try_into().ok()?;
    let len = u64::from_le_bytes(b);
    Some((u64::from_le_bytes(a), len & !ZERO_BIT, len & ZERO_BIT != 0))
}
