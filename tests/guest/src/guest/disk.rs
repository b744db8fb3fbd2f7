//! The record log on the guest's disk.
//!
//! ```text
//!   block 0 of the log area      superblock: boot count
//!   then slots of one block      record `seq` stands in slot `seq % slots`
//! ```
//!
//! Opened O_DIRECT and O_DSYNC: a record is answered for only after the device took it durably, and
//! a dump reads the device and not the page cache. A file that cannot do O_DIRECT (a test's tmpfs)
//! is opened without.

use super::sys;
use crate::proto::{HEADER_BYTES, RECORD_PAYLOAD_BYTES, Record};
use crate::report::DiskSeen;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the log begins; before it is room for whatever a disk may carry.
const AREA_OFFSET_BYTES: u64 = 1 << 20;
/// The most slots that are used, whatever the disk's size (2 GiB of 512-byte slots).
const MAX_SLOTS: u64 = 4 << 20;
const SUPER_MAGIC: u64 = u64::from_le_bytes(*b"HAVMLOG1");
/// Records are written by several threads: after a crash, that many may be missing before the last.
const CRASH_WINDOW: u64 = 64;

/// A buffer that O_DIRECT takes.
#[repr(C, align(4096))]
struct Aligned([u8; 4096]);

/// The log.
pub struct Log {
    file: File,
    block_bytes: u64,
    slots: u64,
    next: Mutex<u64>,
    boot: u32,
    first_seq: u64,
    holes_at_boot: u64,
    written: AtomicU64,
    errors: AtomicU64,
}

impl Log {
    /// Opens the log on a disk, finds where the last boot left off, and counts this boot.
    pub fn open(path: &Path) -> io::Result<Log> {
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(path)
        };
        let file = open(libc::O_DIRECT | libc::O_DSYNC).or_else(|_| open(libc::O_DSYNC))?;
        let block_bytes = u64::from(sys::logical_block_bytes(&file)).clamp(512, 4096);
        let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        let room = size.saturating_sub(AREA_OFFSET_BYTES) / block_bytes;
        if room < 2 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the disk has {size} bytes, at least 2 MiB are needed"),
            ));
        }
        let mut log = Log {
            file,
            block_bytes,
            slots: (room - 1).min(MAX_SLOTS),
            next: Mutex::new(0),
            boot: 0,
            first_seq: 0,
            holes_at_boot: 0,
            written: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        };
        log.boot = log.count_boot()?;
        let (next, holes) = log.find_end()?;
        log.first_seq = next;
        log.holes_at_boot = holes;
        log.next = Mutex::new(next);
        Ok(log)
    }

    /// Differs for every boot on this disk.
    pub fn boot(&self) -> u32 {
        self.boot
    }

    fn count_boot(&self) -> io::Result<u32> {
        let mut block = Aligned([0; 4096]);
        let bytes = &mut block.0[..self.block_bytes as usize];
        self.file.read_exact_at(bytes, AREA_OFFSET_BYTES)?;
        let magic = SUPER_MAGIC.to_le_bytes();
        let before = if bytes[..8] == magic {
            u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]])
        } else {
            0
        };
        let boot = before.wrapping_add(1).max(1);
        bytes.fill(0);
        bytes[..8].copy_from_slice(&magic);
        bytes[8..12].copy_from_slice(&boot.to_le_bytes());
        self.file.write_all_at(bytes, AREA_OFFSET_BYTES)?;
        Ok(boot)
    }

    fn slot_offset(&self, seq: u64) -> u64 {
        AREA_OFFSET_BYTES + (1 + seq % self.slots) * self.block_bytes
    }

    /// The record in a slot; none where there is no valid one.
    fn read_slot(&self, slot: u64) -> io::Result<Option<Record>> {
        let mut block = Aligned([0; 4096]);
        let bytes = &mut block.0[..self.block_bytes as usize];
        self.file.read_exact_at(bytes, self.slot_offset(slot))?;
        let mut head = [0; HEADER_BYTES];
        head.copy_from_slice(&bytes[..HEADER_BYTES]);
        let Ok(record) = Record::decode(&head) else {
            return Ok(None);
        };
        let len = record.payload_len as usize;
        let whole = len <= RECORD_PAYLOAD_BYTES;
        let payload = &bytes[HEADER_BYTES..HEADER_BYTES + len.min(RECORD_PAYLOAD_BYTES)];
        if whole && crc32fast::hash(payload) != record.payload_crc {
            return Ok(None);
        }
        Ok(Some(record))
    }

    /// The sequence number after the last record, and how many before it are missing. Slots are
    /// written in turn, so those of the present lap end at one place, which halving finds.
    fn find_end(&self) -> io::Result<(u64, u64)> {
        let in_window = |slot: u64, lap: u64| -> io::Result<bool> {
            for s in slot..(slot + CRASH_WINDOW).min(self.slots) {
                if self
                    .read_slot(s)?
                    .is_some_and(|r| r.seq / self.slots == lap)
                {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let mut lap = None;
        for s in 0..CRASH_WINDOW.min(self.slots) {
            if let Some(r) = self.read_slot(s)? {
                lap = lap.max(Some(r.seq / self.slots));
            }
        }
        let Some(lap) = lap else { return Ok((0, 0)) };
        // Invariant: a record of this lap stands at or after `low`, none at or after `high`.
        let (mut low, mut high) = (0, self.slots);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if in_window(middle, lap)? {
                low = middle
            } else {
                high = middle
            }
        }
        let end = lap * self.slots + low + 1;
        let mut holes = 0;
        for seq in end.saturating_sub(CRASH_WINDOW)..end {
            if self
                .read_slot(seq % self.slots)?
                .is_none_or(|r| r.seq != seq)
            {
                holes += 1;
            }
        }
        Ok((end, holes))
    }

    /// Writes a record durably; `record.seq` is filled in. Callers may come at the same time.
    pub fn append(&self, mut record: Record, payload: &[u8]) -> io::Result<Record> {
        {
            let mut next = self.next.lock().unwrap_or_else(|e| e.into_inner());
            record.seq = *next;
            *next += 1;
        }
        let mut block = Aligned([0; 4096]);
        let kept = payload.len().min(RECORD_PAYLOAD_BYTES);
        block.0[..HEADER_BYTES].copy_from_slice(&record.encode());
        block.0[HEADER_BYTES..HEADER_BYTES + kept].copy_from_slice(&payload[..kept]);
        let bytes = &block.0[..self.block_bytes as usize];
        match self.file.write_all_at(bytes, self.slot_offset(record.seq)) {
            Ok(()) => {
                self.written.fetch_add(1, Ordering::Relaxed);
                Ok(record)
            }
            Err(e) => {
                self.errors.fetch_add(1, Ordering::Relaxed);
                Err(e)
            }
        }
    }

    /// Reads records back: 64 bytes each, zeros where the right one is not there.
    pub fn dump(&self, from: u64, count: u64) -> io::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(count as usize * HEADER_BYTES);
        for seq in from..from.saturating_add(count) {
            match self.read_slot(seq % self.slots)?.filter(|r| r.seq == seq) {
                Some(record) => out.extend_from_slice(&record.encode()),
                None => out.extend_from_slice(&[0; HEADER_BYTES]),
            }
        }
        Ok(out)
    }

    /// What it has seen.
    pub fn seen(&self) -> DiskSeen {
        DiskSeen {
            slots: self.slots,
            next_seq: *self.next.lock().unwrap_or_else(|e| e.into_inner()),
            written: self.written.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            first_seq: self.first_seq,
            holes_at_boot: self.holes_at_boot,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64) -> Record {
        Record {
            seq: 0,
            conn: 1,
            number,
            stamp_ns: 9,
            boot: 1,
            payload_crc: 0,
            payload_len: 0,
        }
    }

    fn disk(slots: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file()
            .set_len(AREA_OFFSET_BYTES + (slots + 1) * 512)
            .unwrap();
        file
    }

    /// After any number of records, also when the log went round, the next boot goes on after the
    /// last: a proof across a restart depends on it.
    #[test]
    fn a_new_boot_goes_on_after_the_last_record() {
        for count in [0, 1, 64, 65, 200, 201, 390] {
            let file = disk(200);
            let log = Log::open(file.path()).unwrap();
            for n in 0..count {
                assert_eq!(log.append(record(n), &[]).unwrap().seq, n);
            }
            let again = Log::open(file.path()).unwrap();
            assert_eq!(again.seen().first_seq, count);
            assert_eq!(again.boot(), log.boot() + 1);
            assert_eq!(again.seen().holes_at_boot, 0);
        }
    }

    /// A record that was lost or damaged on the disk must show in the dump.
    #[test]
    fn a_dump_shows_what_is_not_there() {
        let file = disk(200);
        let log = Log::open(file.path()).unwrap();
        let payload = b"what was asked";
        for n in 0..10 {
            let mut r = record(n);
            r.payload_len = payload.len() as u32;
            r.payload_crc = crc32fast::hash(payload);
            log.append(r, payload).unwrap();
        }
        // One byte of a header, one of a payload.
        file.as_file()
            .write_all_at(&[0xff], log.slot_offset(3) + 9)
            .unwrap();
        file.as_file()
            .write_all_at(&[0xff], log.slot_offset(6) + 70)
            .unwrap();
        let dump = log.dump(0, 11).unwrap();
        let there: Vec<bool> = dump
            .chunks_exact(HEADER_BYTES)
            .map(|c| Record::decode(&c.try_into().unwrap()).is_ok())
            .collect();
        let expected: Vec<bool> = (0..11).map(|i| i != 3 && i != 6 && i != 10).collect();
        assert_eq!(there, expected);
        // The hole does not hide the end.
        assert_eq!(Log::open(file.path()).unwrap().seen().first_seq, 10);
    }
}
