//! A migration stream made by hand: the smallest that a waiting QEMU accepts.
//!
//! Format: QEMU 10.0 `migration/savevm.c`, `migration/ram.c`; all integers big-endian. Blocks that
//! are shared and named are skipped by QEMU (`x-ignore-shared`), but every migratable block must
//! be listed. Device sections are taken as `xen-save-devices-state` wrote them.

use crate::PAGE_BYTES;
use crate::error::ImageError;

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const EOF: u8 = 0;
const SECTION_START: u8 = 1;
const SECTION_END: u8 = 3;
const SUBSECTION: u8 = 5;
const VMDESC: u8 = 6;
const CONFIGURATION: u8 = 7;
const FOOTER: u8 = 0x7e;
/// Any id will do as long as no device section of the same stream has it; those count from 0.
const RAM_SECTION_ID: u32 = 0x7f00_0000;

const RAM_FLAG_ZERO: u64 = 0x02;
const RAM_FLAG_MEM_SIZE: u64 = 0x04;
const RAM_FLAG_PAGE: u64 = 0x08;
const RAM_FLAG_EOS: u64 = 0x10;
const RAM_FLAG_CONTINUE: u64 = 0x20;

/// One RAM block, as the stream must list it.
#[derive(Debug, Clone)]
pub struct StreamBlock<'a> {
    /// Its name, at most 255 bytes.
    pub name: &'a str,
    /// Its used length, bytes.
    pub len: u64,
    /// Its guest address.
    pub guest_addr: u64,
    /// Its content, for a block that QEMU does not find in the RAM file; page multiple or not.
    pub content: Option<&'a [u8]>,
}

fn name_to(out: &mut Vec<u8>, name: &str) -> Result<(), ImageError> {
    let len = u8::try_from(name.len())
        .map_err(|_| ImageError::Mismatch(format!("RAM block name {name:?} is over 255 bytes")))?;
    out.push(len);
    out.extend_from_slice(name.as_bytes());
    Ok(())
}

/// Where the device sections start in the output of `xen-save-devices-state`.
///
/// # Errors
/// The bytes are not such an output.
pub fn device_sections(saved: &[u8]) -> Result<&[u8], ImageError> {
    let bad = |why: &str| ImageError::Load(format!("the device state is not usable: {why}"));
    let head = saved.get(..8).ok_or_else(|| bad("under 8 bytes"))?;
    if head[..4] != MAGIC.to_be_bytes() || head[4..] != VERSION.to_be_bytes() {
        return Err(bad("no QEMU stream header of version 3"));
    }
    match saved[8..].split_last() {
        Some((&EOF, sections)) if !sections.is_empty() => Ok(sections),
        _ => Err(bad("it does not end with an end mark")),
    }
}

/// The whole stream for `migrate-incoming`, for a QEMU with `x-ignore-shared` set.
///
/// # Errors
/// A name is too long, or the device state is not one.
pub fn synthesize(
    machine: &str,
    blocks: &[StreamBlock<'_>],
    saved_devices: &[u8],
) -> Result<Vec<u8>, ImageError> {
    let sections = device_sections(saved_devices)?;
    let private: usize = blocks
        .iter()
        .filter_map(|b| b.content)
        .map(<[u8]>::len)
        .sum();
    let mut out = Vec::with_capacity(sections.len() + private + 64 * blocks.len() + 4096);
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&VERSION.to_be_bytes());

    out.push(CONFIGURATION);
    out.extend_from_slice(&(machine.len() as u32).to_be_bytes());
    out.extend_from_slice(machine.as_bytes());
    out.push(SUBSECTION);
    name_to(&mut out, "configuration/capabilities")?;
    out.extend_from_slice(&1u32.to_be_bytes());
    out.extend_from_slice(&1u32.to_be_bytes());
    name_to(&mut out, "x-ignore-shared")?;

    ram_setup(&mut out, blocks)?;
    ram_end(&mut out, blocks)?;
    out.extend_from_slice(sections);
    out.push(EOF);
    // Without it QEMU complains, and waits for more on a socket that stays open.
    out.push(VMDESC);
    out.extend_from_slice(&2u32.to_be_bytes());
    out.extend_from_slice(b"{}");
    Ok(out)
}

fn footer(out: &mut Vec<u8>) {
    out.push(FOOTER);
    out.extend_from_slice(&RAM_SECTION_ID.to_be_bytes());
}

fn ram_setup(out: &mut Vec<u8>, blocks: &[StreamBlock<'_>]) -> Result<(), ImageError> {
    out.push(SECTION_START);
    out.extend_from_slice(&RAM_SECTION_ID.to_be_bytes());
    name_to(out, "ram")?;
    out.extend_from_slice(&0u32.to_be_bytes());
    out.extend_from_slice(&4u32.to_be_bytes());
    // Includes the blocks that are skipped.
    let total: u64 = blocks.iter().map(|b| b.len).sum();
    out.extend_from_slice(&(total | RAM_FLAG_MEM_SIZE).to_be_bytes());
    for b in blocks {
        name_to(out, b.name)?;
        out.extend_from_slice(&b.len.to_be_bytes());
        out.extend_from_slice(&b.guest_addr.to_be_bytes());
    }
    out.extend_from_slice(&RAM_FLAG_EOS.to_be_bytes());
    footer(out);
    Ok(())
}

fn ram_end(out: &mut Vec<u8>, blocks: &[StreamBlock<'_>]) -> Result<(), ImageError> {
    out.push(SECTION_END);
    out.extend_from_slice(&RAM_SECTION_ID.to_be_bytes());
    for b in blocks {
        let Some(content) = b.content else { continue };
        for (i, page) in content.chunks(PAGE_BYTES).enumerate() {
            let zero = page.iter().all(|&x| x == 0);
            let flags = if zero { RAM_FLAG_ZERO } else { RAM_FLAG_PAGE }
                | if i > 0 { RAM_FLAG_CONTINUE } else { 0 };
            out.extend_from_slice(&((i * PAGE_BYTES) as u64 | flags).to_be_bytes());
            if i == 0 {
                name_to(out, b.name)?;
            }
            if zero {
                out.push(0);
            } else {
                out.extend_from_slice(page);
                out.resize(out.len() + PAGE_BYTES - page.len(), 0);
            }
        }
    }
    out.extend_from_slice(&RAM_FLAG_EOS.to_be_bytes());
    footer(out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(sections: &[u8]) -> Vec<u8> {
        let mut v = MAGIC.to_be_bytes().to_vec();
        v.extend_from_slice(&VERSION.to_be_bytes());
        v.extend_from_slice(sections);
        v.push(EOF);
        v
    }

    #[test]
    fn device_state_that_is_none_is_refused() {
        assert!(device_sections(b"").is_err());
        assert!(device_sections(b"QEVMxxxx\0").is_err());
        let cut = &saved(&[4, 1, 2])[..10];
        assert!(device_sections(cut).is_err());
        assert_eq!(device_sections(&saved(&[4, 1, 2])).unwrap(), &[4, 1, 2]);
    }

    #[test]
    fn private_blocks_travel_whole_and_shared_ones_only_by_name() {
        let rom = [0xeeu8; 5000];
        let blocks = [
            StreamBlock {
                name: "pc.ram",
                len: 1 << 20,
                guest_addr: 0,
                content: None,
            },
            StreamBlock {
                name: "pc.bios",
                len: 8192,
                guest_addr: 0xfffc_0000,
                content: Some(&rom),
            },
        ];
        let s = synthesize("pc-q35-10.0", &blocks, &saved(&[4, 9])).unwrap();
        assert_eq!(s.windows(6).filter(|w| w == b"pc.ram").count(), 1);
        assert_eq!(s.iter().filter(|&&b| b == 0xee).count(), 5000);
        assert!(s.ends_with(&[4, 9, EOF, VMDESC, 0, 0, 0, 2, b'{', b'}']));
    }

    #[test]
    fn an_over_long_name_is_an_error() {
        let long = "x".repeat(256);
        let b = [StreamBlock {
            name: &long,
            len: 1,
            guest_addr: 0,
            content: None,
        }];
        assert!(synthesize("m", &b, &saved(&[4])).is_err());
    }
}
