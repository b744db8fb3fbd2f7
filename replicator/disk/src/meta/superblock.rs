//! The superblock: what this disk is, kept in two copies.

use crate::blocks::{BLOCK_BYTES, EXTENT_BYTES, MAX_DISK_BYTES, blocks_of};
use crate::error::{MetaError, Result};
use std::path::Path;

/// Bytes of one copy.
pub const BYTES: usize = 4096;
const MAGIC: [u8; 8] = *b"HAVMDSK\x01";
/// The version written here. A reader refuses newer ones.
pub const VERSION: u32 = 1;
/// The largest write-intent log that a superblock may name, extents.
pub const MAX_LOG_EXTENTS: u32 = 1 << 16;

/// What is known of a disk, durably.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Rises with every change; the copy with the larger one counts.
    pub seq: u64,
    /// Names the guest's disk; the same on both sides.
    pub disk_id: [u8; 16],
    /// The disk's size, bytes.
    pub size: u64,
    /// Room in the write-intent log, extents.
    pub log_extents: u32,
    /// This copy's data generation; set by the daemon at every take (rule 7).
    pub generation: [u8; 16],
    /// The generation that it was made from.
    pub parent: [u8; 16],
    /// Set durably before the first in-place write of a sync, until the copy is whole again.
    pub inconsistent: bool,
}

impl Superblock {
    /// The superblock of a new disk.
    pub fn new(disk_id: [u8; 16], size: u64, log_extents: u32) -> Self {
        Superblock {
            seq: 0,
            disk_id,
            size,
            log_extents,
            generation: [0; 16],
            parent: [0; 16],
            inconsistent: false,
        }
    }

    /// How many blocks the disk has.
    pub fn blocks(&self) -> u32 {
        blocks_of(self.size)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 4]); // checksum, below
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.disk_id);
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        out.extend_from_slice(&(EXTENT_BYTES as u32).to_le_bytes());
        out.extend_from_slice(&self.log_extents.to_le_bytes());
        out.extend_from_slice(&u32::from(self.inconsistent).to_le_bytes());
        out.extend_from_slice(&self.generation);
        out.extend_from_slice(&self.parent);
        out.resize(BYTES, 0);
        let crc = crc32fast::hash(&out);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out
    }
}

enum Copy {
    Good(Superblock),
    Bad,
    Newer(u32),
}

fn decode(raw: &[u8]) -> Copy {
    let Some(raw) = raw.get(..BYTES) else {
        return Copy::Bad;
    };
    let u32_at = |i: usize| u32::from_le_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
    let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
    let id_at = |i: usize| {
        let mut id = [0u8; 16];
        id.copy_from_slice(&raw[i..i + 16]);
        id
    };
    if raw[..8] != MAGIC {
        return Copy::Bad;
    }
    let mut h = crc32fast::Hasher::new();
    h.update(&raw[..12]);
    h.update(&[0; 4]);
    h.update(&raw[16..]);
    if h.finalize() != u32_at(12) {
        return Copy::Bad;
    }
    if u32_at(8) > VERSION {
        return Copy::Newer(u32_at(8));
    }
    let sb = Superblock {
        seq: u64_at(16),
        disk_id: id_at(24),
        size: u64_at(40),
        log_extents: u32_at(56),
        generation: id_at(64),
        parent: id_at(80),
        inconsistent: u32_at(60) != 0,
    };
    let sane = u32_at(48) == BLOCK_BYTES as u32
        && u32_at(52) == EXTENT_BYTES as u32
        && sb.size > 0
        && sb.size <= MAX_DISK_BYTES
        && (1..=MAX_LOG_EXTENTS).contains(&sb.log_extents);
    if sane { Copy::Good(sb) } else { Copy::Bad }
}

/// The newer intact one of both copies.
pub(crate) fn choose(raw: &[u8], path: &Path) -> Result<Superblock, MetaError> {
    let (a, b) = raw.split_at(raw.len().min(BYTES));
    match (decode(a), decode(b)) {
        (Copy::Newer(found), _) | (_, Copy::Newer(found)) => Err(MetaError::Newer {
            path: path.to_owned(),
            found,
            known: VERSION,
        }),
        (Copy::Good(a), Copy::Good(b)) => Ok(if a.seq >= b.seq { a } else { b }),
        (Copy::Good(s), Copy::Bad) | (Copy::Bad, Copy::Good(s)) => Ok(s),
        (Copy::Bad, Copy::Bad) => Err(MetaError::Corrupt {
            path: path.to_owned(),
            what: "both superblock copies".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sb() -> Superblock {
        let mut s = Superblock::new([7; 16], 10 << 20, 1024);
        s.seq = 9;
        s.generation = [1; 16];
        s
    }

    // A flipped bit anywhere must never be believed: with the other copy intact it is used, with
    // both hit the metadata is refused.
    #[test]
    fn every_flipped_bit_is_seen() {
        let good = sb().encode();
        let mut old = sb();
        old.seq = 8;
        let old_raw = old.encode();
        for bit in 0..128 * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let p = Path::new("x");
            assert_eq!(
                choose(&[bad.clone(), old_raw.clone()].concat(), p).unwrap(),
                old
            );
            assert!(choose(&[bad.clone(), bad].concat(), p).is_err());
        }
        assert_eq!(
            choose(&[good, old_raw].concat(), Path::new("x")).unwrap(),
            sb()
        );
    }
}
