//! Held frames, in a byte ring that is allocated once.
//!
//! A frame is received straight into its place: [`HeldQueue::slot`] gives room for the longest
//! one, [`HeldQueue::commit`] keeps what was filled. No frame is split at the ring's end; the rest
//! of the ring is skipped instead. When the queue runs empty it starts at the front again, so that
//! a gate that passes everything stays in one warm piece of memory.
//!
//! ```text
//!   |      held held held (tail)         |      |(tail)       held held held skipped|
//!          ^head                                               ^head
//! ```

use havm_core::ids::EpochNo;
use std::collections::VecDeque;
use std::time::Instant;

/// The longest frame with its headers: 64 KiB of segmented TCP, Ethernet, VLAN and virtio-net
/// headers.
pub(crate) const SLOT: usize = 65536 + 64;
/// The smallest ring that makes sense.
pub(crate) const MIN_BYTES: usize = 4 * SLOT;

/// A held frame's place and tag.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meta {
    slot: usize,
    start: usize,
    len: usize,
    /// The epoch whose ack lets it out.
    pub epoch: EpochNo,
    /// When it came.
    pub at: Instant,
}

pub(crate) struct HeldQueue {
    buf: Box<[u8]>,
    frames: VecDeque<Meta>,
    max_frames: usize,
    /// First byte after the newest frame.
    tail: usize,
    bytes: usize,
}

impl HeldQueue {
    pub fn new(max_bytes: usize, max_frames: usize) -> Self {
        let max_frames = max_frames.max(1);
        HeldQueue {
            buf: vec![0; max_bytes.max(MIN_BYTES)].into_boxed_slice(),
            frames: VecDeque::with_capacity(max_frames),
            max_frames,
            tail: 0,
            bytes: 0,
        }
    }

    /// Where the next frame would go; none where it is full.
    fn place(&self) -> Option<usize> {
        let Some(oldest) = self.frames.front() else {
            return Some(0);
        };
        if self.frames.len() >= self.max_frames {
            return None;
        }
        let head = oldest.slot;
        // While anything is held, the tail never catches up with the head: so equal means nothing.
        if self.tail <= head {
            return (head - self.tail > SLOT).then_some(self.tail);
        }
        if self.buf.len() - self.tail >= SLOT {
            return Some(self.tail);
        }
        (head > SLOT).then_some(0)
    }

    /// Room for a frame of up to [`SLOT`] bytes; none where the queue is full.
    pub fn slot(&mut self) -> Option<&mut [u8]> {
        let at = self.place()?;
        Some(&mut self.buf[at..at + SLOT])
    }

    /// Keeps `len` bytes from `start` of the slot given last.
    pub fn commit(&mut self, start: usize, len: usize, epoch: EpochNo, at: Instant) {
        let Some(slot) = self.place() else { return };
        assert!(start + len <= SLOT, "a frame longer than its slot");
        self.tail = slot + start + len;
        self.bytes += len;
        self.frames.push_back(Meta {
            slot,
            start: slot + start,
            len,
            epoch,
            at,
        });
    }

    /// The oldest frame.
    pub fn front(&self) -> Option<(Meta, &[u8])> {
        let m = *self.frames.front()?;
        Some((m, &self.buf[m.start..m.start + m.len]))
    }

    /// The newest frame's tag and age.
    pub fn back(&self) -> Option<Meta> {
        self.frames.back().copied()
    }

    /// Drops the oldest frame.
    pub fn pop(&mut self) {
        if let Some(m) = self.frames.pop_front() {
            self.bytes -= m.len;
        }
    }

    /// Drops all; says how many.
    pub fn clear(&mut self) -> usize {
        let n = self.frames.len();
        self.frames.clear();
        self.bytes = 0;
        n
    }

    /// Gives all held frames one tag.
    pub fn retag(&mut self, epoch: EpochNo) {
        self.frames.iter_mut().for_each(|m| m.epoch = epoch);
    }

    /// How many frames are held.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Their bytes, headers included.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Three quarters are used, or there is no room for a long frame: time to stop the guest.
    pub fn is_full(&self) -> bool {
        self.bytes >= self.buf.len() / 4 * 3
            || self.frames.len() >= self.max_frames.div_ceil(4) * 3
            || self.place().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(q: &mut HeldQueue, n: u64, len: usize) -> bool {
        let Some(slot) = q.slot() else { return false };
        slot[4..4 + len].fill(n as u8);
        q.commit(4, len, EpochNo(n), Instant::now());
        true
    }

    /// Every frame comes out once, in order, whole, whatever the sizes and however often the ring
    /// wraps: a simple model beside it says what must come.
    #[test]
    fn frames_come_out_in_order_and_whole() {
        let mut q = HeldQueue::new(MIN_BYTES, 64);
        let mut model: VecDeque<(u64, usize)> = VecDeque::new();
        let (mut seed, mut n, mut refused) = (0x9e37_79b9_7f4a_7c15u64, 0u64, 0);
        for _ in 0..200_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            if seed % 5 < 3 {
                let len = if seed & 0x100 == 0 {
                    60
                } else {
                    (seed >> 16) as usize % (SLOT - 4)
                };
                if put(&mut q, n, len) {
                    model.push_back((n, len));
                } else {
                    refused += 1;
                }
                n += 1;
            } else if let Some((want, len)) = model.pop_front() {
                let (m, data) = q.front().expect("the model holds one");
                assert_eq!((m.epoch, data.len()), (EpochNo(want), len));
                assert!(data.iter().all(|b| *b == want as u8));
                q.pop();
            }
            assert_eq!(q.len(), model.len());
            assert_eq!(q.bytes(), model.iter().map(|x| x.1).sum::<usize>());
        }
        assert!(
            refused > 100,
            "the bound was never met: the test is too weak"
        );
    }

    #[test]
    fn it_is_bounded_in_frames_and_says_so_before() {
        let mut q = HeldQueue::new(MIN_BYTES, 8);
        let mut seen_full = None;
        let mut n = 0;
        while put(&mut q, n, 100) {
            n += 1;
            if q.is_full() && seen_full.is_none() {
                seen_full = Some(n);
            }
        }
        assert_eq!((n, seen_full), (8, Some(6)));
        assert_eq!(q.clear(), 8);
        assert!(!q.is_full() && q.bytes() == 0 && q.slot().is_some());
    }

    #[test]
    fn it_is_bounded_in_bytes() {
        let mut q = HeldQueue::new(MIN_BYTES, 1000);
        let n = (0..).take_while(|n| put(&mut q, *n, 60_000)).count();
        assert!((3..=4).contains(&n), "{n}");
        assert!(q.is_full());
    }
}
