//! Capture: what a running guest's memory and devices are at a barrier, on stock QEMU.

mod blocks;
mod error;
mod refuse;

pub use blocks::{PAGE_BYTES, RamBlock, ram_blocks};
pub use error::CaptureError;
pub use refuse::Refusal;
