//! One of the two files of a journal.

use super::record::{ENTRY, HEAD, Head, encode_entry};
use crate::epoch::{DiskWrite, WriteOp};
use crate::error::{DiskError, MetaError, Result};
use crate::store::Store;
use std::path::Path;
use std::sync::Arc;

/// Where records begin.
pub(crate) const RECORDS_AT: u64 = 8192;
const HEADER: usize = 512;
const MAGIC: [u8; 8] = *b"HAVMJRN\x01";
const VERSION: u32 = 1;
const CHUNK: usize = 1 << 20;
const MAX_RECORDS: u32 = 1 << 14;

/// What a segment's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHead {
    pub(crate) disk_id: [u8; 16],
    pub(crate) generation: u64,
    /// False: nothing in here counts.
    pub(crate) in_use: bool,
    pub(crate) first_seq: u64,
    /// The checksum that its first record continues from.
    pub(crate) chain: u32,
}

impl SegmentHead {
    fn encode(&self) -> [u8; HEADER] {
        let mut o = [0u8; HEADER];
        o[..8].copy_from_slice(&MAGIC);
        o[8..12].copy_from_slice(&VERSION.to_le_bytes());
        o[16..32].copy_from_slice(&self.disk_id);
        o[32..40].copy_from_slice(&self.generation.to_le_bytes());
        o[40..48].copy_from_slice(&self.first_seq.to_le_bytes());
        o[48..52].copy_from_slice(&self.chain.to_le_bytes());
        o[52] = u8::from(self.in_use);
        let crc = crc32fast::hash(&o);
        o[12..16].copy_from_slice(&crc.to_le_bytes());
        o
    }

    fn decode(o: &[u8; HEADER]) -> Option<SegmentHead> {
        let u32_at = |i: usize| u32::from_le_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        let mut disk_id = [0u8; 16];
        disk_id.copy_from_slice(&o[16..32]);
        let h = SegmentHead {
            disk_id,
            generation: u64_at(32),
            in_use: o[52] == 1,
            first_seq: u64_at(40),
            chain: u32_at(48),
        };
        (h.encode() == *o).then_some(h)
    }
}

#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) head: SegmentHead,
    /// Where the next record goes.
    pub(crate) tail: u64,
    pub(crate) records: u32,
    /// Counts writes to the file, and those of them known to be durable.
    pub(crate) writes: u64,
    pub(crate) synced: u64,
}

impl Segment {
    /// Reads the newer intact header; none for a file that never was a segment. Both copies
    /// damaged in a file that is long enough is an error: its records may have been needed.
    pub(crate) fn read(store: &Arc<dyn Store>, meta: &Path) -> Result<Option<SegmentHead>> {
        let io = |r: std::io::Result<()>| r.map_err(DiskError::io("reading the disk journal"));
        let len = store
            .size()
            .map_err(DiskError::io("size of the disk journal"))?;
        if len < RECORDS_AT {
            return Ok(None);
        }
        let mut best: Option<SegmentHead> = None;
        let mut blank = true;
        for copy in [0, 4096] {
            let mut raw = [0u8; HEADER];
            io(store.read_at(copy, &mut raw))?;
            blank &= raw.iter().all(|b| *b == 0);
            if let Some(h) = SegmentHead::decode(&raw)
                && best.is_none_or(|b| b.generation < h.generation)
            {
                best = Some(h);
            }
        }
        match best {
            None if !blank => Err(MetaError::journal(
                meta,
                "both headers of a segment are damaged",
            )),
            found => Ok(found),
        }
    }

    /// Whether the other segment's turn has come. An idle guest's empty epochs fill no segment, but
    /// a replay would have to walk through them.
    pub(crate) fn full(&self, segment_bytes: u64) -> bool {
        self.tail >= segment_bytes || self.records >= MAX_RECORDS
    }

    /// Writes the next header; durable after a flush.
    pub(crate) fn set_head(&mut self, in_use: bool, first_seq: u64, chain: u32) -> Result<()> {
        self.head.generation += 1;
        self.head.in_use = in_use;
        self.head.first_seq = first_seq;
        self.head.chain = chain;
        self.tail = RECORDS_AT;
        self.records = 0;
        self.writes += 1;
        self.store
            .write_at((self.head.generation % 2) * 4096, &self.head.encode())
            .map_err(DiskError::io("writing the disk journal"))
    }

    /// Appends a record and returns its head as written, or none where `stop` said so in the
    /// middle (the record then never happened).
    pub(crate) fn append(
        &mut self,
        mut head: Head,
        writes: &[DiskWrite],
        stop: impl Fn() -> bool,
    ) -> Result<Option<Head>> {
        let data: u64 = writes
            .iter()
            .map(|w| {
                if let WriteOp::Data(d) = &w.op {
                    d.len() as u64
                } else {
                    0
                }
            })
            .sum();
        head.entries = writes.len() as u32;
        head.payload = writes.len() as u64 * ENTRY as u64 + data;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&head.for_crc());
        let io = DiskError::io("appending to the disk journal");
        let mut out = Out {
            store: &*self.store,
            at: self.tail + HEAD as u64,
            buf: Vec::new(),
        };
        let done = (|| {
            for w in writes {
                let e = encode_entry(w);
                crc.update(&e);
                out.put(&e)?;
            }
            for w in writes {
                if let WriteOp::Data(d) = &w.op {
                    crc.update(d);
                    out.put(d)?;
                }
                if stop() {
                    return Ok(false);
                }
            }
            out.spill().map(|()| true)
        })();
        match done {
            Err(e) => return Err(io(e)),
            Ok(false) => return Ok(None),
            Ok(true) => (),
        }
        head.crc = crc.finalize();
        self.store.write_at(self.tail, &head.encode()).map_err(io)?;
        self.tail += HEAD as u64 + head.payload;
        self.records += 1;
        self.writes += 1;
        Ok(Some(head))
    }
}

/// Gathers small pieces into large writes; large pieces are written as they are.
struct Out<'a> {
    store: &'a dyn Store,
    at: u64,
    buf: Vec<u8>,
}

impl Out<'_> {
    fn put(&mut self, piece: &[u8]) -> std::io::Result<()> {
        if self.buf.len() + piece.len() > CHUNK {
            self.spill()?;
        }
        if piece.len() >= CHUNK / 2 {
            self.spill()?;
            self.store.write_at(self.at, piece)?;
            self.at += piece.len() as u64;
        } else {
            self.buf.extend_from_slice(piece);
        }
        Ok(())
    }

    fn spill(&mut self) -> std::io::Result<()> {
        if !self.buf.is_empty() {
            self.store.write_at(self.at, &self.buf)?;
            self.at += self.buf.len() as u64;
            self.buf.clear();
        }
        Ok(())
    }
}
