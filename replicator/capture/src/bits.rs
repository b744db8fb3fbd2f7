//! One bit a page.

/// A bitmap that knows how many bits are set.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bits {
    words: Vec<u64>,
    len: u32,
    set: u64,
}

impl Bits {
    pub(crate) fn new(len: u32, value: bool) -> Bits {
        let mut bits = Bits {
            words: vec![0; len.div_ceil(64) as usize],
            len,
            set: 0,
        };
        if value {
            bits.set_range(0, len);
        }
        bits
    }

    /// Grows to `len` bits; the new ones are clear.
    pub(crate) fn grow(&mut self, len: u32) {
        if len > self.len {
            self.words.resize(len.div_ceil(64) as usize, 0);
            self.len = len;
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.set
    }

    pub(crate) fn get(&self, bit: u32) -> bool {
        self.words[bit as usize / 64] >> (bit % 64) & 1 == 1
    }

    pub(crate) fn set_range(&mut self, first: u32, count: u32) {
        self.each_mask(first, count, |word, mask| {
            let fresh = (mask & !*word).count_ones();
            *word |= mask;
            i64::from(fresh)
        });
    }

    pub(crate) fn clear_range(&mut self, first: u32, count: u32) {
        self.each_mask(first, count, |word, mask| {
            let gone = (mask & *word).count_ones();
            *word &= !mask;
            -i64::from(gone)
        });
    }

    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
        self.set = 0;
    }

    /// The first run of bits equal to `value` in [from, end): start and length.
    pub(crate) fn run(&self, from: u32, end: u32, value: bool) -> Option<(u32, u32)> {
        let end = end.min(self.len);
        let start = self.find(from, end, value)?;
        let stop = self.find(start, end, !value).unwrap_or(end);
        Some((start, stop - start))
    }

    fn find(&self, from: u32, end: u32, value: bool) -> Option<u32> {
        let mut at = from;
        while at < end {
            let word = self.words[at as usize / 64];
            let rest = (if value { word } else { !word }) >> (at % 64);
            if rest != 0 {
                let found = at + rest.trailing_zeros();
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    fn each_mask(&mut self, first: u32, count: u32, mut f: impl FnMut(&mut u64, u64) -> i64) {
        let end = first.saturating_add(count).min(self.len);
        let mut at = first;
        while at < end {
            let n = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - n)) << (at % 64);
            self.set = self
                .set
                .wrapping_add_signed(f(&mut self.words[at as usize / 64], mask));
            at += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_runs_and_counts_agree_with_a_plain_vector() {
        let len = 300;
        let mut bits = Bits::new(len, false);
        let mut plain = vec![false; len as usize];
        let mut x = 12345u32;
        for _ in 0..2000 {
            x = x.wrapping_mul(1664525).wrapping_add(1013904223);
            let (first, count, value) = (x >> 8 & 0x1ff, x >> 20 & 0x7f, x >> 31 == 1);
            if value {
                bits.set_range(first, count)
            } else {
                bits.clear_range(first, count)
            }
            for i in first..(first + count).min(len) {
                plain[i as usize] = value;
            }
            assert_eq!(bits.count(), plain.iter().filter(|b| **b).count() as u64);
            let from = x % len;
            for value in [true, false] {
                let start = (from..len).find(|i| plain[*i as usize] == value);
                let want = start.map(|s| {
                    let stop = (s..len)
                        .find(|i| plain[*i as usize] != value)
                        .unwrap_or(len);
                    (s, stop - s)
                });
                assert_eq!(bits.run(from, len, value), want);
            }
        }
        assert_eq!(Bits::new(65, true).count(), 65);
    }
}
