//! What a journal says after a crash, put in place.
//!
//! Two passes: the first follows the chain and checks every record; the second applies those that
//! were not dropped. Applying twice does no harm, so a crash during replay does none either.

use super::record::{ENTRY, HEAD, Head, Kind, decode_entry};
use super::segment::{RECORDS_AT, Segment, SegmentHead};
use crate::error::{DiskError, MetaError, Result};
use crate::store::Store;
use havm_core::ids::{EpochNo, StreamId};
use std::path::PathBuf;
use std::sync::Arc;

const CHUNK: usize = 1 << 20;

/// What a replay did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Replayed {
    /// Records applied.
    pub records: u64,
    /// Bytes written in place.
    pub bytes: u64,
    /// The last epoch that is now in place, where the journal named one.
    pub last: Option<(StreamId, EpochNo)>,
}

#[derive(Debug)]
struct Found {
    head: Head,
    segment: usize,
    at: u64,
}

/// Applies the journal in both segments to the disk and makes that durable. `upto` leaves out
/// epochs of that stream after that number (staged, but never committed).
fn replay(
    disk: &dyn Store,
    size: u64,
    files: &Files,
    heads: &[Option<SegmentHead>; 2],
    upto: Option<(StreamId, EpochNo)>,
) -> Result<(Replayed, u64)> {
    let found = scan(&files.segments, heads)?;
    let drops: Vec<Head> = found
        .iter()
        .map(|f| f.head)
        .filter(|h| h.kind == Kind::Drop)
        .collect();
    let next_seq = found.last().map_or(1, |f| f.head.seq + 1);
    let mut out = Replayed::default();
    for f in &found {
        let dropped = f.head.kind == Kind::Epoch
            && drops
                .iter()
                .any(|d| d.seq > f.head.seq && d.epoch < f.head.seq);
        let beyond = upto.is_some_and(|(s, n)| {
            f.head.kind == Kind::Epoch && f.head.stream == s.0 && f.head.epoch > n.0
        });
        if dropped || beyond || f.head.kind == Kind::Drop {
            continue;
        }
        out.bytes += apply(disk, size, files, f)?;
        out.records += 1;
        if f.head.kind == Kind::Epoch {
            out.last = Some((StreamId(f.head.stream), EpochNo(f.head.epoch)));
        }
    }
    if out.records > 0 {
        disk.flush()
            .map_err(DiskError::io("flushing the disk after replay"))?;
    }
    Ok((out, next_seq))
}

/// All records that continue the chain, over both segments.
fn scan(segments: &[Arc<dyn Store>; 2], heads: &[Option<SegmentHead>; 2]) -> Result<Vec<Found>> {
    let mut order: Vec<usize> = (0..2)
        .filter(|i| heads[*i].is_some_and(|h| h.in_use))
        .collect();
    order.sort_by_key(|i| heads[*i].map(|h| h.first_seq));
    let mut found: Vec<Found> = Vec::new();
    for i in order {
        let Some(h) = heads[i] else { continue };
        let (mut seq, mut chain) = (h.first_seq, h.chain);
        if let Some(last) = found.last()
            && (last.head.seq + 1 != seq || last.head.crc != chain)
        {
            // The earlier segment's end did not reach the disk: what follows did not happen.
            break;
        }
        let mut at = RECORDS_AT;
        while let Some(head) = check(&*segments[i], at)? {
            if head.seq != seq || head.chain != chain {
                break;
            }
            found.push(Found {
                head,
                segment: i,
                at,
            });
            (seq, chain) = (seq + 1, head.crc);
            at += HEAD as u64 + head.payload;
        }
    }
    Ok(found)
}

/// The head of the record at `at`, if all of it is intact.
fn check(seg: &dyn Store, at: u64) -> Result<Option<Head>> {
    let io = |r: std::io::Result<()>| r.map_err(DiskError::io("reading the disk journal"));
    let size = seg
        .size()
        .map_err(DiskError::io("size of the disk journal"))?;
    if at + HEAD as u64 > size {
        return Ok(None);
    }
    let mut raw = [0u8; HEAD];
    io(seg.read_at(at, &mut raw))?;
    let Some(head) = Head::decode(&raw) else {
        return Ok(None);
    };
    if head.payload > size - at - HEAD as u64 {
        return Ok(None);
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head.for_crc());
    let mut buf = vec![0u8; CHUNK.min(head.payload as usize)];
    let (mut p, end) = (at + HEAD as u64, at + HEAD as u64 + head.payload);
    while p < end {
        let n = (end - p).min(CHUNK as u64) as usize;
        io(seg.read_at(p, &mut buf[..n]))?;
        crc.update(&buf[..n]);
        p += n as u64;
    }
    Ok((crc.finalize() == head.crc).then_some(head))
}

fn apply(disk: &dyn Store, size: u64, files: &Files, f: &Found) -> Result<u64> {
    let seg = &*files.segments[f.segment];
    let io = |r: std::io::Result<()>| r.map_err(DiskError::io("replaying the disk journal"));
    let table_at = f.at + HEAD as u64;
    let mut data_at = table_at + u64::from(f.head.entries) * ENTRY as u64;
    let mut written = 0;
    let mut buf = vec![0u8; CHUNK];
    for e in 0..u64::from(f.head.entries) {
        let mut raw = [0u8; ENTRY];
        io(seg.read_at(table_at + e * ENTRY as u64, &mut raw))?;
        let Some((mut offset, mut len, zero)) = decode_entry(&raw) else {
            continue;
        };
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(MetaError::journal(
                &files.meta,
                "it names blocks outside the disk",
            ));
        }
        if zero {
            io(disk.zero_at(offset, len, true))?;
            continue;
        }
        while len > 0 {
            let n = len.min(CHUNK as u64) as usize;
            io(seg.read_at(data_at, &mut buf[..n]))?;
            io(disk.write_at(offset, &buf[..n]))?;
            data_at += n as u64;
            offset += n as u64;
            len -= n as u64;
            written += n as u64;
        }
    }
    Ok(written)
}

/// The journal's files, and what is expected of them.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) segments: [Arc<dyn Store>; 2],
    /// The metadata's path, for errors.
    pub(crate) meta: PathBuf,
    pub(crate) disk_id: [u8; 16],
    /// Bytes to reserve in each.
    pub(crate) segment_bytes: u64,
    /// They may be empty.
    pub(crate) fresh: bool,
}

/// Opens both segments, replays them and leaves them empty and durable.
pub(crate) fn open(
    disk: &dyn Store,
    size: u64,
    files: Files,
    upto: Option<(StreamId, EpochNo)>,
) -> Result<([Segment; 2], Replayed, u64)> {
    let read = |i: usize| Segment::read(&files.segments[i], &files.meta);
    let heads = [read(0)?, read(1)?];
    if !files.fresh && heads.iter().any(Option::is_none) {
        return Err(MetaError::journal(
            &files.meta,
            "a segment was never set up, or is emptied",
        ));
    }
    if heads.iter().flatten().any(|h| h.disk_id != files.disk_id) {
        return Err(MetaError::journal(
            &files.meta,
            "it belongs to another disk",
        ));
    }
    let (done, next_seq) = replay(disk, size, &files, &heads, upto)?;
    let mut next_seq = next_seq;
    for h in heads.iter().flatten() {
        next_seq = next_seq.max(h.first_seq);
    }
    // Records that the crash cut off the chain lie about with the numbers that would come next:
    // skip so far that none of them can ever be continued to.
    next_seq = (next_seq | u64::from(u32::MAX)) + 1;
    let io = |r: std::io::Result<()>| r.map_err(DiskError::io("resetting the disk journal"));
    let Files {
        segments: [a, b],
        disk_id,
        segment_bytes,
        ..
    } = files;
    let make = |store: Arc<dyn Store>, old: Option<SegmentHead>| -> Result<Segment> {
        io(store.reserve(segment_bytes.max(RECORDS_AT)))?;
        let head = old.unwrap_or(SegmentHead {
            disk_id,
            generation: 0,
            in_use: false,
            first_seq: 0,
            chain: 0,
        });
        let mut s = Segment {
            store,
            head,
            tail: RECORDS_AT,
            records: 0,
            writes: 0,
            synced: 0,
        };
        s.set_head(false, next_seq, 0)?;
        io(s.store.flush())?;
        s.synced = s.writes;
        Ok(s)
    };
    Ok(([make(a, heads[0])?, make(b, heads[1])?], done, next_seq))
}
