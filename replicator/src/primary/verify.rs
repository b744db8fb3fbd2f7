//! Comparing both copies, byte for byte by hash, while the guest runs.
//!
//! Memory goes slice by slice. A slice is hashed from live memory during an epoch; at its barrier, pages of the
//! slice that the guest wrote meanwhile are hashed again from the copies that the epoch carries: so all hashes are of
//! the very instant of the barrier, which is what the standby holds when it has committed that epoch. A page that
//! capture had missed would be seen here: its live hash differs from the standby's.
//!
//! Disk blocks that the guest wrote during their slice are asked again in a later one.

use super::session::{Session, text};
use super::{GuestEvent, Worker};
use crate::disks::Disks;
use havm_capture::{Capture, PAGE_BYTES, PageSet};
use havm_core::ids::EpochNo;
use havm_disk::EpochWrites;
use havm_image::RamReader;
use havm_wire::frame::{BlockHash, Frame, HashRange};
use std::collections::VecDeque;

/// Pages hashed in one epoch: 32 MiB.
const PAGES: u32 = 8192;
/// Disk blocks hashed in one epoch.
const BLOCKS: u32 = 256;
/// A block that the guest writes all the time is given up after so many slices.
const MAX_TRIES: u32 = 50;

/// The hash that both sides use.
pub(crate) fn hash(bytes: &[u8]) -> BlockHash {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    out
}

struct RamSlice {
    block: u16,
    first: u32,
    hashes: Vec<BlockHash>,
}

struct DiskSlice {
    disk: u16,
    first: u32,
    hashes: Vec<BlockHash>,
}

/// A comparison under way.
pub(super) struct Verify {
    id: u64,
    reader: RamReader,
    ram_left: VecDeque<(u16, u32, u32)>,
    /// Disk, first block, count, times tried.
    disk_left: VecDeque<(u16, u32, u32, u32)>,
    ram: Option<RamSlice>,
    disk: Option<(DiskSlice, u32)>,
    trouble: Option<String>,
    done: bool,
}

impl Verify {
    fn new(id: u64, reader: RamReader, capture: &Capture, disks: &Disks) -> Verify {
        let ram = capture.blocks().iter().enumerate();
        let pages = |len: u64| (len / PAGE_BYTES as u64) as u32;
        Verify {
            id,
            reader,
            ram_left: ram.map(|(i, b)| (i as u16, 0, pages(b.len))).collect(),
            disk_left: disks
                .iter()
                .enumerate()
                .map(|(i, d)| (i as u16, 0, d.blocks(), 0))
                .collect(),
            ram: None,
            disk: None,
            trouble: None,
            done: false,
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// While the guest runs, before the barrier: hashes the next slice.
    pub(super) fn look(&mut self, disks: &Disks) {
        if let Some((block, first, left)) = self.ram_left.pop_front() {
            let count = left.min(PAGES);
            if left > count {
                self.ram_left
                    .push_front((block, first + count, left - count));
            }
            let mut hashes = Vec::with_capacity(count as usize);
            match self
                .reader
                .pages(block, first, count, |page| hashes.push(hash(page)))
            {
                Ok(()) => {
                    self.ram = Some(RamSlice {
                        block,
                        first,
                        hashes,
                    })
                }
                Err(e) => self.trouble = Some(text(e)),
            }
        } else if let Some((disk, first, left, tries)) = self.disk_left.pop_front() {
            let count = left.min(BLOCKS);
            if left > count {
                self.disk_left
                    .push_front((disk, first + count, left - count, tries));
            }
            let read = disks.get(disk).ok_or_else(|| "no such disk".to_owned());
            match read.and_then(|d| d.hash_blocks(first..first + count).map_err(text)) {
                Ok(hashes) => {
                    self.disk = Some((
                        DiskSlice {
                            disk,
                            first,
                            hashes,
                        },
                        tries,
                    ))
                }
                Err(e) => self.trouble = Some(e),
            }
        }
    }

    /// Behind the barrier: sends what holds at its instant.
    pub(super) fn send(
        &mut self,
        session: &Session,
        n: EpochNo,
        pages: &PageSet,
        writes: &[EpochWrites],
    ) -> Result<(), String> {
        session.frame(&Frame::VerifyAt { id: self.id, n })?;
        if let Some(mut s) = self.ram.take() {
            for (h, page) in s.hashes.iter_mut().zip(s.first..) {
                if let Some(copy) = pages.get(s.block, page) {
                    *h = hash(copy);
                }
            }
            let (first, hashes) = (u64::from(s.first), s.hashes);
            session.frame(&Frame::VerifyRam(HashRange {
                id: self.id,
                object: s.block,
                first,
                hashes,
            }))?;
        }
        if let Some((s, tries)) = self.disk.take() {
            self.send_disk(session, s, tries, writes)?;
        }
        if self.ram_left.is_empty() && self.disk_left.is_empty() {
            session.frame(&Frame::VerifyEnd { id: self.id })?;
            self.done = true;
        }
        Ok(())
    }

    /// Sends the runs of blocks that this epoch did not write; the others come again.
    fn send_disk(
        &mut self,
        session: &Session,
        s: DiskSlice,
        tries: u32,
        writes: &[EpochWrites],
    ) -> Result<(), String> {
        let written = writes
            .get(usize::from(s.disk))
            .map(|w| w.blocks(s.first + s.hashes.len() as u32));
        let is_written = |b: u32| written.as_ref().is_some_and(|w| w.contains(b));
        let mut at = s.first;
        for run in runs(&s.hashes, |i| is_written(s.first + i as u32)) {
            let count = run.len() as u32;
            if !is_written(at) {
                let range = HashRange {
                    id: self.id,
                    object: s.disk,
                    first: u64::from(at),
                    hashes: run.to_vec(),
                };
                session.frame(&Frame::VerifyDisk(range))?;
            } else if tries < MAX_TRIES {
                self.disk_left.push_back((s.disk, at, count, tries + 1));
            } else {
                self.trouble = Some(format!(
                    "disk {}: block {at} is written all the time",
                    s.disk
                ));
            }
            at += count;
        }
        Ok(())
    }

    pub(super) fn trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }
}

/// Cuts a list into runs of equal answer.
fn runs<T>(list: &[T], answer: impl Fn(usize) -> bool) -> Vec<&[T]> {
    let mut out = Vec::new();
    let mut from = 0;
    for i in 1..=list.len() {
        if i == list.len() || answer(i) != answer(from) {
            out.push(&list[from..i]);
            from = i;
        }
    }
    out
}

impl Worker {
    pub(super) fn mind_verify(&mut self) {
        let Some(v) = &mut self.verify else { return };
        let id = v.id;
        if let Some(why) = v.trouble() {
            self.verify = None;
            self.tell(GuestEvent::VerifyFailed(id, why));
        } else if v.is_done() {
            // The standby's answer comes by itself.
            self.verify = None;
        }
    }

    pub(super) fn begin_verify(&mut self, id: u64) {
        let why = match &self.session {
            Some(s) if s.is_eligible() && self.verify.is_none() => {
                let parts = &self.parts;
                match RamReader::open(parts.qmp.peer_pid(), parts.capture.blocks()) {
                    Ok(r) => {
                        self.verify = Some(Verify::new(id, r, &parts.capture, &parts.disks));
                        return;
                    }
                    Err(e) => e.to_string(),
                }
            }
            Some(s) if s.is_eligible() => "another comparison runs".into(),
            _ => "the guest is not protected at the moment".into(),
        };
        self.tell(GuestEvent::VerifyFailed(id, why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_the_answer_changes() {
        let v = vec![0, 1, 2, 3, 4];
        assert_eq!(runs(&v, |i| i == 2), [&[0, 1][..], &[2], &[3, 4]]);
        assert!(runs::<u8>(&[], |_| true).is_empty());
    }
}
