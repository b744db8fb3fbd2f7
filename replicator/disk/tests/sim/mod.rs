//! A simulated machine: files in memory that record every write and flush, so that the state after
//! a crash at any point can be made up: all that was flushed, and any part of the rest.

#![allow(dead_code, reason = "each test uses its part")]

use havm_disk::store::Store;
use havm_disk::{DiskConfig, Stores};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A small seeded generator (splitmix64): the same seed, the same history.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Debug, Clone)]
pub enum Op {
    Write { offset: u64, data: Arc<[u8]> },
    SetLen(u64),
    Flush,
}

/// Everything that the files of one machine were told, in order.
#[derive(Debug, Default)]
pub struct World {
    pub ops: Mutex<Vec<(usize, Op)>>,
}

impl World {
    pub fn now(&self) -> usize {
        self.ops.lock().unwrap().len()
    }
    /// The next moment from `at` on at which a flush has not happened yet, but is next.
    pub fn before_flush(&self, at: usize) -> usize {
        let ops = self.ops.lock().unwrap();
        (at..ops.len())
            .find(|i| matches!(ops[*i].1, Op::Flush))
            .unwrap_or(at)
    }
}

#[derive(Debug)]
pub struct SimFile {
    world: Arc<World>,
    id: usize,
    live: Mutex<Vec<u8>>,
}

impl SimFile {
    pub fn content(&self) -> Vec<u8> {
        self.live.lock().unwrap().clone()
    }
    fn log(&self, op: Op) {
        self.world.ops.lock().unwrap().push((self.id, op));
    }
}

impl Store for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.live.lock().unwrap().len() as u64)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let live = self.live.lock().unwrap();
        let at = offset as usize;
        let from = live
            .get(at..at + buf.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(from);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        put(&mut self.live.lock().unwrap(), offset, data);
        self.log(Op::Write {
            offset,
            data: data.into(),
        });
        Ok(())
    }
    fn zero_at(&self, offset: u64, len: u64, _punch: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; len as usize])
    }
    fn set_size(&self, len: u64) -> io::Result<()> {
        self.live.lock().unwrap().resize(len as usize, 0);
        self.log(Op::SetLen(len));
        Ok(())
    }
    fn reserve(&self, len: u64) -> io::Result<()> {
        if self.size()? < len {
            self.set_size(len)
        } else {
            Ok(())
        }
    }
    fn flush(&self) -> io::Result<()> {
        self.log(Op::Flush);
        Ok(())
    }
    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        Ok((from < end).then_some(from..end))
    }
}

fn put(v: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let end = offset as usize + data.len();
    if v.len() < end {
        v.resize(end, 0);
    }
    v[offset as usize..end].copy_from_slice(data);
}

/// One machine: image, metadata, two journal segments.
#[derive(Debug)]
pub struct Machine {
    pub world: Arc<World>,
    pub files: [Arc<SimFile>; 4],
    start: [Vec<u8>; 4],
}

/// How a machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The process dies: all it wrote is in the page cache.
    Kill,
    /// The power goes: only what was flushed is sure; the rest any part of it.
    Power,
}

impl Machine {
    pub fn new(image_bytes: u64) -> Self {
        Self::from_files([
            vec![0; image_bytes as usize],
            Vec::new(),
            Vec::new(),
            Vec::new(),
        ])
    }

    pub fn from_files(start: [Vec<u8>; 4]) -> Self {
        let world = Arc::<World>::default();
        let files = std::array::from_fn(|id| {
            Arc::new(SimFile {
                world: world.clone(),
                id,
                live: Mutex::new(start[id].clone()),
            })
        });
        Machine {
            world,
            files,
            start,
        }
    }

    pub fn stores(&self) -> Stores {
        Stores {
            image: self.files[0].clone(),
            meta: self.files[1].clone(),
            journal: [self.files[2].clone(), self.files[3].clone()],
        }
    }

    /// The machine after a crash when `at` operations had been done.
    pub fn crashed(&self, at: usize, how: Crash, rng: &mut Rng) -> Machine {
        let ops = self.world.ops.lock().unwrap();
        let ops = &ops[..at];
        let files = std::array::from_fn(|id| {
            let last_flush = ops
                .iter()
                .rposition(|(f, op)| *f == id && matches!(op, Op::Flush))
                .map_or(0, |i| i + 1);
            let sure = if how == Crash::Kill { at } else { last_flush };
            // Some crashes keep nearly everything, some nearly nothing: both find faults.
            let keep = [5, 50, 95][rng.below(3) as usize];
            let mut v = self.start[id].clone();
            for (i, (_, op)) in ops.iter().enumerate().filter(|(_, (f, _))| *f == id) {
                let kept = i < sure || rng.chance(keep);
                match op {
                    Op::SetLen(n) if kept => v.resize(*n as usize, 0),
                    Op::Write { offset, data } if kept => {
                        let whole = i < sure || rng.chance(60);
                        let sectors = data.len().div_ceil(512) as u64;
                        let n = if whole {
                            sectors
                        } else {
                            rng.below(sectors + 1)
                        } as usize
                            * 512;
                        put(&mut v, *offset, &data[..n.min(data.len())]);
                    }
                    _ => (),
                }
            }
            v
        });
        Machine::from_files(files)
    }
}

pub const DISK_ID: [u8; 16] = [0xd1; 16];

pub fn config() -> DiskConfig {
    let mut c = DiskConfig::new("sim-image".into(), "sim-meta".into(), DISK_ID);
    c.segment_bytes = 1 << 18;
    c.log_extents = 4;
    c
}

/// How many histories, and the first seed: `HAVM_DISK_RUNS`, `HAVM_DISK_SEED`.
pub fn histories(default: u64) -> Range<u64> {
    let env = |n: &str| std::env::var(n).ok().and_then(|v| v.parse().ok());
    let first = env("HAVM_DISK_SEED").unwrap_or(1);
    first..first + env("HAVM_DISK_RUNS").unwrap_or(default)
}
