//! The RAM image of a standby, block by block.

use crate::PAGE_BYTES;
use crate::error::ImageError;
use crate::mapping::Mapping;
use crate::stream::StreamBlock;
use havm_capture::RamBlock;
use havm_qmp::Qmp;
use std::fs::File;

/// What both sides must have in common of a RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInfo {
    /// Its name.
    pub name: String,
    /// Its used length, bytes.
    pub len: u64,
    /// Its guest address.
    pub guest_addr: u64,
    /// It is in the RAM file; the others travel in the stream at promotion.
    pub shared: bool,
}

impl From<&RamBlock> for BlockInfo {
    fn from(b: &RamBlock) -> Self {
        BlockInfo {
            name: b.name.clone(),
            len: b.len,
            guest_addr: b.guest_addr,
            shared: b.shared_file,
        }
    }
}

enum Backing {
    File(Mapping),
    Private(Vec<u8>),
}

struct Block {
    info: BlockInfo,
    backing: Backing,
}

/// The image: the waiting QEMU's RAM file mapped, the other blocks in this process' memory.
pub struct RamImage {
    blocks: Vec<Block>,
}

impl RamImage {
    /// Maps the RAM of the QEMU behind `qmp`: a waiting one (all private blocks start as zeroes), or the paused
    /// old primary of a handover (see [`RamImage::read_private`]).
    ///
    /// # Errors
    /// A block that should be a file cannot be mapped.
    pub fn map(qmp: &Qmp, blocks: &[RamBlock]) -> Result<RamImage, ImageError> {
        let pid = qmp.peer_pid();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|source| {
            ImageError::Io {
                what: "read QEMU's memory map",
                source,
            }
        })?;
        let blocks = blocks
            .iter()
            .map(|b| {
                let len = usize::try_from(b.len)
                    .map_err(|_| ImageError::Mismatch(format!("block {} is too large", b.name)))?;
                let backing = if b.shared_file {
                    Backing::File(map_block(pid, &maps, b, len)?)
                } else {
                    Backing::Private(vec![0; len.next_multiple_of(PAGE_BYTES)])
                };
                Ok(Block {
                    info: b.into(),
                    backing,
                })
            })
            .collect::<Result<_, ImageError>>()?;
        Ok(RamImage { blocks })
    }

    /// Fills the private blocks from `read(block, bytes)`: for an old primary, whose QEMU holds them.
    ///
    /// # Errors
    /// What `read` returns.
    pub fn read_private<E>(
        &mut self,
        mut read: impl FnMut(u16, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for (i, b) in self.blocks.iter_mut().enumerate() {
            if let Backing::Private(bytes) = &mut b.backing {
                read(i as u16, bytes)?;
            }
        }
        Ok(())
    }

    /// The blocks, in QEMU's order.
    pub fn blocks(&self) -> impl Iterator<Item = &BlockInfo> {
        self.blocks.iter().map(|b| &b.info)
    }

    /// All of it, bytes.
    pub fn total_bytes(&self) -> u64 {
        self.blocks().map(|b| b.len).sum()
    }

    /// Checks that the primary's blocks are these.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn check_equal(&self, primary: &[BlockInfo]) -> Result<(), ImageError> {
        let mine: Vec<_> = self.blocks().collect();
        if mine.len() != primary.len() {
            return Err(ImageError::Mismatch(format!(
                "{} RAM blocks here, {} there",
                mine.len(),
                primary.len()
            )));
        }
        match mine.iter().zip(primary).find(|(a, b)| **a != *b) {
            Some((a, b)) => Err(ImageError::Mismatch(format!(
                "RAM block {} of {} bytes at {:#x} here, {} of {} bytes at {:#x} there",
                a.name, a.len, a.guest_addr, b.name, b.len, b.guest_addr
            ))),
            None => Ok(()),
        }
    }

    /// A page; `None` outside the image.
    pub fn page(&self, block: u16, page: u32) -> Option<&[u8; PAGE_BYTES]> {
        let at = page as usize * PAGE_BYTES;
        match &self.blocks.get(block as usize)?.backing {
            Backing::File(m) => m.page(at),
            Backing::Private(v) => v.get(at..at + PAGE_BYTES)?.try_into().ok(),
        }
    }

    /// Copies a page, for a comparison: a page that was never written takes no room by it. False outside
    /// the image.
    pub fn read(&self, block: u16, page: u32, to: &mut [u8; PAGE_BYTES]) -> bool {
        let at = page as usize * PAGE_BYTES;
        match self.blocks.get(block as usize).map(|b| &b.backing) {
            Some(Backing::File(m)) => m.read(at, to).is_ok(),
            Some(Backing::Private(_)) => self.page(block, page).is_some_and(|p| {
                to.copy_from_slice(p);
                true
            }),
            None => false,
        }
    }

    /// Makes all of it zero, and gives its room back: for a stream that starts from nothing.
    ///
    /// # Errors
    /// The file system cannot punch holes.
    pub fn clear(&mut self) -> Result<(), ImageError> {
        for b in &mut self.blocks {
            match &mut b.backing {
                Backing::File(m) => m.clear().map_err(|source| ImageError::Io {
                    what: "clear the RAM file",
                    source,
                })?,
                Backing::Private(v) => v.fill(0),
            }
        }
        Ok(())
    }

    /// A page to write; `None` outside the image.
    pub fn page_mut(&mut self, block: u16, page: u32) -> Option<&mut [u8; PAGE_BYTES]> {
        let at = page as usize * PAGE_BYTES;
        match &mut self.blocks.get_mut(block as usize)?.backing {
            Backing::File(m) => m.page_mut(at),
            Backing::Private(v) => v.get_mut(at..at + PAGE_BYTES)?.try_into().ok(),
        }
    }

    /// Moves this image into `fresh`, the RAM of a waiting QEMU just started: copies what is not zero,
    /// and returns the bytes copied. `self` then is the fresh one; the old memory is let go.
    ///
    /// # Errors
    /// The blocks differ.
    pub fn rehome(&mut self, mut fresh: RamImage) -> Result<u64, ImageError> {
        let mine: Vec<BlockInfo> = self.blocks().cloned().collect();
        fresh.check_equal(&mine)?;
        let mut copied = 0;
        for (i, b) in mine.iter().enumerate() {
            for p in 0..b.len.div_ceil(PAGE_BYTES as u64) as u32 {
                let Some(from) = self.page(i as u16, p) else {
                    continue;
                };
                if from.iter().all(|&x| x == 0) {
                    continue;
                }
                if let Some(to) = fresh.page_mut(i as u16, p) {
                    to.copy_from_slice(from);
                    copied += PAGE_BYTES as u64;
                }
            }
        }
        *self = fresh;
        Ok(copied)
    }

    /// The blocks as the promotion's stream lists them.
    pub(crate) fn stream_blocks(&self) -> Vec<StreamBlock<'_>> {
        self.blocks
            .iter()
            .map(|b| StreamBlock {
                name: &b.info.name,
                len: b.info.len,
                guest_addr: b.info.guest_addr,
                content: match &b.backing {
                    Backing::File(_) => None,
                    Backing::Private(v) => v.get(..b.info.len as usize),
                },
            })
            .collect()
    }
}

/// Opens the file behind the mapping at the block's address.
pub(crate) fn ram_file(pid: u32, maps: &str, b: &RamBlock) -> Result<File, ImageError> {
    let err = |why: String| ImageError::Map {
        block: b.name.clone(),
        why,
    };
    let (range, offset) = maps
        .lines()
        .find_map(|l| {
            let mut f = l.split_ascii_whitespace();
            let range = f.next()?;
            let offset = u64::from_str_radix(f.nth(1)?, 16).ok()?;
            let (from, to) = range.split_once('-')?;
            let from = u64::from_str_radix(from, 16).ok()?;
            let to = u64::from_str_radix(to, 16).ok()?;
            (from <= b.hva && b.hva < to).then_some((range, offset + (b.hva - from)))
        })
        .ok_or_else(|| err(format!("no mapping at {:#x} in process {pid}", b.hva)))?;
    if offset != 0 {
        return Err(err(format!("it starts {offset} bytes into its file")));
    }
    let path = format!("/proc/{pid}/map_files/{range}");
    File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| err(format!("open {path}: {e} (needs root)")))
}

fn map_block(pid: u32, maps: &str, b: &RamBlock, len: usize) -> Result<Mapping, ImageError> {
    let m = Mapping::new(ram_file(pid, maps, b)?, len).map_err(|e| ImageError::Map {
        block: b.name.clone(),
        why: format!("mmap: {e}"),
    })?;
    debug_assert_eq!(m.len(), len);
    Ok(m)
}
