//! Keeps dirtying memory at the wanted rate, and keeps checking it.

use crate::content::{Arena, PAGES_PER_MIB};
use crate::report::MemorySeen;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Between two steps of writing.
const WRITE_STEP: Duration = Duration::from_millis(4);
/// What was not written during a pause is not made up for beyond this.
const MAX_CATCH_UP: Duration = Duration::from_millis(20);
/// Between two steps of checking, and the pages of one: about 4 MiB a second.
const CHECK_STEP: Duration = Duration::from_millis(20);
const CHECK_PAGES: usize = 20;
/// Pages written under one lock, so that others get their turn.
const LOCKED_PAGES: usize = 256;

struct Work {
    arena: Arena,
    mib_per_s: f64,
}

/// The dirtied memory and its two threads.
#[derive(Clone)]
pub struct Memory {
    shared: Arc<(Mutex<Work>, Condvar)>,
    /// The largest working set that is accepted, MiB.
    max_mib: u64,
}

impl Memory {
    /// Starts with nothing to do. The working set may grow to half of what is free now.
    pub fn start() -> Memory {
        let work = Work {
            arena: Arena::new(0, super::sys::monotonic_ns()),
            mib_per_s: 0.0,
        };
        let memory = Memory {
            shared: Arc::new((Mutex::new(work), Condvar::new())),
            max_mib: free_mib() / 2,
        };
        let writer = memory.clone();
        std::thread::spawn(move || writer.keep_writing());
        let checker = memory.clone();
        std::thread::spawn(move || checker.keep_checking());
        memory
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.shared.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Sets rate and working set.
    pub fn dirty(&self, mib_per_s: f64, working_mib: u64) -> Result<(), String> {
        if !(0.0..=100_000.0).contains(&mib_per_s) {
            return Err(format!("{mib_per_s} MiB/s is not a rate"));
        }
        self.grow_check(working_mib)?;
        let mut work = self.lock();
        let pages = (working_mib * PAGES_PER_MIB) as usize;
        if work.arena.len() != pages {
            work.arena.resize(pages);
        }
        work.mib_per_s = mib_per_s;
        self.shared.1.notify_all();
        Ok(())
    }

    fn grow_check(&self, mib: u64) -> Result<(), String> {
        if mib > self.max_mib {
            return Err(format!(
                "{mib} MiB asked for, at most {} MiB fit",
                self.max_mib
            ));
        }
        Ok(())
    }

    /// Dirties that much at once; the working set grows to it where it is smaller.
    pub fn burst(&self, mib: u64) -> Result<(), String> {
        self.grow_check(mib)?;
        let mut left = (mib * PAGES_PER_MIB) as usize;
        if self.lock().arena.len() < left {
            self.lock().arena.resize(left);
        }
        while left > 0 {
            let now = left.min(LOCKED_PAGES);
            self.lock().arena.write(now);
            left -= now;
        }
        self.shared.1.notify_all();
        Ok(())
    }

    /// Checks all of it now.
    pub fn check_all(&self) {
        let mut left = self.lock().arena.len();
        while left > 0 {
            let now = left.min(LOCKED_PAGES);
            self.lock().arena.check(now);
            left -= now;
        }
    }

    /// What was seen.
    pub fn seen(&self) -> MemorySeen {
        self.lock().arena.seen().clone()
    }

    fn keep_writing(&self) {
        let mut last = Instant::now();
        let mut owed = 0.0;
        loop {
            let mut work = self.lock();
            while work.mib_per_s <= 0.0 || work.arena.is_empty() {
                work = self.shared.1.wait(work).unwrap_or_else(|e| e.into_inner());
                last = Instant::now();
            }
            let rate = work.mib_per_s * PAGES_PER_MIB as f64;
            drop(work);
            owed += last.elapsed().min(MAX_CATCH_UP).as_secs_f64() * rate;
            last = Instant::now();
            while owed >= 1.0 {
                let now = (owed as usize).min(LOCKED_PAGES);
                self.lock().arena.write(now);
                owed -= now as f64;
            }
            std::thread::sleep(WRITE_STEP);
        }
    }

    fn keep_checking(&self) {
        loop {
            let mut work = self.lock();
            while work.arena.is_empty() {
                work = self.shared.1.wait(work).unwrap_or_else(|e| e.into_inner());
            }
            work.arena.check(CHECK_PAGES);
            drop(work);
            std::thread::sleep(CHECK_STEP);
        }
    }
}

fn free_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
