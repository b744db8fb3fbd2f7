//! What the demo and the scenarios tell while they happen: one plain line each, with the time since the start.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static START: OnceLock<Instant> = OnceLock::new();

/// Time since the first line.
pub fn elapsed() -> Duration {
    START.get_or_init(Instant::now).elapsed()
}

/// Tells a line.
pub fn tell(line: impl AsRef<str>) {
    println!("[{:7.2} s] {}", elapsed().as_secs_f64(), line.as_ref());
}
