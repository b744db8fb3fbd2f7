//! Sets of 64 KiB blocks: the unit in which two copies of a disk are compared and brought together.

use crate::error::{DiskError, Result};

/// Bytes in a block, the unit of comparison and resync.
pub const BLOCK_BYTES: u64 = 64 * 1024;
/// Bytes in an extent, the unit of the write-intent log.
pub const EXTENT_BYTES: u64 = 1024 * 1024;
/// Blocks in an extent.
pub const BLOCKS_PER_EXTENT: u64 = EXTENT_BYTES / BLOCK_BYTES;
/// The largest disk, bytes: block numbers fit 32 bits with room to spare.
pub const MAX_DISK_BYTES: u64 = 64 << 40;

/// How many blocks a disk of `size_bytes` has; the last may be short.
pub fn blocks_of(size_bytes: u64) -> u32 {
    size_bytes.min(MAX_DISK_BYTES).div_ceil(BLOCK_BYTES) as u32
}

/// The blocks that a byte range touches, first and last. `len` must not be 0.
pub(crate) fn span(offset: u64, len: u64) -> (u32, u32) {
    (
        (offset / BLOCK_BYTES) as u32,
        ((offset + len - 1) / BLOCK_BYTES) as u32,
    )
}

/// A set of blocks of one disk.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockSet {
    blocks: u32,
    words: Vec<u64>,
}

impl BlockSet {
    /// The empty set over a disk of `blocks` blocks.
    pub fn new(blocks: u32) -> Self {
        BlockSet {
            blocks,
            words: vec![0; (blocks as usize).div_ceil(64)],
        }
    }

    /// All blocks.
    pub fn full(blocks: u32) -> Self {
        let mut s = Self::new(blocks);
        if blocks > 0 {
            s.insert_span(0, blocks - 1);
        }
        s
    }

    /// How many blocks the disk has.
    pub fn capacity(&self) -> u32 {
        self.blocks
    }

    /// Adds one block; a number past the end is ignored.
    pub fn insert(&mut self, block: u32) {
        if block < self.blocks {
            self.words[block as usize / 64] |= 1 << (block % 64);
        }
    }

    /// Adds the blocks `first..=last`; what lies past the end is ignored.
    pub fn insert_span(&mut self, first: u32, last: u32) {
        let last = last.min(self.blocks.saturating_sub(1));
        if first > last || self.blocks == 0 {
            return;
        }
        let (a, b) = (first as usize / 64, last as usize / 64);
        let (head, tail) = (!0u64 << (first % 64), !0u64 >> (63 - last % 64));
        if a == b {
            self.words[a] |= head & tail;
        } else {
            self.words[a] |= head;
            self.words[a + 1..b].fill(!0);
            self.words[b] |= tail;
        }
    }

    /// Takes one block out.
    pub fn remove(&mut self, block: u32) {
        if block < self.blocks {
            self.words[block as usize / 64] &= !(1 << (block % 64));
        }
    }

    /// Whether the block is in the set.
    pub fn contains(&self, block: u32) -> bool {
        block < self.blocks && self.words[block as usize / 64] & (1 << (block % 64)) != 0
    }

    /// Whether any of `first..=last` is in the set.
    pub fn intersects_span(&self, first: u32, last: u32) -> bool {
        (first..=last.min(self.blocks.saturating_sub(1))).any(|b| self.contains(b))
    }

    /// How many blocks are in the set.
    pub fn count(&self) -> u32 {
        self.words.iter().map(|w| w.count_ones()).sum()
    }

    /// How many bytes the blocks in the set have at most.
    pub fn bytes(&self) -> u64 {
        u64::from(self.count()) * BLOCK_BYTES
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds all of `other`. Sets of disks of different sizes are joined as far as this one goes.
    pub fn union(&mut self, other: &BlockSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
        self.trim_tail();
    }

    /// Takes all of `other` out.
    pub fn subtract(&mut self, other: &BlockSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
    }

    /// Whether all of `other` is in here.
    pub fn is_superset(&self, other: &BlockSet) -> bool {
        other.iter().all(|b| self.contains(b))
    }

    /// The blocks in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(i, w)| {
            let mut w = *w;
            std::iter::from_fn(move || {
                (w != 0).then(|| {
                    let bit = w.trailing_zeros();
                    w &= w - 1;
                    i as u32 * 64 + bit
                })
            })
        })
    }

    /// Runs of neighbouring blocks: (first, how many).
    pub fn runs(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let mut it = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = it.next()?;
            let mut n = 1;
            while it.next_if_eq(&(first + n)).is_some() {
                n += 1;
            }
            Some((first, n))
        })
    }

    /// The first block at or after `from`.
    pub fn next_from(&self, from: u32) -> Option<u32> {
        let mut i = from as usize / 64;
        let mut w = *self.words.get(i)? & (!0 << (from % 64));
        while w == 0 {
            i += 1;
            w = *self.words.get(i)?;
        }
        Some(i as u32 * 64 + w.trailing_zeros())
    }

    /// For the wire: the disk's number of blocks, then the runs as (gap, length) in LEB128.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        leb(&mut out, self.blocks);
        let mut at = 0;
        for (first, n) in self.runs() {
            leb(&mut out, first - at);
            leb(&mut out, n);
            at = first + n;
        }
        out
    }

    /// The inverse of [`BlockSet::encode`]. `blocks` is the size that the receiver expects: a set
    /// over another size is refused, so what comes over the wire cannot make us allocate more.
    pub fn decode(mut raw: &[u8], blocks: u32) -> Result<Self> {
        if unleb(&mut raw)? != blocks {
            return Err(DiskError::BadWire(
                "a block set over a disk of another size",
            ));
        }
        let mut set = Self::new(blocks);
        let mut at = 0u64;
        while !raw.is_empty() {
            let first = at + u64::from(unleb(&mut raw)?);
            at = first + u64::from(unleb(&mut raw)?);
            if at == first || at > u64::from(blocks) {
                return Err(DiskError::BadWire(
                    "a block set with an empty or outlying run",
                ));
            }
            set.insert_span(first as u32, at as u32 - 1);
        }
        Ok(set)
    }

    /// The bits of `first..first + 8 * out.len()`, lowest first; `first` must be a multiple of 8.
    pub(crate) fn copy_bits(&self, first: u32, out: &mut [u8]) {
        for (i, o) in out.iter_mut().enumerate() {
            let bit = first as usize + 8 * i;
            *o = self
                .words
                .get(bit / 64)
                .map_or(0, |w| (w >> (bit % 64)) as u8);
        }
    }

    /// Sets the bits that `raw` has from `first` on; the inverse of [`BlockSet::copy_bits`].
    pub(crate) fn set_bits(&mut self, first: u32, raw: &[u8]) {
        for (i, byte) in raw.iter().enumerate() {
            let bit = first as usize + 8 * i;
            if let Some(w) = self.words.get_mut(bit / 64) {
                *w |= u64::from(*byte) << (bit % 64);
            }
        }
        self.trim_tail();
    }

    fn trim_tail(&mut self) {
        if !self.blocks.is_multiple_of(64)
            && let Some(w) = self.words.last_mut()
        {
            *w &= (1 << (self.blocks % 64)) - 1;
        }
    }
}

impl std::fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockSet({} of {}: ", self.count(), self.blocks)?;
        f.debug_list().entries(self.runs().take(8)).finish()?;
        write!(f, ")")
    }
}

fn leb(out: &mut Vec<u8>, mut v: u32) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn unleb(raw: &mut &[u8]) -> Result<u32> {
    let mut v = 0u64;
    for shift in (0..35).step_by(7) {
        let (b, rest) = raw
            .split_first()
            .ok_or(DiskError::BadWire("a block set cut short"))?;
        *raw = rest;
        v |= u64::from(b & 0x7f) << shift;
        if b & 0x80 == 0 {
            return u32::try_from(v).map_err(|_| DiskError::BadWire("a block number over 32 bits"));
        }
    }
    Err(DiskError::BadWire("a block number over 32 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // What a resync exchanges must arrive as it was sent.
        #[test]
        fn encode_decode(blocks in 1u32..5000, picks in proptest::collection::vec(0u32..5000, 0..200)) {
            let mut s = BlockSet::new(blocks);
            picks.iter().for_each(|b| s.insert(*b));
            prop_assert_eq!(BlockSet::decode(&s.encode(), blocks).unwrap(), s);
        }

        // Garbage from a peer is an error or a set, never a panic or an outlying block.
        #[test]
        fn decode_garbage(raw in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(s) = BlockSet::decode(&raw, 100) {
                prop_assert!(s.iter().all(|b| b < 100));
            }
        }

        // Spans are laid by whole words: they must hit the same blocks as one by one.
        #[test]
        fn spans(blocks in 1u32..400, first in 0u32..420, n in 0u32..420) {
            let mut a = BlockSet::new(blocks);
            a.insert_span(first, first + n);
            let mut b = BlockSet::new(blocks);
            (first..=first + n).for_each(|x| b.insert(x));
            prop_assert_eq!(a, b);
        }

        #[test]
        fn bits_round_trip(picks in proptest::collection::vec(0u32..1000, 0..200)) {
            let mut s = BlockSet::new(1000);
            picks.iter().for_each(|b| s.insert(*b));
            let mut raw = [0u8; 125];
            s.copy_bits(0, &mut raw);
            let mut t = BlockSet::new(1000);
            t.set_bits(0, &raw);
            prop_assert_eq!(s, t);
        }
    }

    #[test]
    fn another_size_is_refused() {
        assert!(BlockSet::decode(&BlockSet::full(10).encode(), 11).is_err());
    }

    #[test]
    fn next_from_walks() {
        let mut s = BlockSet::new(300);
        s.insert(5);
        s.insert(299);
        assert_eq!(s.next_from(0), Some(5));
        assert_eq!(s.next_from(6), Some(299));
        assert_eq!(s.next_from(300), None);
    }
}
