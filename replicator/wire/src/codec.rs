//! Numbers and texts into bytes and back: little-endian, every length checked before it is used.

use bytes::Bytes;
use std::borrow::Cow;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad {what} at byte {at}: {why}")]
pub struct DecodeError {
    /// Which frame or structure.
    pub what: &'static str,
    /// Where in it.
    pub at: usize,
    /// What is wrong.
    pub why: Cow<'static, str>,
}

/// Appends.
pub(crate) trait Put {
    fn u8(&mut self, v: u8);
    fn u16(&mut self, v: u16);
    fn u32(&mut self, v: u32);
    fn u64(&mut self, v: u64);
    fn varint(&mut self, v: u64);
    fn text(&mut self, v: &str, max: usize);
}

impl Put for Vec<u8> {
    fn u8(&mut self, v: u8) {
        self.push(v);
    }
    fn u16(&mut self, v: u16) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn u32(&mut self, v: u32) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn u64(&mut self, v: u64) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.push(v as u8);
    }
    /// A text of at most `max` bytes (cut at a character where it is longer; `max` <= 65535).
    fn text(&mut self, v: &str, max: usize) {
        let mut len = v.len().min(max).min(usize::from(u16::MAX));
        while !v.is_char_boundary(len) {
            len -= 1;
        }
        Put::u16(self, len as u16);
        self.extend_from_slice(&v.as_bytes()[..len]);
    }
}

/// Reads from a slice.
pub(crate) struct Get<'a> {
    what: &'static str,
    buf: &'a [u8],
    at: usize,
}

impl<'a> Get<'a> {
    pub(crate) fn new(what: &'static str, buf: &'a [u8]) -> Self {
        Get { what, buf, at: 0 }
    }
    pub(crate) fn bad(&self, why: impl Into<Cow<'static, str>>) -> DecodeError {
        DecodeError {
            what: self.what,
            at: self.at,
            why: why.into(),
        }
    }
    pub(crate) fn left(&self) -> usize {
        self.buf.len() - self.at
    }
    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        if n > self.left() {
            return Err(self.bad(format!("{n} bytes wanted, {} left", self.left())));
        }
        let out = &self.buf[self.at..self.at + n];
        self.at += n;
        Ok(out)
    }
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }
    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub(crate) fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            n => Err(self.bad(format!("{n} is neither yes (1) nor no (0)"))),
        }
    }
    pub(crate) fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut v = 0u64;
        for shift in (0..64).step_by(7) {
            let b = self.u8()?;
            let part = u64::from(b & 0x7f);
            if shift == 63 && part > 1 {
                break;
            }
            v |= part << shift;
            if b & 0x80 == 0 {
                return Ok(v);
            }
        }
        Err(self.bad("a number of more than 64 bits"))
    }
    pub(crate) fn text(&mut self, max: usize) -> Result<&'a str, DecodeError> {
        let len = usize::from(self.u16()?);
        if len > max {
            return Err(self.bad(format!("a text of {len} bytes, at most {max} allowed")));
        }
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.bad("a text that is not UTF-8"))
    }
    /// A count of things that take at least `each` bytes, at most `max`.
    pub(crate) fn count(&mut self, max: usize, each: usize) -> Result<usize, DecodeError> {
        let n = self.u32()? as usize;
        if n > max {
            return Err(self.bad(format!("a count of {n}, at most {max} allowed")));
        }
        if n.saturating_mul(each) > self.left() {
            return Err(self.bad(format!(
                "a count of {n}, but only {} bytes left",
                self.left()
            )));
        }
        Ok(n)
    }
    /// All was read.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        match self.left() {
            0 => Ok(()),
            n => Err(self.bad(format!("{n} bytes too many"))),
        }
    }
    /// The rest, without a copy; `whole` must be what this reader reads.
    pub(crate) fn rest(&mut self, whole: &Bytes) -> Bytes {
        debug_assert_eq!(whole.len(), self.buf.len());
        let out = whole.slice(self.at.min(whole.len())..);
        self.at = self.buf.len();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn varints_come_back(v: u64) {
            let mut b = Vec::new();
            b.varint(v);
            let mut g = Get::new("test", &b);
            prop_assert_eq!(g.varint(), Ok(v));
            prop_assert!(g.end().is_ok());
        }

        #[test]
        fn any_bytes_are_read_without_panic(b: Vec<u8>) {
            let mut g = Get::new("test", &b);
            while g.varint().is_ok() {}
            let mut g = Get::new("test", &b);
            let _ = g.text(10);
            let _ = g.count(100, 16);
        }
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let mut b = Vec::new();
        b.text("aä", 2);
        assert_eq!(Get::new("test", &b).text(2), Ok("a"));
    }
}
