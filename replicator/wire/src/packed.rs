//! Bytes that are compressed where that pays.

use crate::codec::{DecodeError, Get, Put};
use crate::raw::MAX_PAYLOAD_BYTES;
use bytes::Bytes;
use std::borrow::Cow;

/// Bytes, plain or compressed.
#[derive(Clone, PartialEq, Eq)]
pub struct Packed {
    raw_len: u32,
    lz4: bool,
    data: Bytes,
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.lz4 { "lz4" } else { "plain" };
        write!(
            f,
            "Packed({} bytes, {kind} in {})",
            self.raw_len,
            self.data.len()
        )
    }
}

/// Packed bytes that do not unpack: a fault of the sender, as checksums were right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{packed} compressed bytes do not unpack to {raw}: {why}")]
pub struct UnpackError {
    packed: usize,
    raw: usize,
    why: String,
}

impl Packed {
    /// Compresses `bytes` if that saves an eighth or more. `None` over
    /// [`MAX_PAYLOAD_BYTES`] less 64 KiB: too large for a frame, split it.
    pub fn pack(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > Self::MAX_RAW_BYTES {
            return None;
        }
        let small = lz4_flex::block::compress(bytes);
        Some(
            if small.len() <= bytes.len() - bytes.len() / 8 && small.len() < bytes.len() {
                Packed {
                    raw_len: bytes.len() as u32,
                    lz4: true,
                    data: small.into(),
                }
            } else {
                Packed {
                    raw_len: bytes.len() as u32,
                    lz4: false,
                    data: Bytes::copy_from_slice(bytes),
                }
            },
        )
    }

    /// Most bytes that one frame carries, unpacked.
    pub const MAX_RAW_BYTES: usize = MAX_PAYLOAD_BYTES - (64 << 10);

    /// Bytes when unpacked.
    pub fn raw_len(&self) -> usize {
        self.raw_len as usize
    }

    /// Bytes as they travel.
    pub fn packed_len(&self) -> usize {
        self.data.len()
    }

    /// The bytes.
    pub fn unpack(&self) -> Result<Cow<'_, [u8]>, UnpackError> {
        if !self.lz4 {
            return Ok(Cow::Borrowed(&self.data));
        }
        let mut out = vec![0; self.raw_len()];
        self.unpack_into(&mut out)?;
        Ok(Cow::Owned(out))
    }

    /// Unpacks into `out`, whose length must be [`Packed::raw_len`].
    pub fn unpack_into(&self, out: &mut [u8]) -> Result<(), UnpackError> {
        let raw = self.raw_len();
        let fail = |why: String| UnpackError {
            packed: self.data.len(),
            raw,
            why,
        };
        if out.len() != raw {
            return Err(fail(format!("room for {} bytes", out.len())));
        }
        if !self.lz4 {
            out.copy_from_slice(&self.data);
            return Ok(());
        }
        match lz4_flex::block::decompress_into(&self.data, out) {
            Ok(n) if n == raw => Ok(()),
            Ok(n) => Err(fail(format!("{n} bytes came out"))),
            Err(e) => Err(fail(e.to_string())),
        }
    }

    pub(crate) fn put(&self, to: &mut Vec<u8>) {
        Put::u8(to, u8::from(self.lz4));
        Put::u32(to, self.raw_len);
        to.extend_from_slice(&self.data);
    }

    /// Takes all that is left of `whole`.
    pub(crate) fn get(g: &mut Get<'_>, whole: &Bytes) -> Result<Self, DecodeError> {
        let (lz4, raw_len) = (g.bool()?, g.u32()?);
        if raw_len as usize > Self::MAX_RAW_BYTES {
            return Err(g.bad(format!(
                "{raw_len} bytes unpacked, at most {} allowed",
                Self::MAX_RAW_BYTES
            )));
        }
        if !lz4 && g.left() != raw_len as usize {
            return Err(g.bad(format!(
                "{raw_len} plain bytes announced, {} there",
                g.left()
            )));
        }
        Ok(Packed {
            raw_len,
            lz4,
            data: g.rest(whole),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_give_the_bytes_back_and_lies_about_the_length_are_told() {
        let noise: Vec<u8> = (0..5000u32)
            .map(|i| (i.wrapping_mul(2654435761) >> 13) as u8)
            .collect();
        for bytes in [vec![], vec![7; 5000], noise] {
            let p = Packed::pack(&bytes).unwrap();
            assert_eq!(p.unpack().unwrap(), bytes);
            let mut wire = Vec::new();
            p.put(&mut wire);
            let whole = Bytes::from(wire);
            assert_eq!(Packed::get(&mut Get::new("test", &whole), &whole), Ok(p));
        }
        let mut p = Packed::pack(&[7; 5000]).unwrap();
        p.raw_len = 4999;
        assert!(p.unpack().is_err());
        p.raw_len = 5001;
        assert!(p.unpack().is_err());
        assert!(Packed::pack(&vec![0; Packed::MAX_RAW_BYTES + 1]).is_none());
    }
}
