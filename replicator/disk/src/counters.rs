//! Numbers that only grow, since the disk was opened.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Live counters.
        #[derive(Debug, Default)]
        pub(crate) struct Live { $(pub(crate) $name: AtomicU64),* }

        /// A reading of a disk's counters.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counters { $($(#[$doc])* pub $name: u64),* }

        impl Live {
            pub(crate) fn read(&self) -> Counters {
                Counters { $($name: self.$name.load(Relaxed)),* }
            }
        }
    };
}

counters! {
    /// Guest reads.
    reads,
    /// Bytes of them.
    read_bytes,
    /// Guest writes, zeroes and trims.
    writes,
    /// Bytes of them.
    write_bytes,
    /// Guest flushes.
    flushes,
    /// Guest requests answered with an error.
    errors,
    /// Extents taken into the write-intent log.
    log_activations,
    /// Log transactions (each is a write and a flush).
    log_writes,
    /// Bytes appended to the standby's journal.
    journal_bytes,
    /// Epochs committed on the standby.
    commits,
    /// Bytes written in place by resync.
    sync_bytes,
}

pub(crate) fn add(c: &AtomicU64, n: u64) {
    c.fetch_add(n, Relaxed);
}
