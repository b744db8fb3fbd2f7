//! The numbers that `havm status` and the benches show.

use havm_core::order::Counters;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How many pauses the percentiles look back on.
const PAUSES: usize = 1000;
/// How many barriers the mean interval looks back on.
const INTERVALS: usize = 100;

/// What the epoch loop counts. Owned by the machine's thread.
#[derive(Default)]
pub struct Stats {
    pauses_us: VecDeque<u32>,
    barriers: VecDeque<Instant>,
    /// The counters that are kept here; the others are filled in when asked.
    pub counters: Counters,
}

impl Stats {
    /// One barrier is done.
    pub fn barrier(&mut self, at: Instant, pause: Duration, pages: u64) {
        push(
            &mut self.pauses_us,
            u32::try_from(pause.as_micros()).unwrap_or(u32::MAX),
            PAUSES,
        );
        push(&mut self.barriers, at, INTERVALS);
        self.counters.epochs += 1;
        self.counters.last_pages = pages;
    }

    /// The counters as of now.
    pub fn snapshot(&self) -> Counters {
        let mut c = self.counters.clone();
        let mut sorted: Vec<u32> = self.pauses_us.iter().copied().collect();
        sorted.sort_unstable();
        c.pause_us_p50 = percentile(&sorted, 50);
        c.pause_us_p99 = percentile(&sorted, 99);
        if let (Some(first), Some(last)) = (self.barriers.front(), self.barriers.back())
            && self.barriers.len() > 1
        {
            let n = self.barriers.len() as u128 - 1;
            c.interval_us = u64::try_from((*last - *first).as_micros() / n).unwrap_or(u64::MAX);
        }
        c
    }
}

fn push<T>(q: &mut VecDeque<T>, x: T, keep: usize) {
    if q.len() == keep {
        q.pop_front();
    }
    q.push_back(x);
}

/// The value that `p` per cent do not exceed; 0 of nothing.
fn percentile(sorted: &[u32], p: usize) -> u64 {
    let rank = (sorted.len() * p).div_ceil(100).max(1) - 1;
    sorted.get(rank).map_or(0, |&v| u64::from(v))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_last_pauses() {
        assert_eq!(percentile(&[], 50), 0);
        assert_eq!(percentile(&[7], 99), 7);
        let v: Vec<u32> = (1..=100).collect();
        assert_eq!((percentile(&v, 50), percentile(&v, 99)), (50, 99));

        let mut s = Stats::default();
        let t = Instant::now();
        for i in 0..3000u64 {
            s.barrier(
                t + Duration::from_millis(i * 10),
                Duration::from_micros(i),
                1,
            );
        }
        let c = s.snapshot();
        assert_eq!(
            (c.epochs, c.pause_us_p50, c.interval_us),
            (3000, 2499, 10_000)
        );
    }
}
