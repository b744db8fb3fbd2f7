//! Reading a running guest's memory for a comparison, without giving room to pages never written.

use crate::PAGE_BYTES;
use crate::error::ImageError;
use crate::ram::ram_file;
use havm_capture::RamBlock;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Reads the memory of a QEMU.
pub struct RamReader {
    /// For each block: where it is read from, and at which offset it starts there.
    blocks: Vec<(File, u64)>,
}

impl RamReader {
    /// For the QEMU with this process id and these blocks.
    ///
    /// # Errors
    /// Its memory may not be read: root is needed.
    pub fn open(pid: u32, blocks: &[RamBlock]) -> Result<RamReader, ImageError> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|source| {
            ImageError::Io {
                what: "read QEMU's memory map",
                source,
            }
        })?;
        let memory = |b: &RamBlock| {
            let file = File::open(format!("/proc/{pid}/mem")).map_err(|source| ImageError::Io {
                what: "open QEMU's memory",
                source,
            })?;
            Ok((file, b.hva))
        };
        let open = |b: &RamBlock| {
            if b.shared_file {
                Ok((ram_file(pid, &maps, b)?, 0))
            } else {
                memory(b)
            }
        };
        Ok(RamReader {
            blocks: blocks.iter().map(open).collect::<Result<_, ImageError>>()?,
        })
    }

    /// Calls `each` with `count` pages of a block, from `first` on.
    ///
    /// # Errors
    /// The block is not there, or QEMU is gone.
    pub fn pages(
        &self,
        block: u16,
        first: u32,
        count: u32,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), ImageError> {
        let (file, start) = self
            .blocks
            .get(usize::from(block))
            .ok_or_else(|| ImageError::Mismatch(format!("there is no RAM block number {block}")))?;
        let mut at = start + u64::from(first) * PAGE_BYTES as u64;
        let mut left = count as usize * PAGE_BYTES;
        let mut buf = vec![0; CHUNK_BYTES.min(left)];
        while left > 0 {
            let part = &mut buf[..CHUNK_BYTES.min(left)];
            file.read_exact_at(part, at)
                .map_err(|source| ImageError::Io {
                    what: "read the guest's memory",
                    source,
                })?;
            part.chunks_exact(PAGE_BYTES).for_each(&mut each);
            at += part.len() as u64;
            left -= part.len();
        }
        Ok(())
    }
}
