//! Finding and repairing differences: hashes, blocks, holes.
//!
//! A sync rides in the epochs: the primary hashes and reads blocks while epoch `k` is open, and the
//! standby compares and applies them after epoch `k - 1` and before `k`. A block that the guest
//! wrote meanwhile is then in `k` itself, so the standby ends with the primary's state at `k`
//! wherever blocks were dealt with. The standby is not eligible until all marked blocks are.

use crate::blocks::BLOCK_BYTES;
use crate::counters::add;
use crate::disk::Disk;
use crate::epoch::{DiskWrite, WriteOp};
use crate::error::{DiskError, Result};
use crate::tracker::Mode;
use bytes::Bytes;
use std::ops::Range;
use std::time::{Duration, Instant};

/// A block's hash: blake3, first 16 bytes; all zero for a block of zeroes, whatever its length.
pub type BlockHash = [u8; 16];
/// The hash of a block of zeroes.
pub const ZERO_HASH: BlockHash = [0; 16];
/// The most blocks in one call of [`Disk::hash_blocks`] (16 MiB of hashes' blocks, 1 GiB of disk).
pub const MAX_HASHES: u32 = 16384;

/// A block's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockData {
    /// All zeroes.
    Zero,
    /// These bytes: 64 KiB, less in the last block.
    Data(Bytes),
}

/// The hash of a block's bytes.
pub fn hash_block(data: &[u8]) -> BlockHash {
    if is_zero(data) {
        return ZERO_HASH;
    }
    let mut out = [0u8; 16];
    out.copy_from_slice(&blake3::hash(data).as_bytes()[..16]);
    // Nothing but zeroes may look like zeroes.
    if out == ZERO_HASH {
        out[0] = 1;
    }
    out
}

fn is_zero(data: &[u8]) -> bool {
    let (a, b, c) = (
        data.as_chunks::<32>().0,
        data.as_chunks::<32>().1,
        [0u8; 32],
    );
    a.iter().all(|x| *x == c) && b.iter().all(|x| *x == 0)
}

impl Disk {
    /// The bytes that a block covers.
    pub fn block_range(&self, block: u32) -> Result<Range<u64>> {
        let start = u64::from(block) * BLOCK_BYTES;
        if start >= self.size {
            return Err(DiskError::OutOfRange {
                offset: start,
                len: BLOCK_BYTES,
                size: self.size,
            });
        }
        Ok(start..(start + BLOCK_BYTES).min(self.size))
    }

    /// Hashes neighbouring blocks. Holes cost nothing. At most [`MAX_HASHES`] a call.
    pub fn hash_blocks(&self, blocks: Range<u32>) -> Result<Vec<BlockHash>> {
        let mut out = Vec::with_capacity(blocks.len().min(MAX_HASHES as usize));
        let mut buf = vec![0u8; BLOCK_BYTES as usize];
        let mut data: Option<Range<u64>> = None;
        for b in blocks.take(MAX_HASHES as usize) {
            let r = self.block_range(b)?;
            if data.as_ref().is_none_or(|d| d.end <= r.start) {
                data = Some(
                    self.next_data(r.start, self.size)?
                        .unwrap_or(self.size..self.size),
                );
            }
            if data.as_ref().is_some_and(|d| d.start >= r.end) {
                out.push(ZERO_HASH);
                continue;
            }
            let buf = &mut buf[..(r.end - r.start) as usize];
            self.backing
                .read(r.start, buf)
                .map_err(DiskError::io("reading the disk"))?;
            out.push(hash_block(buf));
        }
        Ok(out)
    }

    /// A block's content, for a sync.
    pub fn read_block(&self, block: u32) -> Result<BlockData> {
        let r = self.block_range(block)?;
        let mut buf = vec![0u8; (r.end - r.start) as usize];
        self.backing
            .read(r.start, &mut buf)
            .map_err(DiskError::io("reading the disk"))?;
        Ok(if is_zero(&buf) {
            BlockData::Zero
        } else {
            BlockData::Data(buf.into())
        })
    }

    /// Standby: which of the blocks from `first` on differ from the primary's hashes.
    pub fn compare(&self, first: u32, theirs: &[BlockHash]) -> Result<Vec<u32>> {
        let n = u32::try_from(theirs.len())
            .ok()
            .filter(|n| *n <= MAX_HASHES);
        let end = n
            .and_then(|n| first.checked_add(n))
            .filter(|e| *e <= self.blocks())
            .ok_or(DiskError::BadWire("hashes of blocks outside the disk"))?;
        let mine = self.hash_blocks(first..end)?;
        Ok((first..end)
            .zip(mine.iter().zip(theirs))
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i)
            .collect())
    }

    /// Standby: puts the primary's block in place. The disk is marked inconsistent durably before
    /// the first one; zeroes become a hole.
    pub fn apply_sync(&self, block: u32, data: &BlockData) -> Result<()> {
        if self.mode() != Mode::Standby {
            return Err(DiskError::WrongMode {
                op: "apply_sync",
                mode: self.mode().to_string(),
            });
        }
        let r = self.block_range(block)?;
        let len = r.end - r.start;
        let op = match data {
            BlockData::Zero => WriteOp::Zero(len),
            BlockData::Data(d) if d.len() as u64 == len => WriteOp::Data(d.clone()),
            BlockData::Data(_) => return Err(DiskError::BadWire("a sync block of wrong length")),
        };
        self.mark_inconsistent()?;
        self.backing.direct_begins()?;
        self.backing.put(&DiskWrite {
            offset: r.start,
            op,
        })?;
        add(&self.counters.sync_bytes, len);
        Ok(())
    }

    /// Hashes the whole disk, piece by piece: `each(first block, hashes)` returns false to stop.
    /// At most `bytes_per_second` are read (0: as fast as it goes); holes are free.
    pub fn hash_all(
        &self,
        bytes_per_second: u64,
        mut each: impl FnMut(u32, Vec<BlockHash>) -> bool,
    ) -> Result<()> {
        const PIECE: u32 = 64;
        let (started, mut read, mut at) = (Instant::now(), 0u64, 0u32);
        while at < self.blocks() {
            let end = at.saturating_add(PIECE).min(self.blocks());
            let hashes = self.hash_blocks(at..end)?;
            read += hashes.iter().filter(|h| **h != ZERO_HASH).count() as u64 * BLOCK_BYTES;
            if !each(at, hashes) {
                break;
            }
            if let Some(due_ms) = (read * 1000).checked_div(bytes_per_second) {
                let due = Duration::from_millis(due_ms);
                std::thread::sleep(
                    due.saturating_sub(started.elapsed())
                        .min(Duration::from_secs(1)),
                );
            }
            at = end;
        }
        Ok(())
    }
}
