//! Committed bytes that are not in place yet: a map of ranges that reads look into first.
//!
//! Ranges never overlap; each knows the journal record it came from, so that what a later record
//! replaced is not taken away when the earlier one has been applied.

use crate::epoch::{DiskWrite, WriteOp};
use bytes::Bytes;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
struct Piece {
    end: u64,
    seq: u64,
    /// None is zeroes.
    data: Option<Bytes>,
}

#[derive(Debug, Default)]
pub(crate) struct Overlay {
    pieces: BTreeMap<u64, Piece>,
}

impl Overlay {
    /// Lays a write over everything before it.
    pub(crate) fn insert(&mut self, w: &DiskWrite, seq: u64) {
        if w.is_empty() {
            return;
        }
        let (start, end) = (w.offset, w.end());
        self.cut(start, end, |_| true);
        let data = match &w.op {
            WriteOp::Data(d) => Some(d.clone()),
            WriteOp::Zero(_) => None,
        };
        self.pieces.insert(start, Piece { end, seq, data });
    }

    /// Takes away what record `seq` laid into the write's range and nobody replaced.
    pub(crate) fn remove(&mut self, w: &DiskWrite, seq: u64) {
        self.cut(w.offset, w.end(), |p| p.seq == seq);
    }

    /// Cuts `start..end` out of every piece that the test picks.
    fn cut(&mut self, start: u64, end: u64, pick: impl Fn(&Piece) -> bool) {
        let mut hit: Vec<u64> = Vec::new();
        if let Some((k, p)) = self.pieces.range(..start).next_back()
            && p.end > start
        {
            hit.push(*k);
        }
        hit.extend(self.pieces.range(start..end).map(|(k, _)| *k));
        for k in hit {
            if !self.pieces.get(&k).is_some_and(&pick) {
                continue;
            }
            let Some(p) = self.pieces.remove(&k) else {
                continue;
            };
            if k < start {
                let data = p.data.as_ref().map(|d| d.slice(..(start - k) as usize));
                self.pieces.insert(
                    k,
                    Piece {
                        end: start,
                        seq: p.seq,
                        data,
                    },
                );
            }
            if p.end > end {
                let data = p.data.as_ref().map(|d| d.slice((end - k) as usize..));
                self.pieces.insert(
                    end,
                    Piece {
                        end: p.end,
                        seq: p.seq,
                        data,
                    },
                );
            }
        }
    }

    /// Whether anything lies in `start..end`.
    pub(crate) fn touches(&self, start: u64, end: u64) -> bool {
        self.pieces
            .range(..end)
            .next_back()
            .is_some_and(|(_, p)| p.end > start)
    }

    /// Puts what it has over bytes that were read from the disk at `offset`.
    pub(crate) fn patch(&self, offset: u64, buf: &mut [u8]) {
        let end = offset + buf.len() as u64;
        let from = match self.pieces.range(..=offset).next_back() {
            Some((k, p)) if p.end > offset => *k,
            _ => offset,
        };
        for (k, p) in self.pieces.range(from..end) {
            let (a, b) = ((*k).max(offset), p.end.min(end));
            let to = &mut buf[(a - offset) as usize..(b - offset) as usize];
            match &p.data {
                Some(d) => to.copy_from_slice(&d[(a - k) as usize..(b - k) as usize]),
                None => to.fill(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // Any mix of writes and removals reads like the plain picture: a removal brings back the
        // base only where its record is still on top.
        #[test]
        fn like_a_plain_array(ops in proptest::collection::vec((0u64..200, 1u64..60, any::<u8>(), any::<bool>()), 1..40), removes in proptest::collection::vec(any::<proptest::sample::Index>(), 0..20)) {
            let mut o = Overlay::default();
            let mut top: Vec<Option<(u64, u8)>> = vec![None; 300];
            let mut done = Vec::new();
            for (i, (off, len, v, zero)) in ops.iter().enumerate() {
                let op = if *zero { WriteOp::Zero(*len) } else { WriteOp::Data(vec![*v; *len as usize].into()) };
                let w = DiskWrite { offset: *off, op };
                o.insert(&w, i as u64);
                for t in &mut top[*off as usize..(off + len) as usize] {
                    *t = Some((i as u64, if *zero { 0 } else { *v }));
                }
                done.push(w);
            }
            for r in removes {
                let i = r.index(done.len());
                o.remove(&done[i], i as u64);
                for t in &mut top {
                    if t.is_some_and(|t| t.0 == i as u64) {
                        *t = None;
                    }
                }
            }
            let mut buf = vec![0xaa; 290];
            o.patch(5, &mut buf);
            for (i, b) in buf.iter().enumerate() {
                prop_assert_eq!(*b, top[i + 5].map_or(0xaa, |t| t.1));
            }
        }
    }
}
