//! The guest's RAM blocks: what QEMU says of them, and which are mappings of a shared file.

use crate::error::CaptureError;
use havm_qmp::Qmp;

/// Bytes in a page, of the host and of the guest.
pub const PAGE_BYTES: usize = 4096;

/// More blocks than any guest has (a large libvirt guest has about 30).
const MAX_BLOCKS: usize = 4096;

/// A RAM block of a running QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name (`idstr` of the migration stream), such as `pc.ram`.
    pub name: String,
    /// Bytes in use. Grows for a resizable block (ACPI tables) up to `max_len`.
    pub len: u64,
    /// Bytes reserved.
    pub max_len: u64,
    /// Guest address as the migration stream with `x-ignore-shared` names it: the address of the
    /// memory region in its container. 0 for private blocks, where nothing checks it.
    pub guest_addr: u64,
    /// Host virtual address in QEMU.
    pub hva: u64,
    /// Bytes of the host's pages that back it; more than 4096 for huge pages.
    pub page_bytes: u64,
    /// It is a shared mapping of a file (a `memory-backend-file` with share=on).
    pub shared_file: bool,
}

impl RamBlock {
    /// Pages in use.
    pub fn pages(&self) -> u32 {
        (self.len / PAGE_BYTES as u64) as u32
    }
}

/// A line of /proc/PID/maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MapEntry {
    pub start: u64,
    pub end: u64,
    pub shared: bool,
    pub file_offset: u64,
    pub inode: u64,
    pub path: String,
}

/// Lists the RAM blocks of the QEMU behind `qmp`, running or waiting for its incoming migration.
/// Also for the standby, which tracks nothing.
///
/// # Errors
/// The monitor fails, or /proc/PID/maps cannot be read.
pub fn ram_blocks(qmp: &mut Qmp) -> Result<Vec<RamBlock>, CaptureError> {
    let mut blocks = parse_ramblock(&qmp.human("info ramblock")?)?;
    let maps = read_maps(qmp.peer_pid())?;
    for block in &mut blocks {
        block.shared_file = backing(&maps, block).is_some();
    }
    // mr->addr matters for shared blocks alone, and is 0 for the usual one; `info mtree` is long.
    if blocks.iter().any(|b| b.shared_file && b.name != "pc.ram") {
        let tree = qmp.human("info mtree")?;
        for block in blocks.iter_mut().filter(|b| b.shared_file) {
            block.guest_addr = region_addr(&tree, &block.name).unwrap_or(0);
        }
    }
    Ok(blocks)
}

pub(crate) fn read_maps(pid: u32) -> Result<Vec<MapEntry>, CaptureError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|source| {
        CaptureError::System {
            what: "read QEMU's memory map",
            source,
        }
    })?;
    Ok(parse_maps(&text))
}

/// The one shared file mapping that holds the whole block, if there is one.
pub(crate) fn backing<'a>(maps: &'a [MapEntry], block: &RamBlock) -> Option<&'a MapEntry> {
    maps.iter().find(|m| {
        m.shared
            && m.inode != 0
            && !m.path.starts_with("/dev/zero")
            // x-ignore-shared does not skip a memfd (QEMU 8.2 on), so it counts as private.
            && !m.path.starts_with("/memfd:")
            && m.start <= block.hva
            && m.end >= block.hva.saturating_add(block.len)
    })
}

fn parse_maps(text: &str) -> Vec<MapEntry> {
    text.lines().filter_map(parse_map_line).collect()
}

pub(crate) fn parse_map_line(line: &str) -> Option<MapEntry> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let perms = words.next()?;
    let offset = words.next()?;
    words.next()?;
    let inode = words.next()?;
    Some(MapEntry {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        shared: perms.as_bytes().get(3) == Some(&b's'),
        file_offset: u64::from_str_radix(offset, 16).ok()?,
        inode: inode.parse().ok()?,
        path: words.next().unwrap_or_default().trim_start().to_owned(),
    })
}

/// Reads HMP `info ramblock`: name, page size, offset, used, total, HVA, and (10.0 on) rw/ro.
/// Names may hold blanks, so the columns are taken from the first hexadecimal number on.
fn parse_ramblock(text: &str) -> Result<Vec<RamBlock>, CaptureError> {
    let bad = |line: &str| CaptureError::Answer(format!("`info ramblock` line {line:?}"));
    let mut blocks = Vec::new();
    for line in text.lines().skip(1).filter(|l| !l.trim().is_empty()) {
        let hex_at = line.find(" 0x").ok_or_else(|| bad(line))?;
        let head = &line[..hex_at];
        // The page size is the last two words before the numbers: "4 KiB".
        let mut head_words = head.trim().rsplitn(3, ' ').filter(|w| !w.is_empty());
        let (Some(unit), Some(size), Some(name)) =
            (head_words.next(), head_words.next(), head_words.next())
        else {
            return Err(bad(line));
        };
        let page_bytes = page_size(size, unit).ok_or_else(|| bad(line))?;
        let numbers: Vec<u64> = line[hex_at..]
            .split_whitespace()
            .map_while(|w| u64::from_str_radix(w.strip_prefix("0x")?, 16).ok())
            .collect();
        let [_, used, total, hva, ..] = numbers[..] else {
            return Err(bad(line));
        };
        let page = PAGE_BYTES as u64;
        // u32 page numbers: 16 TiB a block.
        if used > total
            || total >= 1 << 44
            || !used.is_multiple_of(page)
            || !hva.is_multiple_of(page)
            || hva.checked_add(total).is_none()
        {
            return Err(bad(line));
        }
        blocks.push(RamBlock {
            name: name.trim().to_owned(),
            len: used,
            max_len: total.next_multiple_of(page),
            guest_addr: 0,
            hva,
            page_bytes,
            shared_file: false,
        });
        if blocks.len() > MAX_BLOCKS {
            return Err(CaptureError::Answer(
                "more RAM blocks than any guest has".into(),
            ));
        }
    }
    if blocks.is_empty() {
        return Err(CaptureError::Answer(
            "`info ramblock` lists no block".into(),
        ));
    }
    Ok(blocks)
}

/// QEMU's `size_to_str`, such as "4 KiB".
fn page_size(size: &str, unit: &str) -> Option<u64> {
    let unit = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    size.parse::<u64>().ok()?.checked_mul(1 << unit)
}

/// The address of the RAM region `name` within its container, from `info mtree`. Block names are a
/// region's name, or a device path and `/` before it.
fn region_addr(tree: &str, name: &str) -> Option<u64> {
    let region = name.rsplit_once('/').map_or(name, |(_, r)| r);
    let mut parents: Vec<(usize, u64)> = Vec::new();
    for line in tree.lines() {
        let Some((indent, start, ram, text)) = region_line(line) else {
            parents.clear();
            continue;
        };
        while parents.last().is_some_and(|(i, _)| *i >= indent) {
            parents.pop();
        }
        if ram && text == region {
            return Some(start - parents.last().map_or(0, |(_, s)| *s).min(start));
        }
        parents.push((indent, start));
    }
    None
}

/// Indent, start address, whether it is RAM, and the rest of a line of `info mtree`.
fn region_line(line: &str) -> Option<(usize, u64, bool, &str)> {
    let indent = line.len() - line.trim_start().len();
    let (start, rest) = line.trim_start().split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let (_, rest) = rest.split_once(" (prio ")?;
    let (attrs, rest) = rest.split_once("): ")?;
    Some((indent, start, attrs.ends_with("ram"), rest.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAMBLOCK: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007ff61be00000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000009100000 0x0000000000020000 0x0000000000200000 0x00007ff629400000  ro
             odd name    2 MiB  0x0000000008000000 0x0000000000040000 0x0000000000040000 0x00007ff670200000
";

    /// Protects against misread addresses: a wrong HVA would track (or copy) foreign memory.
    #[test]
    fn ramblock_lines_are_read_by_column() {
        let b = parse_ramblock(RAMBLOCK).expect("good text");
        assert_eq!(b.len(), 3);
        assert_eq!(
            (b[0].name.as_str(), b[0].len, b[0].hva),
            ("pc.ram", 1 << 27, 0x7ff61be00000)
        );
        assert_eq!(
            (b[1].name.as_str(), b[1].len, b[1].max_len),
            ("/rom@etc/acpi/tables", 0x20000, 0x200000)
        );
        assert_eq!((b[2].name.as_str(), b[2].page_bytes), ("odd name", 2 << 20));
    }

    #[test]
    fn nonsense_in_ramblock_is_an_error() {
        let head = RAMBLOCK.lines().next().expect("head");
        for bad in [
            "",
            "x",
            "pc.ram 4 KiB 0x0 0x1000 0x1000",
            "pc.ram 4 KiB 0x0 0x2000 0x1000 0x7000",
            "pc.ram 4 KiB 0x0 0x1001 0x2000 0x7000",
            "pc.ram 4 KiB 0x0 0x1000 0x1000 0x7001",
            "pc.ram 4 KiB 0x0 0x1000 0x1000 0xfffffffffffff000",
            "pc.ram 4 KiB 0x0 0x1000 0xfffffffffffff000 0x7000",
            " 0x0 0x1000 0x1000 0x7000",
        ] {
            assert!(
                parse_ramblock(&format!("{head}\n{bad}\n")).is_err(),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn maps_lines_give_the_shared_file() {
        let text = "7f0000000000-7f0008000000 rw-s 00000000 00:1b 42                         /dev/shm/a file (deleted)
7f0010000000-7f0010001000 rw-p 00000000 00:00 0 
7f0020000000-7f0020001000 rw-s 00000000 00:01 9 /dev/zero (deleted)
";
        let maps = parse_maps(text);
        assert_eq!(maps[0].path, "/dev/shm/a file (deleted)");
        let mut b = parse_ramblock(RAMBLOCK).expect("good").remove(0);
        b.hva = 0x7f0000000000;
        assert!(backing(&maps, &b).is_some());
        b.len += 4096;
        assert!(
            backing(&maps, &b).is_none(),
            "a mapping that ends early is not the block's"
        );
        b.len = 4096;
        b.hva = 0x7f0020000000;
        assert!(
            backing(&maps, &b).is_none(),
            "shared anonymous memory has no file to map"
        );
    }

    #[test]
    fn a_node_of_numa_ram_sits_at_its_offset() {
        let tree = "address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-000000007fffffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-000000007fffffff

memory-region: pc.ram
  0000000100000000-000000017fffffff (prio 0, i/o): pc.ram
    0000000100000000-000000013fffffff (prio 0, ram): ram-node0
    0000000140000000-000000017fffffff (prio 0, ram): ram-node1
";
        assert_eq!(region_addr(tree, "ram-node0"), Some(0));
        assert_eq!(region_addr(tree, "ram-node1"), Some(0x40000000));
        assert_eq!(region_addr(tree, "nowhere"), None);
    }
}
