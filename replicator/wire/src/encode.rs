//! Frames into bytes.

use crate::codec::Put;
use crate::decode::kind;
use crate::frame::*;
use crate::raw::{Encoded, TooLarge};
use havm_core::order::StreamBase;

impl Frame {
    /// The frame, ready to be sent. Fails only for content beyond the bounds that this crate names.
    pub fn encode(&self) -> Result<Encoded, TooLarge> {
        let mut b = Vec::new();
        let kind = match self {
            Frame::StreamStart(s) => {
                put_start(&mut b, s);
                kind::STREAM_START
            }
            Frame::EpochBegin { n, bulk } => {
                b.u64(n.0);
                b.u8(u8::from(*bulk));
                kind::EPOCH_BEGIN
            }
            Frame::Pages { block, entries } => {
                b.reserve_exact(2 + entries.len());
                b.u16(*block);
                b.extend_from_slice(entries);
                kind::PAGES
            }
            Frame::DiskWrite(w) => {
                put_write(&mut b, w);
                kind::DISK_WRITE
            }
            Frame::DiskSync(s) => {
                b.u16(s.disk);
                b.u64(s.block);
                b.u8(u8::from(s.data.is_some()));
                if let Some(d) = &s.data {
                    d.put(&mut b);
                }
                kind::DISK_SYNC
            }
            Frame::DeviceState(d) => {
                d.put(&mut b);
                kind::DEVICE_STATE
            }
            Frame::EpochEnd(e) => {
                b.u64(e.n.0);
                b.u8(u8::from(e.eligible));
                b.u8(u8::from(e.shutdown));
                for v in [e.tally.pages, e.tally.writes, e.tally.syncs, e.tally.digest] {
                    b.u64(v);
                }
                kind::EPOCH_END
            }
            Frame::HashRange(r) => {
                put_hashes(&mut b, r);
                kind::HASH_RANGE
            }
            Frame::PeerSetRequest { disk } => {
                b.u16(*disk);
                kind::PEER_SET_REQUEST
            }
            Frame::VerifyAt { id, n } => {
                b.u64(*id);
                b.u64(n.0);
                kind::VERIFY_AT
            }
            Frame::VerifyRam(r) => {
                put_hashes(&mut b, r);
                kind::VERIFY_RAM
            }
            Frame::VerifyDisk(r) => {
                put_hashes(&mut b, r);
                kind::VERIFY_DISK
            }
            Frame::VerifyEnd { id } => {
                b.u64(*id);
                kind::VERIFY_END
            }
            Frame::Bye { reason } => {
                b.text(reason, MAX_TEXT_BYTES);
                kind::BYE
            }
        };
        Encoded::new(kind, b.into())
    }
}

/// A [`Frame::Pages`] whose payload (the block's index in the first two bytes, then entries) was
/// built in place.
pub(crate) fn pages_payload(payload: Vec<u8>) -> Result<Encoded, TooLarge> {
    Encoded::new(kind::PAGES, payload.into())
}

fn put_start(b: &mut Vec<u8>, s: &StreamStart) {
    b.text(s.guest.as_str(), MAX_NAME_BYTES);
    b.u64(s.term.0);
    b.extend_from_slice(&s.stream.0);
    b.extend_from_slice(&s.my_life.0);
    b.extend_from_slice(&s.peer_life.0);
    b.u8(match s.base {
        StreamBase::Unknown => 0,
        StreamBase::Equal => 1,
    });
    b.text(&s.machine, MAX_NAME_BYTES);
    b.u32(s.blocks.len() as u32);
    for r in &s.blocks {
        b.text(&r.name, MAX_NAME_BYTES);
        b.u64(r.len);
        b.u64(r.guest_addr);
        b.u8(u8::from(r.shared));
    }
    b.u32(s.disks.len() as u32);
    for d in &s.disks {
        b.u64(d.size);
        b.u32(d.block_bytes);
    }
}

fn put_write(b: &mut Vec<u8>, w: &DiskWrite) {
    b.u16(w.disk);
    b.u64(w.offset);
    match &w.kind {
        WriteKind::Data(d) => {
            b.reserve_exact(6 + d.packed_len());
            b.u8(0);
            d.put(b);
        }
        WriteKind::Zero { punch, len } => {
            b.u8(if *punch { 2 } else { 1 });
            b.u32(*len);
        }
        WriteKind::Trim { len } => {
            b.u8(3);
            b.u32(*len);
        }
    }
}

fn put_hashes(b: &mut Vec<u8>, r: &HashRange) {
    b.u64(r.id);
    b.u16(r.object);
    b.u64(r.first);
    b.u32(r.hashes.len() as u32);
    for h in &r.hashes {
        b.extend_from_slice(h);
    }
}
