//! The write-intent log on disk: the list of active extents, written whole into one of two areas.
//!
//! Each 512-byte sector has its own checksum. A crash in the middle of a transaction leaves intact
//! sectors of two transactions (*torn*: use the other area); a sector that is itself damaged is rot
//! (the log cannot be believed). Disks write sectors of 512 bytes atomically.
//!
//! Sector: checksum u32, sequence u64, index u16, sectors u16, count u32 (in this sector), extents u32 each.

const SECTOR: usize = 512;
const HEAD: usize = 20;
const PER_SECTOR: usize = (SECTOR - HEAD) / 4;

/// Bytes reserved for one area that can list `extents` extents.
pub(crate) fn area_bytes(extents: u32) -> u64 {
    (u64::from(extents).div_ceil(PER_SECTOR as u64).max(1) * SECTOR as u64).next_multiple_of(4096)
}

/// The bytes of a transaction.
pub(crate) fn encode(seq: u64, extents: &[u32]) -> Vec<u8> {
    let sectors = extents.len().div_ceil(PER_SECTOR).max(1);
    let mut out = Vec::with_capacity(sectors * SECTOR);
    for i in 0..sectors {
        let part = &extents
            [(i * PER_SECTOR).min(extents.len())..((i + 1) * PER_SECTOR).min(extents.len())];
        let at = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&seq.to_le_bytes());
        out.extend_from_slice(&(i as u16).to_le_bytes());
        out.extend_from_slice(&(sectors as u16).to_le_bytes());
        out.extend_from_slice(&(part.len() as u32).to_le_bytes());
        part.iter()
            .for_each(|e| out.extend_from_slice(&e.to_le_bytes()));
        out.resize(at + SECTOR, 0);
        let crc = crc32fast::hash(&out[at + 4..]);
        out[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
    out
}

/// What an area holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Area {
    /// An intact transaction: its number and extents.
    Whole(u64, Vec<u32>),
    /// Parts of two transactions.
    Torn,
    /// A damaged sector.
    Rotten,
}

/// Reads an area.
pub(crate) fn decode(raw: &[u8]) -> Area {
    let mut extents = Vec::new();
    let mut first: Option<(u64, u16)> = None;
    let mut torn = false;
    let mut i = 0u16;
    loop {
        let at = usize::from(i) * SECTOR;
        let Some(s) = raw.get(at..at + SECTOR) else {
            return Area::Torn;
        };
        let u32_at = |i: usize| u32::from_le_bytes([s[i], s[i + 1], s[i + 2], s[i + 3]]);
        if s.iter().all(|b| *b == 0) {
            // Room that no transaction has reached before.
            return Area::Torn;
        }
        if crc32fast::hash(&s[4..]) != u32_at(0) {
            return Area::Rotten;
        }
        let seq = u64::from(u32_at(4)) | u64::from(u32_at(8)) << 32;
        let (index, sectors) = (u32_at(12) as u16, (u32_at(12) >> 16) as u16);
        let count = u32_at(16) as usize;
        if index != i || count > PER_SECTOR || sectors == 0 {
            return Area::Rotten;
        }
        let (want_seq, want_sectors) = *first.get_or_insert((seq, sectors));
        torn |= seq != want_seq || sectors != want_sectors;
        extents.extend((0..count).map(|k| u32_at(HEAD + 4 * k)));
        i += 1;
        if i >= want_sectors {
            break;
        }
    }
    match first {
        Some((seq, _)) if !torn => Area::Whole(seq, extents),
        _ => Area::Torn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for n in [0, 1, PER_SECTOR, PER_SECTOR + 1, 4096] {
            let ext: Vec<u32> = (0..n as u32).map(|i| i * 3).collect();
            assert_eq!(decode(&encode(5, &ext)), Area::Whole(5, ext));
        }
    }

    // A transaction torn at a sector must not be believed, and must not be taken for rot.
    #[test]
    fn torn_at_every_sector() {
        let old = encode(2, &(0..1000).collect::<Vec<_>>());
        let new = encode(4, &(5000..6000).collect::<Vec<_>>());
        for cut in 1..new.len() / SECTOR {
            let mut mix = old.clone();
            mix[..cut * SECTOR].copy_from_slice(&new[..cut * SECTOR]);
            assert_eq!(decode(&mix), Area::Torn, "new before sector {cut}");
            let mut mix = new.clone();
            mix[..cut * SECTOR].copy_from_slice(&old[..cut * SECTOR]);
            assert_eq!(decode(&mix), Area::Torn, "old before sector {cut}");
        }
    }

    #[test]
    fn every_flipped_bit_is_rot() {
        let good = encode(2, &[1, 2, 3]);
        for bit in 0..SECTOR * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bad), Area::Rotten, "bit {bit}");
        }
    }
}
