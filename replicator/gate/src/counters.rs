//! What a gate has seen, in numbers that only grow.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// A snapshot; every number counts since the gate was made.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64),+ }

        #[derive(Default)]
        pub(crate) struct Cells { $(pub $name: AtomicU64),+ }

        impl Cells {
            pub fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.load(Relaxed)),+ }
            }
        }
    };
}

counters! {
    /// Frames of the guest put into the bridge (passed or released).
    out_frames,
    /// Their bytes, without virtio-net headers.
    out_bytes,
    /// Of them: held first and then released.
    released_frames,
    /// Frames of the guest that were held.
    held_frames,
    /// Frames of the guest dropped because the gate was closed.
    closed_dropped,
    /// Held frames dropped by `discard`, or by `pass` without keeping.
    discarded,
    /// Frames of the guest that the bridge tap did not take.
    out_failed,
    /// Frames of the guest that could not be read whole, or not without a virtio-net header.
    unusable,
    /// Frames of the guest dropped by the kernel before we read them: the queue was full.
    overflowed,
    /// Frames given to the guest.
    in_frames,
    /// Their bytes.
    in_bytes,
    /// Frames for the guest dropped: the gate was closed, or its tap did not take them. (What
    /// a stopped QEMU does not fetch is dropped by the tap, and counted there as `tx_dropped`.)
    in_dropped,
    /// Acks refused: of another term or stream, or of an epoch that is not closed.
    acks_refused,
}

pub(crate) fn add(cell: &AtomicU64, n: u64) {
    cell.fetch_add(n, Relaxed);
}
