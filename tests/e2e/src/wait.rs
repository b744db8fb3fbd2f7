//! Waiting for what must come, with a bound for hangs.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// The bound for anything that should take seconds: generous, as machines are slow and noisy.
pub const LONG: Duration = Duration::from_secs(120);

/// Asks `look` again and again until it gives a value. The last reason why not is part of the error.
///
/// # Errors
/// Nothing came in `bound`.
pub fn until<T>(
    what: &str,
    bound: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let since = Instant::now();
    let mut last = String::from("not yet");
    loop {
        match look() {
            Ok(Some(v)) => return Ok(v),
            Ok(None) => {}
            Err(e) => last = format!("{e:#}"),
        }
        if since.elapsed() > bound {
            bail!("waited {} s for {what}: {last}", bound.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
