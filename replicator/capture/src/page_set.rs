//! A reusable set of pages: what one epoch carries of the guest's memory.
//!
//! Pages live in big chunks that are populated when they are mapped and kept for the next epoch, so
//! adding one costs neither allocation nor page fault. A page that is collected twice in one epoch
//! (by a round while the guest ran, then by the last collect) takes its old slot.

use crate::blocks::PAGE_BYTES;
use crate::mapping::Anonymous;
use std::io;

/// Pages in a chunk: 4 MiB.
const CHUNK_PAGES: usize = 1024;

/// A run of pages of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// The block's index in [`crate::Capture::blocks`].
    pub block: u16,
    /// Its first page.
    pub first: u32,
    /// How many pages.
    pub count: u32,
}

/// Pages with their contents, and ranges known to be zero because they were never touched.
#[derive(Default)]
pub struct PageSet {
    chunks: Vec<Anonymous>,
    /// Which page lies in each slot.
    entries: Vec<(u16, u32)>,
    /// For each block and page: slot + 1, or 0.
    slots: Vec<Vec<u32>>,
    absent: Vec<PageRange>,
    /// Slots from here on were given out in this round.
    round: usize,
}

impl PageSet {
    /// An empty set. Memory comes with use.
    pub fn new() -> PageSet {
        PageSet::default()
    }

    /// How many pages it holds.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it holds no page (it may still name absent ranges).
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Pages in the order in which they were first collected: block index, page index, contents.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u16, u32, &[u8; PAGE_BYTES])> {
        self.entries
            .iter()
            .enumerate()
            .map(|(slot, (block, page))| (*block, *page, self.slot(slot)))
    }

    /// The `n`-th page of [`PageSet::iter`], for work that is shared between threads.
    pub fn nth(&self, n: usize) -> Option<(u16, u32, &[u8; PAGE_BYTES])> {
        self.entries
            .get(n)
            .map(|(block, page)| (*block, *page, self.slot(n)))
    }

    /// The contents of one page, if it is in the set.
    pub fn get(&self, block: u16, page: u32) -> Option<&[u8; PAGE_BYTES]> {
        let slot = *self.slots.get(usize::from(block))?.get(page as usize)?;
        (slot != 0).then(|| self.slot(slot as usize - 1))
    }

    /// Ranges that count as dirty but were never touched (holes of the RAM file): they read as zero.
    /// Only after [`crate::Capture::mark_all_dirty`] and attaching; a fresh standby image is zero there
    /// already, an old one has to be cleared.
    pub fn absent(&self) -> &[PageRange] {
        &self.absent
    }

    /// Empties the set and keeps its memory.
    pub fn clear(&mut self) {
        for (block, page) in self.entries.drain(..) {
            self.slots[usize::from(block)][page as usize] = 0;
        }
        self.absent.clear();
        self.round = 0;
    }

    /// Makes room for `pages` more pages now, outside any pause.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve(&mut self, pages: usize) -> io::Result<()> {
        self.entries.reserve(pages);
        let want = self.entries.len() + pages;
        while self.chunks.len() * CHUNK_PAGES < want {
            self.chunks.push(Anonymous::new(CHUNK_PAGES * PAGE_BYTES)?);
        }
        Ok(())
    }

    /// Bytes of memory that it holds on to for pages.
    pub fn capacity_bytes(&self) -> usize {
        self.chunks.len() * CHUNK_PAGES * PAGE_BYTES
    }

    /// Gives chunks back beyond those for `keep_pages`, after a burst.
    pub fn shrink(&mut self, keep_pages: usize) {
        let keep = keep_pages.max(self.entries.len()).div_ceil(CHUNK_PAGES);
        self.chunks.truncate(keep);
    }

    /// Readies the slot maps for blocks of so many pages.
    pub(crate) fn shape(&mut self, pages: impl Iterator<Item = u32>) {
        for (i, n) in pages.enumerate() {
            if i == self.slots.len() {
                self.slots.push(Vec::new());
            }
            if self.slots[i].len() < n as usize {
                self.slots[i].resize(n as usize, 0);
            }
        }
    }

    /// A new round of copies begins: pages placed before may be placed (and copied) again, those placed
    /// from now on once only.
    pub(crate) fn begin_round(&mut self) {
        self.round = self.entries.len();
    }

    /// Gives each page of a range its slot, except those placed in this round already, and calls `found` with the destinations, as runs of
    /// (first page's offset in the range, pages, where to). The caller fills every one of them.
    pub(crate) fn place(
        &mut self,
        range: PageRange,
        mut found: impl FnMut(u32, u32, *mut u8),
    ) -> io::Result<()> {
        let mut run: Option<(u32, u32, usize)> = None;
        for offset in 0..range.count {
            let page = range.first + offset;
            let known = self.slots[usize::from(range.block)][page as usize];
            let slot = if known as usize > self.round {
                if let Some((o, n, s)) = run.take() {
                    found(o, n, self.address(s));
                }
                continue;
            } else if known != 0 {
                known as usize - 1
            } else {
                let slot = self.entries.len();
                if slot == self.chunks.len() * CHUNK_PAGES {
                    self.reserve(1)?;
                }
                self.entries.push((range.block, page));
                self.slots[usize::from(range.block)][page as usize] = slot as u32 + 1;
                slot
            };
            run = match run {
                Some((o, n, s)) if s + n as usize == slot && slot % CHUNK_PAGES != 0 => {
                    Some((o, n + 1, s))
                }
                other => {
                    if let Some((o, n, s)) = other {
                        found(o, n, self.address(s));
                    }
                    Some((offset, 1, slot))
                }
            };
        }
        if let Some((o, n, s)) = run {
            found(o, n, self.address(s));
        }
        Ok(())
    }

    pub(crate) fn add_absent(&mut self, range: PageRange) {
        if let Some(last) = self.absent.last_mut()
            && last.block == range.block
            && last.first + last.count == range.first
        {
            last.count += range.count;
            return;
        }
        self.absent.push(range);
    }

    pub(crate) fn entries(&self) -> &[(u16, u32)] {
        &self.entries
    }

    fn address(&mut self, slot: usize) -> *mut u8 {
        self.chunks[slot / CHUNK_PAGES].at(slot % CHUNK_PAGES * PAGE_BYTES)
    }

    fn slot(&self, slot: usize) -> &[u8; PAGE_BYTES] {
        self.chunks[slot / CHUNK_PAGES].page(slot % CHUNK_PAGES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(set: &mut PageSet, block: u16, first: u32, count: u32, byte: u8) {
        set.begin_round();
        set.place(
            PageRange {
                block,
                first,
                count,
            },
            |_, n, to| {
                // SAFETY: `place` hands out room for `n` pages.
                unsafe { to.write_bytes(byte, n as usize * PAGE_BYTES) };
            },
        )
        .expect("memory");
    }

    /// Protects the epoch from carrying an older copy of a page beside its last one.
    #[test]
    fn a_page_collected_twice_keeps_one_slot_with_the_last_contents() {
        let mut set = PageSet::new();
        set.shape([4000, 10].into_iter());
        fill(&mut set, 0, 10, 3000, 1);
        fill(&mut set, 1, 2, 1, 2);
        fill(&mut set, 0, 5, 100, 3);
        assert_eq!(set.len(), 3006);
        let mut seen = std::collections::HashMap::new();
        for (block, page, bytes) in set.iter() {
            assert!(bytes.iter().all(|b| *b == bytes[0]));
            assert!(
                seen.insert((block, page), bytes[0]).is_none(),
                "twice: {block} {page}"
            );
        }
        for page in 5..3010 {
            let want = if page < 105 { 3 } else { 1 };
            assert_eq!(seen[&(0, page)], want);
            assert_eq!(set.get(0, page).expect("there")[0], want);
        }
        assert_eq!(seen[&(1, 2)], 2);
        assert!(set.get(0, 4).is_none() && set.get(1, 3).is_none() && set.get(9, 0).is_none());
    }

    #[test]
    fn a_cleared_set_is_empty_and_keeps_its_memory() {
        let mut set = PageSet::new();
        set.shape([4000].into_iter());
        fill(&mut set, 0, 0, 4000, 1);
        set.add_absent(PageRange {
            block: 0,
            first: 1,
            count: 2,
        });
        set.add_absent(PageRange {
            block: 0,
            first: 3,
            count: 4,
        });
        assert_eq!(
            set.absent(),
            [PageRange {
                block: 0,
                first: 1,
                count: 6
            }]
        );
        let held = set.capacity_bytes();
        set.clear();
        assert!(set.is_empty() && set.absent().is_empty() && set.get(0, 7).is_none());
        fill(&mut set, 0, 0, 4000, 2);
        assert_eq!(set.capacity_bytes(), held);
        assert_eq!(set.get(0, 3999).expect("there")[4095], 2);
    }
}
