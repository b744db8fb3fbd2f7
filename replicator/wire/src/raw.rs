//! A frame as it travels: a header of 24 bytes and a payload of bounded size.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | kind |
//! | 1..4 | 0 |
//! | 4..8 | payload length |
//! | 8..16 | sequence number in its direction, from 1; 0 for what belongs to one link only |
//! | 16..20 | CRC-32 of the payload |
//! | 20..24 | CRC-32 of bytes 0..20 |
//!
//! TLS already protects against the network; the checksums find faults of memory and of software
//! between one side's encoder and the other's decoder.

use crate::codec::{DecodeError, Get};
use bytes::Bytes;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 24;
/// Largest payload, bytes.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;
/// Frames with much data are best made about this large, bytes: small enough to share work between
/// links and to let an urgent frame pass soon, large enough that the header does not matter.
pub const GOOD_PAYLOAD_BYTES: usize = 128 << 10;

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What kind of frame: see [`crate::frame`], [`crate::back`], [`crate::hello`].
    pub kind: u8,
    /// Payload length, bytes.
    pub len: usize,
    /// Sequence number, or 0.
    pub seq: u64,
    payload_crc: u32,
}

impl Header {
    /// Reads and checks a header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let mut g = Get::new("frame header", bytes);
        let (kind, zero) = (g.u8()?, g.array::<3>()?);
        let (len, seq, payload_crc) = (g.u32()? as usize, g.u64()?, g.u32()?);
        if g.u32()? != crc32fast::hash(&bytes[..20]) {
            return Err(g.bad("wrong checksum"));
        }
        if zero != [0; 3] {
            return Err(g.bad("reserved bytes are not zero"));
        }
        if len > MAX_PAYLOAD_BYTES {
            return Err(g.bad(format!(
                "a payload of {len} bytes, at most {MAX_PAYLOAD_BYTES}"
            )));
        }
        Ok(Header {
            kind,
            len,
            seq,
            payload_crc,
        })
    }

    /// CRC-32 of the payload, as announced.
    pub fn payload_crc(&self) -> u32 {
        self.payload_crc
    }

    /// Checks a payload against the header.
    pub fn check(&self, payload: &[u8]) -> Result<(), DecodeError> {
        let bad = |why| DecodeError {
            what: "frame payload",
            at: 0,
            why,
        };
        if payload.len() != self.len {
            return Err(bad(format!(
                "{} bytes, {} announced",
                payload.len(),
                self.len
            )
            .into()));
        }
        if crc32fast::hash(payload) != self.payload_crc {
            return Err(bad("wrong checksum".into()));
        }
        Ok(())
    }
}

/// A frame that is ready to be sent; the sequence number is given when it is queued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    kind: u8,
    crc: u32,
    payload: Bytes,
}

/// A payload over the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a frame of kind {kind:#04x} would have {len} bytes, at most {MAX_PAYLOAD_BYTES} travel: split it"
)]
pub struct TooLarge {
    /// The kind.
    pub kind: u8,
    /// Its payload's length.
    pub len: usize,
}

impl Encoded {
    pub(crate) fn new(kind: u8, payload: Bytes) -> Result<Self, TooLarge> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(TooLarge {
                kind,
                len: payload.len(),
            });
        }
        Ok(Encoded {
            kind,
            crc: crc32fast::hash(&payload),
            payload,
        })
    }

    /// The kind of frame.
    pub fn kind(&self) -> u8 {
        self.kind
    }
    /// The payload.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }
    /// CRC-32 of the payload.
    pub fn crc(&self) -> u32 {
        self.crc
    }
    /// Bytes on the wire, before encryption.
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }
    /// The header for sequence number `seq`.
    pub fn header(&self, seq: u64) -> [u8; HEADER_BYTES] {
        let mut h = [0; HEADER_BYTES];
        h[0] = self.kind;
        h[4..8].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        h[8..16].copy_from_slice(&seq.to_le_bytes());
        h[16..20].copy_from_slice(&self.crc.to_le_bytes());
        let crc = crc32fast::hash(&h[..20]);
        h[20..].copy_from_slice(&crc.to_le_bytes());
        h
    }
}

/// A frame that was received: header and checksums are right, the content was not looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFrame {
    /// The header.
    pub header: Header,
    /// The payload.
    pub payload: Bytes,
}

/// Cuts a stream of bytes into frames. Memory: one frame.
#[derive(Debug, Default)]
pub struct Splitter {
    head: Vec<u8>,
    open: Option<(Header, Vec<u8>)>,
}

impl Splitter {
    /// Takes bytes as they come; calls `out` for each whole frame. After an error the
    /// connection is of no more use.
    pub fn push(
        &mut self,
        mut bytes: &[u8],
        mut out: impl FnMut(RawFrame),
    ) -> Result<(), DecodeError> {
        loop {
            if self.open.is_none() {
                let want = (HEADER_BYTES - self.head.len()).min(bytes.len());
                self.head.extend_from_slice(&bytes[..want]);
                bytes = &bytes[want..];
                let Ok(head) = <&[u8; HEADER_BYTES]>::try_from(self.head.as_slice()) else {
                    return Ok(());
                };
                let header = Header::decode(head)?;
                self.head.clear();
                self.open = Some((header, Vec::with_capacity(header.len)));
            }
            if let Some((header, mut payload)) = self.open.take() {
                let want = (header.len - payload.len()).min(bytes.len());
                payload.extend_from_slice(&bytes[..want]);
                bytes = &bytes[want..];
                if payload.len() < header.len {
                    self.open = Some((header, payload));
                    return Ok(());
                }
                header.check(&payload)?;
                out(RawFrame {
                    header,
                    payload: payload.into(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..12),
            cut in 1usize..60,
        ) {
            let mut wire = Vec::new();
            for (i, p) in payloads.iter().enumerate() {
                let e = Encoded::new(7, Bytes::copy_from_slice(p)).unwrap();
                wire.extend_from_slice(&e.header(i as u64));
                wire.extend_from_slice(p);
            }
            let mut got = Vec::new();
            let mut s = Splitter::default();
            for piece in wire.chunks(cut) {
                s.push(piece, |f| got.push((f.header.seq, f.payload.to_vec()))).unwrap();
            }
            let want: Vec<_> = payloads.into_iter().enumerate().map(|(i, p)| (i as u64, p)).collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Splitter::default().push(&bytes, |_| ());
        }

        #[test]
        fn one_flipped_bit_is_found(
            payload in prop::collection::vec(any::<u8>(), 1..100), bit: prop::sample::Index,
        ) {
            let e = Encoded::new(7, Bytes::from(payload)).unwrap();
            let mut wire = e.header(3).to_vec();
            wire.extend_from_slice(e.payload());
            let bit = bit.index(wire.len() * 8);
            wire[bit / 8] ^= 1 << (bit % 8);
            let mut seen = 0;
            let result = Splitter::default().push(&wire, |_| seen += 1);
            prop_assert!(result.is_err() && seen == 0);
        }
    }

    #[test]
    fn an_announced_length_over_the_bound_is_refused_before_memory_is_taken() {
        let mut h = Encoded::new(7, Bytes::new()).unwrap().header(1);
        h[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32fast::hash(&h[..20]);
        h[20..].copy_from_slice(&crc.to_le_bytes());
        let e = Header::decode(&h).unwrap_err();
        assert!(e.to_string().contains("at most"), "{e}");
    }
}
