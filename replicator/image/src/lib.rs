//! The standby's copy of a guest: its RAM image, and its promotion.
//!
//! A QEMU waits with `-incoming defer`; the RAM of the guest is a file that this process maps and
//! writes ([`ram::RamImage`]). At promotion a small migration stream is made from what the primary
//! sent ([`stream`]): header, the list of RAM blocks, the few blocks that are not in the file,
//! and the device state of the last epoch. QEMU loads it and runs ([`promote`]).
//!
//! ```text
//!   map(QEMU waits) ──> write pages, epoch after epoch ──> promote ──> runs
//!         │  ^
//!         └──┘ rehome: the image moves into a fresh waiting QEMU (after a handover)
//! ```

pub mod error;
mod mapping;
pub mod promote;
pub mod ram;
pub mod reader;
pub mod stream;

pub use error::ImageError;
pub use promote::{Promoted, promote};
pub use ram::{BlockInfo, RamImage};
pub use reader::RamReader;

/// The page size of the image, bytes. x86-64 guests only.
pub const PAGE_BYTES: usize = 4096;
