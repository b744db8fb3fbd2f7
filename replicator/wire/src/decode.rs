//! Bytes into frames: whatever the bytes are, the answer is a frame within its bounds or an error.

use crate::codec::{DecodeError, Get};
use crate::frame::*;
use crate::packed::Packed;
use crate::raw::RawFrame;
use bytes::Bytes;
use havm_core::ids::{EpochNo, GuestName, LifeId, StreamId, Term};
use havm_core::order::StreamBase;

/// Numbers of the kinds of frames. Below 0x40 primary to standby, below 0x80 back, then per link.
pub(crate) mod kind {
    pub const STREAM_START: u8 = 0x01;
    pub const EPOCH_BEGIN: u8 = 0x02;
    pub const PAGES: u8 = 0x03;
    pub const DISK_WRITE: u8 = 0x04;
    pub const DISK_SYNC: u8 = 0x05;
    pub const DEVICE_STATE: u8 = 0x06;
    pub const EPOCH_END: u8 = 0x07;
    pub const HASH_RANGE: u8 = 0x08;
    pub const PEER_SET_REQUEST: u8 = 0x09;
    pub const VERIFY_AT: u8 = 0x0a;
    pub const VERIFY_RAM: u8 = 0x0b;
    pub const VERIFY_DISK: u8 = 0x0c;
    pub const VERIFY_END: u8 = 0x0d;
    pub const BYE: u8 = 0x0e;
    pub const BACK_ACK: u8 = 0x41;
    pub const BACK_DURABLE: u8 = 0x42;
    pub const BACK_HASH_REPLY: u8 = 0x43;
    pub const BACK_PEER_SET: u8 = 0x44;
    pub const BACK_VERIFIED: u8 = 0x45;
    pub const BACK_BYE: u8 = 0x46;
    pub const HELLO: u8 = 0x81;
    pub const WELCOME: u8 = 0x82;
    pub const REFUSED: u8 = 0x83;
    pub const POSITION: u8 = 0x84;
}

impl Frame {
    /// Reads a received frame. Data stays in the received buffer.
    pub fn decode(raw: &RawFrame) -> Result<Frame, DecodeError> {
        let p = &raw.payload;
        let mut g = Get::new(name(raw.header.kind), p);
        let frame = match raw.header.kind {
            kind::STREAM_START => Frame::StreamStart(Box::new(get_start(&mut g)?)),
            kind::EPOCH_BEGIN => Frame::EpochBegin {
                n: EpochNo(g.u64()?),
                bulk: g.bool()?,
            },
            kind::PAGES => Frame::Pages {
                block: g.u16()?,
                entries: g.rest(p),
            },
            kind::DISK_WRITE => Frame::DiskWrite(get_write(&mut g, p)?),
            kind::DISK_SYNC => {
                let (disk, block) = (g.u16()?, g.u64()?);
                let data = if g.bool()? {
                    Some(Packed::get(&mut g, p)?)
                } else {
                    None
                };
                Frame::DiskSync(DiskSync { disk, block, data })
            }
            kind::DEVICE_STATE => Frame::DeviceState(Packed::get(&mut g, p)?),
            kind::EPOCH_END => Frame::EpochEnd(EpochEnd {
                n: EpochNo(g.u64()?),
                eligible: g.bool()?,
                shutdown: g.bool()?,
                tally: Tally {
                    pages: g.u64()?,
                    writes: g.u64()?,
                    syncs: g.u64()?,
                    digest: g.u64()?,
                },
            }),
            kind::HASH_RANGE => Frame::HashRange(get_hashes(&mut g)?),
            kind::PEER_SET_REQUEST => Frame::PeerSetRequest { disk: g.u16()? },
            kind::VERIFY_AT => Frame::VerifyAt {
                id: g.u64()?,
                n: EpochNo(g.u64()?),
            },
            kind::VERIFY_RAM => Frame::VerifyRam(get_hashes(&mut g)?),
            kind::VERIFY_DISK => Frame::VerifyDisk(get_hashes(&mut g)?),
            kind::VERIFY_END => Frame::VerifyEnd { id: g.u64()? },
            kind::BYE => Frame::Bye {
                reason: g.text(MAX_TEXT_BYTES)?.to_owned(),
            },
            other => return Err(g.bad(format!("unknown kind {other:#04x}"))),
        };
        g.end()?;
        Ok(frame)
    }
}

/// The name of a kind, for errors and logs.
pub(crate) fn name(kind: u8) -> &'static str {
    match kind {
        kind::STREAM_START => "StreamStart",
        kind::EPOCH_BEGIN => "EpochBegin",
        kind::PAGES => "Pages",
        kind::DISK_WRITE => "DiskWrite",
        kind::DISK_SYNC => "DiskSync",
        kind::DEVICE_STATE => "DeviceState",
        kind::EPOCH_END => "EpochEnd",
        kind::HASH_RANGE => "HashRange",
        kind::PEER_SET_REQUEST => "PeerSetRequest",
        kind::VERIFY_AT => "VerifyAt",
        kind::VERIFY_RAM => "VerifyRam",
        kind::VERIFY_DISK => "VerifyDisk",
        kind::VERIFY_END => "VerifyEnd",
        kind::BYE => "Bye",
        kind::BACK_ACK => "Ack",
        kind::BACK_DURABLE => "Durable",
        kind::BACK_HASH_REPLY => "HashReply",
        kind::BACK_PEER_SET => "PeerSet",
        kind::BACK_VERIFIED => "Verified",
        kind::BACK_BYE => "Bye (standby)",
        kind::HELLO => "Hello",
        kind::WELCOME => "Welcome",
        kind::REFUSED => "Refused",
        kind::POSITION => "Position",
        _ => "unknown",
    }
}

fn get_start(g: &mut Get<'_>) -> Result<StreamStart, DecodeError> {
    let guest = get_guest(g)?;
    let term = Term(g.u64()?);
    let stream = StreamId(g.array()?);
    let (my_life, peer_life) = (LifeId(g.array()?), LifeId(g.array()?));
    let base = match g.u8()? {
        0 => StreamBase::Unknown,
        1 => StreamBase::Equal,
        n => return Err(g.bad(format!("unknown base {n}"))),
    };
    let machine = g.text(MAX_NAME_BYTES)?.to_owned();
    let mut blocks = Vec::new();
    for _ in 0..g.count(MAX_BLOCKS, 19)? {
        blocks.push(RamBlock {
            name: g.text(MAX_NAME_BYTES)?.to_owned(),
            len: g.u64()?,
            guest_addr: g.u64()?,
            shared: g.bool()?,
        });
    }
    let mut disks = Vec::new();
    for _ in 0..g.count(MAX_DISKS, 12)? {
        let disk = DiskShape {
            size: g.u64()?,
            block_bytes: g.u32()?,
        };
        if !disk.block_bytes.is_power_of_two() || !(512..=1 << 20).contains(&disk.block_bytes) {
            return Err(g.bad(format!("a disk block of {} bytes", disk.block_bytes)));
        }
        disks.push(disk);
    }
    Ok(StreamStart {
        guest,
        term,
        stream,
        my_life,
        peer_life,
        base,
        blocks,
        disks,
        machine,
    })
}

pub(crate) fn get_guest(g: &mut Get<'_>) -> Result<GuestName, DecodeError> {
    let text = g.text(MAX_NAME_BYTES)?;
    text.parse().map_err(|e| g.bad(format!("{e}")))
}

fn get_write(g: &mut Get<'_>, whole: &Bytes) -> Result<DiskWrite, DecodeError> {
    let (disk, offset, tag) = (g.u16()?, g.u64()?, g.u8()?);
    let mut empty = || {
        let len = g.u32()?;
        if len > MAX_EMPTY_WRITE_BYTES {
            return Err(g.bad(format!("{len} bytes, at most {MAX_EMPTY_WRITE_BYTES}")));
        }
        Ok(len)
    };
    let kind = match tag {
        0 => WriteKind::Data(Packed::get(g, whole)?),
        1 | 2 => WriteKind::Zero {
            punch: tag == 2,
            len: empty()?,
        },
        3 => WriteKind::Trim { len: empty()? },
        n => return Err(g.bad(format!("unknown kind of write {n}"))),
    };
    let write = DiskWrite { disk, offset, kind };
    if offset.checked_add(write.len()).is_none() {
        return Err(g.bad("a write beyond the end of all numbers"));
    }
    Ok(write)
}

fn get_hashes(g: &mut Get<'_>) -> Result<HashRange, DecodeError> {
    let (id, object, first) = (g.u64()?, g.u16()?, g.u64()?);
    let n = g.count(MAX_HASHES, 16)?;
    if first.checked_add(n as u64).is_none() {
        return Err(g.bad("a range beyond the end of all numbers"));
    }
    let hashes = (0..n).map(|_| g.array()).collect::<Result<_, _>>()?;
    Ok(HashRange {
        id,
        object,
        first,
        hashes,
    })
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
