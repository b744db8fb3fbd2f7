//! Pages of guest memory, each in the smallest form that is quick to make.
//!
//! | form | when |
//! | --- | --- |
//! | none | equal to the copy that was sent last |
//! | zero | all zero |
//! | delta, delta+lz4 | little changed against the copy that was sent last |
//! | lz4 | it shrinks |
//! | raw | it does not |
//!
//! The encoder remembers what it sent last in a direct-mapped cache of bounded size. Frames of a
//! stream arrive complete and in order, so the receiver's page has exactly that content when a
//! delta is applied to it. With an epoch abandoned in the middle that would no longer hold: then
//! the stream is over, and [`PageEncoder::reset`] must come before the next.
//!
//! All forms are plain new content: applying the entries of an epoch again from its first, after a
//! crash in the middle, ends in the same image.
//!
//! An entry: zigzag varint of the page index minus (the one before + 1); u16 = form << 13 | length;
//! the data.

use crate::codec::{DecodeError, Get, Put};
use crate::delta;
use crate::encode::pages_payload;
use crate::raw::{Encoded, GOOD_PAYLOAD_BYTES, TooLarge};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// A page.
pub type Page = [u8; PAGE_BYTES];

/// A delta above this is not looked for: lz4 of the page does as well.
const MAX_DELTA_BYTES: usize = 1536;
/// A delta up to this is taken as it is.
const SMALL_DELTA_BYTES: usize = 192;
/// lz4 must save this much, else the page travels raw.
const WORTH_BYTES: usize = PAGE_BYTES / 16;

const ZERO: u16 = 0;
const RAW: u16 = 1;
const LZ4: u16 = 2;
const DELTA: u16 = 3;
const DELTA_LZ4: u16 = 4;

/// What became of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// Nothing: the receiver has it.
    Same,
    /// This many bytes in the batch.
    Bytes(usize),
}

/// Pages of one RAM block on their way into a frame.
#[derive(Debug)]
pub struct PageBatch {
    payload: Vec<u8>,
    next_index: u64,
    count: u64,
}

impl PageBatch {
    /// An empty batch for RAM block number `block`.
    pub fn new(block: u16) -> Self {
        let mut payload = Vec::with_capacity(GOOD_PAYLOAD_BYTES + PAGE_BYTES + 64);
        Put::u16(&mut payload, block);
        PageBatch {
            payload,
            next_index: 0,
            count: 0,
        }
    }
    /// The RAM block.
    pub fn block(&self) -> u16 {
        u16::from_le_bytes([self.payload[0], self.payload[1]])
    }
    /// Pages in it.
    pub fn count(&self) -> u64 {
        self.count
    }
    /// Nothing in it.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// Bytes of its payload.
    pub fn bytes(&self) -> usize {
        self.payload.len()
    }
    /// The entries, for [`entries`].
    pub fn entries(&self) -> &[u8] {
        &self.payload[2..]
    }
    /// Large enough to be sent.
    pub fn is_full(&self) -> bool {
        self.payload.len() >= GOOD_PAYLOAD_BYTES
    }
    pub(crate) fn into_encoded(self) -> Result<Encoded, TooLarge> {
        pages_payload(self.payload)
    }

    fn put(&mut self, index: u64, form: u16, data: &[&[u8]]) -> Sent {
        let before = self.payload.len();
        let step = index.wrapping_sub(self.next_index) as i64;
        self.payload.varint(((step << 1) ^ (step >> 63)) as u64);
        let len: usize = data.iter().map(|d| d.len()).sum();
        Put::u16(&mut self.payload, form << 13 | len as u16);
        data.iter().for_each(|d| self.payload.extend_from_slice(d));
        self.next_index = index.wrapping_add(1);
        self.count += 1;
        Sent::Bytes(self.payload.len() - before)
    }
}

/// Chooses each page's form and remembers what was sent.
pub struct PageEncoder {
    tags: Vec<u64>,
    pages: Vec<u8>,
    delta: Vec<u8>,
    small: Vec<u8>,
}

impl std::fmt::Debug for PageEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageEncoder({} slots)", self.tags.len())
    }
}

impl PageEncoder {
    /// The cache size that the product uses unless told otherwise, MiB.
    pub const DEFAULT_CACHE_MIB: usize = 64;

    /// An encoder with a cache of about `cache_mib` MiB (0: none; rounded down to a power of two).
    pub fn new(cache_mib: usize) -> Self {
        let slots = match cache_mib.min(1 << 20) << 8 {
            0 => 0,
            n => 1usize << n.ilog2(),
        };
        PageEncoder {
            tags: vec![0; slots],
            pages: vec![0; slots * PAGE_BYTES],
            delta: Vec::with_capacity(MAX_DELTA_BYTES + PAGE_BYTES),
            small: vec![0; lz4_flex::block::get_maximum_output_size(PAGE_BYTES)],
        }
    }

    /// Forgets all: for a new stream.
    pub fn reset(&mut self) {
        self.tags.fill(0);
    }

    /// Puts page number `index` of the batch's RAM block into the batch.
    pub fn push(&mut self, batch: &mut PageBatch, index: u64, page: &Page) -> Sent {
        let Some(slot) = self.slot(batch.block(), index) else {
            return Self::fresh(&mut self.small, batch, index, page);
        };
        let tag = tag(batch.block(), index);
        let last = &mut self.pages[slot * PAGE_BYTES..][..PAGE_BYTES];
        let known = std::mem::replace(&mut self.tags[slot], tag) == tag;
        if known && last == page {
            return Sent::Same;
        }
        let sent = if known && !is_zero(page) {
            self.delta.clear();
            let usable = delta::encode(last, page, MAX_DELTA_BYTES, &mut self.delta);
            let delta = usable.then_some(self.delta.as_slice());
            Self::changed(&mut self.small, batch, index, page, delta)
        } else {
            Self::fresh(&mut self.small, batch, index, page)
        };
        last.copy_from_slice(page);
        sent
    }

    fn slot(&self, block: u16, index: u64) -> Option<usize> {
        let spread = index.wrapping_add(u64::from(block).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (!self.tags.is_empty()).then(|| spread as usize & (self.tags.len() - 1))
    }

    fn changed(
        small: &mut [u8],
        batch: &mut PageBatch,
        index: u64,
        page: &Page,
        delta: Option<&[u8]>,
    ) -> Sent {
        let Some(delta) = delta else {
            return Self::fresh(small, batch, index, page);
        };
        if delta.len() <= SMALL_DELTA_BYTES {
            return batch.put(index, DELTA, &[delta]);
        }
        match lz4_flex::block::compress_into(delta, small) {
            Ok(n) if n + 2 < delta.len() => {
                let raw_len = (delta.len() as u16).to_le_bytes();
                batch.put(index, DELTA_LZ4, &[&raw_len, &small[..n]])
            }
            _ => batch.put(index, DELTA, &[delta]),
        }
    }

    fn fresh(small: &mut [u8], batch: &mut PageBatch, index: u64, page: &Page) -> Sent {
        if is_zero(page) {
            return batch.put(index, ZERO, &[]);
        }
        if is_noise(page) {
            return batch.put(index, RAW, &[page]);
        }
        match lz4_flex::block::compress_into(page, small) {
            Ok(n) if n <= PAGE_BYTES - WORTH_BYTES => batch.put(index, LZ4, &[&small[..n]]),
            _ => batch.put(index, RAW, &[page]),
        }
    }
}

/// Never 0, which marks an empty slot.
fn tag(block: u16, index: u64) -> u64 {
    (u64::from(block) << 47 | (index & ((1 << 47) - 1))) + 1
}

fn is_zero(page: &Page) -> bool {
    page.chunks_exact(64)
        .all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

/// Looks random (encrypted, compressed): lz4 would only lose time on it. Of 128 bytes all over the
/// page, noise has 101 different values on average (deviation 4), machine code about 60, text 30.
fn is_noise(page: &Page) -> bool {
    const STEP: usize = PAGE_BYTES / 128;
    let mut seen = [0u64; 4];
    for (i, chunk) in page.chunks_exact(STEP).enumerate() {
        // Not the same place in each chunk: structures repeat.
        let v = chunk[i * 7 % STEP];
        seen[usize::from(v >> 6)] |= 1 << (v & 63);
    }
    seen.iter().map(|w| w.count_ones()).sum::<u32>() > 88
}

/// A page as it arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its number in its RAM block.
    pub index: u64,
    form: u16,
    data: &'a [u8],
}

impl Entry<'_> {
    /// Puts the entry's content into `page`, which must hold what all earlier entries of the
    /// stream made of it. On an error it is unchanged or undefined: the image is spoilt.
    pub fn apply(&self, page: &mut Page) -> Result<(), DecodeError> {
        let bad = |why: String| DecodeError {
            what: "page",
            at: 0,
            why: why.into(),
        };
        match self.form {
            ZERO => page.fill(0),
            RAW => page.copy_from_slice(self.data),
            LZ4 => match lz4_flex::block::decompress_into(self.data, page) {
                Ok(PAGE_BYTES) => {}
                Ok(n) => return Err(bad(format!("it unpacks to {n} bytes"))),
                Err(e) => return Err(bad(format!("it does not unpack: {e}"))),
            },
            DELTA => delta::apply(self.data, page)?,
            _ => {
                let (len, data) = self.data.split_at(2);
                let len = usize::from(u16::from_le_bytes([len[0], len[1]])).min(PAGE_BYTES);
                let mut raw = [0; PAGE_BYTES];
                match lz4_flex::block::decompress_into(data, &mut raw[..len]) {
                    Ok(n) if n == len => delta::apply(&raw[..len], page)?,
                    Ok(n) => return Err(bad(format!("its delta unpacks to {n} bytes"))),
                    Err(e) => return Err(bad(format!("its delta does not unpack: {e}"))),
                }
            }
        }
        Ok(())
    }

    /// The entry says everything about the page: what was there before does not matter.
    pub fn is_whole(&self) -> bool {
        matches!(self.form, ZERO | RAW | LZ4)
    }

    /// The page is all zero: its room may be given back.
    pub fn is_zero(&self) -> bool {
        self.form == ZERO
    }

    fn check(&self) -> Result<(), &'static str> {
        let n = self.data.len();
        match self.form {
            ZERO if n != 0 => Err("a zero page with data"),
            RAW if n != PAGE_BYTES => Err("a raw page of another size"),
            LZ4 if n == 0 || n >= PAGE_BYTES => Err("a compressed page of impossible size"),
            DELTA if delta::runs(self.data, PAGE_BYTES, |_, _| ()).is_err() => {
                Err("a delta that leaves the page")
            }
            DELTA_LZ4 if n < 3 => Err("a compressed delta without data"),
            ZERO | RAW | LZ4 | DELTA | DELTA_LZ4 => Ok(()),
            _ => Err("an unknown form"),
        }
    }
}

/// The entries of a `Pages` frame, each checked as far as it can be without unpacking it.
pub fn entries(bytes: &[u8]) -> Entries<'_> {
    Entries {
        g: Some(Get::new("Pages", bytes)),
        next_index: 0,
    }
}

/// See [`entries`].
pub struct Entries<'a> {
    g: Option<Get<'a>>,
    next_index: u64,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut g = self.g.take().filter(|g| g.left() > 0)?;
        let entry = read_entry(&mut g, self.next_index);
        if let Ok(e) = &entry {
            self.next_index = e.index.wrapping_add(1);
            self.g = Some(g);
        }
        Some(entry)
    }
}

fn read_entry<'a>(g: &mut Get<'a>, next_index: u64) -> Result<Entry<'a>, DecodeError> {
    let z = g.varint()?;
    let step = (z >> 1) as i64 ^ -((z & 1) as i64);
    let index = next_index.wrapping_add(step as u64);
    let word = g.u16()?;
    let entry = Entry {
        index,
        form: word >> 13,
        data: g.take(usize::from(word & 0x1fff))?,
    };
    entry.check().map_err(|why| g.bad(why))?;
    Ok(entry)
}

#[cfg(test)]
#[path = "page_tests.rs"]
mod tests;
