//! Bringing a standby up to date while the guest runs: all pages once, and the blocks that may differ.
//!
//! Each slice is an epoch that is not eligible (decision 0003). For the disk: the blocks that
//! either side holds to be different are compared by hash first; what differs is read and sent.
//!
//! ```text
//!   disk: ask for the peer's set ──> union with ours ──> hashes ──> differing ──> data
//! ```

use super::session::{Session, text};
use super::{CAPTURE_FAILED, GuestEvent, Worker};
use crate::disks::Disks;
use havm_core::ids::EpochNo;
use havm_disk::{BLOCK_BYTES, BlockData, BlockSet};
use havm_wire::back::Back;
use havm_wire::epoch::OpenEpoch;
use havm_wire::frame::{Frame, HashRange};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// How long a slice takes: guest writes wait in memory for its end.
const SLICE: Duration = Duration::from_millis(100);
/// Pages collected at once.
const CHUNK_PAGES: usize = 2048;
/// With fewer pages than this left, the first whole epoch is worth its pause.
const LITTLE_PAGES: usize = 4096;
/// A guest that dirties faster than the links carry is never nearly done: after this many rounds over
/// all its memory the rest is left to the first whole epoch.
const MAX_ROUNDS: u32 = 8;
/// Hashes in one question.
const HASHES: u32 = 256;
/// Questions that wait for an answer.
const QUESTIONS: usize = 16;
/// Blocks sent at once before pages have their turn.
const BLOCKS_AT_ONCE: usize = 32;
/// Slices that the standby has not acked before the next one waits.
const SLICES_IN_FLIGHT: u64 = 8;
/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(250);

static ZEROES: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// The sync of one disk.
struct DiskJob {
    /// What is left to compare; none before the peer's set came.
    left: Option<BlockSet>,
    theirs: BlockSet,
    cursor: u32,
    asked: HashMap<u64, (u32, u32)>,
    want: VecDeque<u32>,
    /// Found equal or sent since the last epoch was closed.
    equal: Vec<u32>,
    total_blocks: u64,
    done_blocks: u64,
}

/// A bulk phase.
pub(super) struct Bulk {
    disks: Vec<DiskJob>,
    asked_sets: bool,
    next_id: u64,
    rounds: u32,
    ram_done_bytes: u64,
    told: Option<Instant>,
}

impl Bulk {
    pub(super) fn new(disks: &Disks) -> Bulk {
        let job = |blocks| DiskJob {
            left: None,
            theirs: BlockSet::new(blocks),
            cursor: 0,
            asked: HashMap::new(),
            want: VecDeque::new(),
            equal: Vec::new(),
            total_blocks: 0,
            done_blocks: 0,
        };
        Bulk {
            disks: disks.iter().map(|d| job(d.blocks())).collect(),
            asked_sets: false,
            next_id: 1,
            rounds: 0,
            ram_done_bytes: 0,
            told: None,
        }
    }

    fn disks_done(&self) -> bool {
        self.disks.iter().all(DiskJob::is_done)
    }

    pub(super) fn hear(&mut self, back: Back, disks: &Disks) -> Result<(), String> {
        match back {
            Back::PeerSet {
                disk,
                more,
                encoded,
            } => {
                let Some(job) = self.disks.get_mut(usize::from(disk)) else {
                    return Ok(());
                };
                let part = BlockSet::decode(&encoded, job.theirs.capacity()).map_err(text)?;
                job.theirs.union(&part);
                if !more && job.left.is_none() {
                    let disk = disks.get(disk).ok_or("no such disk")?;
                    // Ours from now on too: they stay marked until each is seen to be equal.
                    disk.mark_out_of_sync(&job.theirs).map_err(text)?;
                    let all = disk.out_of_sync();
                    job.total_blocks = u64::from(all.count());
                    job.left = Some(all);
                }
            }
            Back::HashReply { id, differing } => {
                for job in &mut self.disks {
                    let Some((first, count)) = job.asked.remove(&id) else {
                        continue;
                    };
                    let differing: Vec<u32> = differing
                        .iter()
                        .filter(|d| **d < count)
                        .map(|d| first + d)
                        .collect();
                    job.equal
                        .extend((first..first + count).filter(|b| !differing.contains(b)));
                    job.want.extend(differing);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl DiskJob {
    fn is_done(&self) -> bool {
        self.left.as_ref().is_some_and(BlockSet::is_empty)
            && self.asked.is_empty()
            && self.want.is_empty()
    }

    /// The next run of blocks to compare, taken out of the set.
    fn next_run(&mut self) -> Option<(u32, u32)> {
        let left = self.left.as_mut()?;
        let first = left.next_from(self.cursor).or_else(|| left.next_from(0))?;
        let mut count = 0;
        while count < HASHES && left.contains(first + count) {
            left.remove(first + count);
            count += 1;
        }
        self.cursor = first + count;
        Some((first, count))
    }
}

impl Worker {
    /// One slice of sync: an epoch of its own.
    pub(super) fn bulk_slice(&mut self) -> Result<(), String> {
        let Some(session) = self.session.as_mut() else {
            return Ok(());
        };
        if session.in_flight() > SLICES_IN_FLIGHT {
            std::thread::sleep(Duration::from_millis(1));
            return Ok(());
        }
        let Some(mut bulk) = session.take_bulk() else {
            return Ok(());
        };
        let started = Instant::now();
        let mut e = session.open(true)?;
        if !std::mem::replace(&mut bulk.asked_sets, true) {
            for disk in 0..bulk.disks.len() as u16 {
                session.frame(&Frame::PeerSetRequest { disk })?;
            }
        }
        let mut ram_near = false;
        let mut idle = false;
        while started.elapsed() < SLICE && !idle {
            let c = self
                .parts
                .capture
                .collect(&mut self.pages, CHUNK_PAGES)
                .map_err(|e| format!("{CAPTURE_FAILED}: {e}"))?;
            let n = self.pages.len();
            bulk.ram_done_bytes += (n * havm_capture::PAGE_BYTES) as u64;
            session.pages(&mut e, &self.pages)?;
            self.pages.clear();
            if !c.more {
                bulk.rounds += 1;
                ram_near = n < LITTLE_PAGES;
            }
            let moved = bulk.disk_step(session, &mut e, &self.parts.disks)?;
            idle = !c.more && !moved;
        }
        let writes = self.parts.disks.barrier().map_err(|e| e.to_string())?;
        session.writes(&mut e, &writes)?;
        let wire = e.wire_bytes();
        let n = session.close_epoch(e, None, false)?;
        bulk.settle(&self.parts.disks, n)?;
        let done = bulk.disks_done() && (ram_near || bulk.rounds > MAX_ROUNDS);
        let progress = bulk.progress(self.parts.capture.total_bytes());
        if !done {
            session.put_bulk(bulk);
        }
        self.last_barrier = Instant::now();
        self.stats(|s| s.counters.sync_bytes += wire);
        if let Some((done_bytes, total_bytes)) = progress {
            self.tell(GuestEvent::Progress {
                done_bytes,
                total_bytes,
            });
        }
        if idle && !done {
            // Only answers of the standby are missing.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub(super) fn synced(&mut self) {
        if let Some(s) = &self.session {
            self.tell(GuestEvent::Synced(s.id().stream));
        }
    }
}

impl Bulk {
    /// Asks and sends for each disk; false where there was nothing to do.
    fn disk_step(
        &mut self,
        session: &Session,
        e: &mut OpenEpoch,
        disks: &Disks,
    ) -> Result<bool, String> {
        let mut moved = false;
        for (i, job) in self.disks.iter_mut().enumerate() {
            let i = i as u16;
            let disk = disks.get(i).ok_or("no such disk")?;
            while job.asked.len() < QUESTIONS
                && let Some((first, count)) = job.next_run()
            {
                let hashes = disk.hash_blocks(first..first + count).map_err(text)?;
                let id = self.next_id;
                self.next_id += 1;
                let range = HashRange {
                    id,
                    object: i,
                    first: u64::from(first),
                    hashes,
                };
                session.frame(&Frame::HashRange(range))?;
                job.asked.insert(id, (first, count));
                moved = true;
            }
            for _ in 0..BLOCKS_AT_ONCE {
                let Some(block) = job.want.pop_front() else {
                    break;
                };
                match disk.read_block(block).map_err(text)? {
                    BlockData::Data(d) => session.sync_block(e, i, block, &d)?,
                    BlockData::Zero => {
                        let r = disk.block_range(block).map_err(text)?;
                        session.sync_block(e, i, block, &ZEROES[..(r.end - r.start) as usize])?;
                    }
                }
                job.equal.push(block);
                moved = true;
            }
        }
        Ok(moved)
    }

    /// The blocks dealt with since the last epoch are equal as of epoch `n`.
    fn settle(&mut self, disks: &Disks, n: EpochNo) -> Result<(), String> {
        for (i, job) in self.disks.iter_mut().enumerate() {
            let disk = disks.get(i as u16).ok_or("no such disk")?;
            disk.synced(&job.equal, n).map_err(text)?;
            job.done_blocks += job.equal.len() as u64;
            job.equal.clear();
        }
        Ok(())
    }

    /// Now and then: bytes done and in all.
    fn progress(&mut self, ram_bytes: u64) -> Option<(u64, u64)> {
        if self.told.is_some_and(|t| t.elapsed() < TELL_EVERY) {
            return None;
        }
        self.told = Some(Instant::now());
        let sum = |f: fn(&DiskJob) -> u64| self.disks.iter().map(f).sum::<u64>() * BLOCK_BYTES;
        let done = self.ram_done_bytes.min(ram_bytes) + sum(|d| d.done_blocks);
        Some((done, ram_bytes + sum(|d| d.total_blocks)))
    }
}
