//! Bitmap pages: which 64 KiB blocks may differ from the peer. A page that is damaged or half
//! written counts as all ones, which is safe: those blocks are compared.
//!
//! Page: checksum u32, page number u32, magic u32, reserved u32, bits.

use crate::blocks::BlockSet;

/// Bytes of a page.
pub const PAGE: usize = 4096;
const HEAD: usize = 16;
const MAGIC: u32 = 0x4d42_5648;
/// Blocks that one page covers (a little under 2 GiB of disk).
pub(crate) const BLOCKS_PER_PAGE: u32 = ((PAGE - HEAD) * 8) as u32;

/// How many pages cover a disk of that many blocks.
pub(crate) fn pages(blocks: u32) -> u32 {
    blocks.div_ceil(BLOCKS_PER_PAGE)
}

pub(crate) fn area_bytes(blocks: u32) -> u64 {
    u64::from(pages(blocks)) * PAGE as u64
}

/// The page that holds a block.
pub(crate) fn page_of(block: u32) -> u32 {
    block / BLOCKS_PER_PAGE
}

pub(crate) fn encode(set: &BlockSet, page: u32) -> Vec<u8> {
    let mut out = vec![0u8; PAGE];
    out[4..8].copy_from_slice(&page.to_le_bytes());
    out[8..12].copy_from_slice(&MAGIC.to_le_bytes());
    set.copy_bits(page * BLOCKS_PER_PAGE, &mut out[HEAD..]);
    let crc = crc32fast::hash(&out[4..]);
    out[..4].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Adds a page's blocks to the set; false (and all of them added) when it is damaged.
pub(crate) fn decode_into(set: &mut BlockSet, page: u32, raw: &[u8]) -> bool {
    let u32_at = |i: usize| u32::from_le_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
    let first = page * BLOCKS_PER_PAGE;
    let good = raw.len() == PAGE
        && crc32fast::hash(&raw[4..]) == u32_at(0)
        && u32_at(4) == page
        && u32_at(8) == MAGIC;
    if good {
        set.set_bits(first, &raw[HEAD..]);
    } else {
        set.insert_span(first, first.saturating_add(BLOCKS_PER_PAGE - 1));
    }
    good
}
