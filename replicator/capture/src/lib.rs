//! Capture: what a running guest's memory and devices are at a barrier, on stock QEMU.
//!
//! Writes are tracked from outside QEMU: a userfaultfd (made inside it once, by ptrace) in asynchronous
//! write-protect mode, and `ioctl(PAGEMAP_SCAN)` that tells and protects again. Needs x86-64, Linux
//! 6.7, and the right to trace QEMU.
//!
//! | module | what |
//! | --- | --- |
//! | `blocks` | RAM blocks, from the monitor and /proc/PID/maps |
//! | `refuse`, `probe` | guests and hosts that cannot be captured, and why |
//! | `inject`, `uffd` | the tracking descriptor |
//! | `pagemap`, `scan`, `pool` | what was written, found by several threads |
//! | `mapping`, `copy`, `page_set` | the copies |
//! | `device_state` | the devices |
//! | `capture` | rounds and checkpoints |

mod bits;
mod blocks;
mod capture;
mod copy;
mod device_state;
mod error;
mod inject;
mod mapping;
mod page_set;
mod pagemap;
mod pool;
mod probe;
mod refuse;
mod scan;
mod uffd;

pub use blocks::{PAGE_BYTES, RamBlock, ram_blocks};
pub use capture::{Capture, Collected, Options, Pause};
pub use error::CaptureError;
pub use page_set::{PageRange, PageSet};
pub use probe::probe;
pub use refuse::{Refusal, refusals};
