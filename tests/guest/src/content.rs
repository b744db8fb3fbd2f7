//! Memory pages that know what they should hold.
//!
//! Each page carries its index, how often it was written, and a checksum of all the rest; the
//! expected counts are kept apart, so that a page which fell back to an older, whole state is
//! noticed too. The content is like that of a server's memory: about seven tenths text, the rest
//! random (compressed or encrypted data).

use crate::report::MemorySeen;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Pages in a MiB.
pub const PAGES_PER_MIB: u64 = 256;
const WORDS: usize = PAGE_BYTES / 8;
/// A rewrite changes this part of a page (and its head): programs seldom change all of one.
const PARTS: usize = 4;
const PART_WORDS: usize = WORDS / PARTS;
/// Of these, the words that are text.
const TEXT_WORDS: usize = PART_WORDS * 7 / 10;
/// The words of the page's head: index and count, checksum.
const HEAD_WORDS: usize = 2;

/// What the text part is cut from.
const TEXT: &[u8] = b"2026-03-02T09:14:07Z INFO http GET /api/v1/orders/48213 200 14ms upstream=app-2\n\
{\"id\":48213,\"customer\":\"M. Okafor\",\"items\":[{\"sku\":\"KX-1180\",\"qty\":2,\"price\":\"19.90\"}],\"state\":\"paid\"}\n\
SELECT o.id, o.state, c.name FROM orders o JOIN customers c ON c.id = o.customer_id WHERE o.state = 'open' ORDER BY o.id;\n\
2026-03-02T09:14:08Z WARN pool connection 17 idle for 300 s, closing; 24 of 64 in use\n\
The quick recovery of a service depends less on how seldom its parts fail than on how well the others know what it had promised.\n\
<tr class=\"row\"><td>KX-1180</td><td>Hinge, brass, 40 mm</td><td>19.90</td><td>in stock</td></tr>\n\
static int cache_lookup(struct cache *c, const char *key, size_t len) { unsigned h = hash(key, len) & c->mask; }\n\
From: orders@example.net To: warehouse@example.net Subject: Picking list 2026-03-02 09:15, 31 lines, 4 pallets\n\
\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0\0\0\0\0\
2026-03-02T09:14:09Z INFO http POST /api/v1/orders 201 22ms upstream=app-1 body=412 request_id=9f31c2d07ab4\n";

const fn odd_factors() -> [u64; WORDS] {
    let mut out = [0u64; WORDS];
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut i = 0;
    while i < WORDS {
        state = mix(state);
        out[i] = state | 1;
        i += 1;
    }
    out
}

const fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The checksum is the sum of each word times its own odd factor: any change of one word shows, and
/// changing a part of the page changes the sum without reading the rest.
static FACTORS: [u64; WORDS] = odd_factors();

const _: () = assert!(TEXT.len() > TEXT_WORDS * 8);

fn weigh(words: &[u64], factors: &[u64]) -> u64 {
    words
        .iter()
        .zip(factors)
        .fold(0, |sum, (w, f)| sum.wrapping_add(w.wrapping_mul(*f)))
}

/// A part's words, without the page's head.
fn part_range(part: usize) -> std::ops::Range<usize> {
    (part * PART_WORDS).max(HEAD_WORDS)..(part + 1) * PART_WORDS
}

/// The next of a cheap sequence of random words.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u64; WORDS]);

impl Page {
    fn head(index: u32, count: u32) -> u64 {
        u64::from(index) | u64::from(count) << 32
    }

    fn sum(&self) -> u64 {
        weigh(&self.0[HEAD_WORDS..], &FACTORS[HEAD_WORDS..])
            .wrapping_add(self.0[0].wrapping_mul(FACTORS[0]))
    }

    /// What a rewrite of a part (and the head with it) takes out of the sum, or puts in.
    fn part_sum(&self, part: usize) -> u64 {
        let range = part_range(part);
        weigh(&self.0[range.clone()], &FACTORS[range])
            .wrapping_add(self.0[0].wrapping_mul(FACTORS[0]))
    }

    /// Gives one part new content; the sum is the caller's.
    fn fill(&mut self, part: usize, random: &mut u64) {
        let range = part_range(part);
        let text_to = range.start + TEXT_WORDS.min(range.len());
        let start = next(random) as usize % (TEXT.len() - TEXT_WORDS * 8);
        let text = &TEXT[start..start + TEXT_WORDS * 8];
        for (word, bytes) in self.0[range.start..text_to]
            .iter_mut()
            .zip(text.chunks_exact(8))
        {
            let mut w = [0u8; 8];
            w.copy_from_slice(bytes);
            *word = u64::from_le_bytes(w);
        }
        for word in &mut self.0[text_to..range.end] {
            *word = next(random);
        }
    }
}

/// A stretch of memory made of such pages.
pub struct Arena {
    pages: Vec<Page>,
    /// How often each page was written: what its head must say.
    counts: Vec<u32>,
    next_write: usize,
    next_check: usize,
    random: u64,
    seen: MemorySeen,
}

impl Arena {
    /// Makes and fills `pages` pages.
    pub fn new(pages: usize, seed: u64) -> Arena {
        let mut arena = Arena {
            pages: Vec::new(),
            counts: Vec::new(),
            next_write: 0,
            next_check: 0,
            random: mix(seed | 1),
            seen: MemorySeen::default(),
        };
        arena.resize(pages);
        arena
    }

    /// Pages that it has.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// True when it has none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Grows or shrinks it; what stays keeps its content.
    pub fn resize(&mut self, pages: usize) {
        self.pages.truncate(pages);
        self.counts.truncate(pages);
        while self.pages.len() < pages {
            let index = self.pages.len() as u32;
            let mut page = Page([0; WORDS]);
            page.0[0] = Page::head(index, 0);
            for part in 0..PARTS {
                page.fill(part, &mut self.random);
            }
            page.0[1] = page.sum();
            self.pages.push(page);
            self.counts.push(0);
        }
        self.next_write = 0;
        self.next_check = 0;
        self.seen.pages = pages as u64;
    }

    /// Checks, then rewrites a part of each of the next `pages` pages, going round.
    pub fn write(&mut self, pages: usize) {
        if self.pages.is_empty() {
            return;
        }
        for _ in 0..pages {
            let i = self.next_write;
            self.next_write = (i + 1) % self.pages.len();
            self.check_page(i);
            let count = self.counts[i].wrapping_add(1);
            self.counts[i] = count;
            let page = &mut self.pages[i];
            let part = count as usize % PARTS;
            let touched = page.part_sum(part);
            page.0[0] = Page::head(i as u32, count);
            page.fill(part, &mut self.random);
            // Whatever was wrong before stays wrong: the sum moves by the difference only.
            page.0[1] = page.0[1]
                .wrapping_sub(touched)
                .wrapping_add(page.part_sum(part));
            self.seen.rewritten += 1;
        }
    }

    /// Checks the next `pages` pages, going round.
    pub fn check(&mut self, pages: usize) {
        for _ in 0..pages.min(self.pages.len()) {
            let i = self.next_check;
            self.next_check = (i + 1) % self.pages.len();
            self.check_page(i);
        }
    }

    /// Checks every page.
    pub fn check_all(&mut self) {
        self.check(self.pages.len());
    }

    fn check_page(&mut self, i: usize) {
        self.seen.checked += 1;
        let page = &self.pages[i];
        let (head, sum) = (page.0[0], page.sum());
        let expected = Page::head(i as u32, self.counts[i]);
        if head == expected && sum == page.0[1] {
            return;
        }
        self.seen.errors += 1;
        if self.seen.first_error.is_none() {
            self.seen.first_error = Some(format!(
                "page {i}: index {} count {} (expected {}), sum {:#x} (computed {sum:#x})",
                head as u32,
                head >> 32,
                self.counts[i],
                page.0[1],
            ));
        }
    }

    /// What was seen so far.
    pub fn seen(&self) -> &MemorySeen {
        &self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used() -> Arena {
        let mut arena = Arena::new(16, 7);
        arena.write(16 * 9 + 5);
        arena.check_all();
        assert_eq!(arena.seen().errors, 0);
        arena
    }

    /// Damage of one bit anywhere must show.
    #[test]
    fn a_flipped_bit_is_an_error() {
        for word in [0, 1, 2, 127, 128, 511] {
            let mut arena = used();
            arena.pages[3].0[word] ^= 1 << 40;
            arena.check_all();
            assert_eq!(arena.seen().errors, 1, "word {word}");
            assert!(
                arena
                    .seen()
                    .first_error
                    .as_deref()
                    .unwrap_or("")
                    .starts_with("page 3:")
            );
        }
    }

    /// A whole but older page, and a whole page at the wrong place, are errors too.
    #[test]
    fn an_old_or_misplaced_page_is_an_error() {
        let mut arena = used();
        let old = arena.pages[5].clone();
        arena.write(16);
        arena.pages[5] = old;
        arena.check_all();
        assert_eq!(arena.seen().errors, 1);

        let mut arena = used();
        arena.pages.swap(1, 2);
        arena.check_all();
        assert_eq!(arena.seen().errors, 2);
    }

    /// The content is neither all text nor all noise: else wire figures would mean little.
    #[test]
    fn content_is_partly_text_and_partly_random() {
        let mut arena = used();
        arena.write(64);
        let mut text = 0;
        let mut total = 0;
        for page in &arena.pages {
            for word in &page.0[HEAD_WORDS..] {
                total += 1;
                if word.to_le_bytes().iter().all(|b| b.is_ascii()) {
                    text += 1;
                }
            }
        }
        let share = f64::from(text) / f64::from(total);
        assert!((0.6..0.8).contains(&share), "text share {share}");
    }
}
