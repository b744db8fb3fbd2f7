//! The guest that can testify, and those who question it.
//!
//! `testify` runs inside the guest as its only program. It answers numbered requests, each only
//! after a checksummed record of it was written durably to the disk, and keeps memory that knows
//! what it should hold. `testify-client` stands outside, keeps connections busy and proves at the
//! end that nothing was lost, repeated or taken back.
//!
//! ```text
//!   testify-client ──request n──> testify ──record──> /dev/vda (O_DSYNC)
//!                  <──answer n (record, counter, stamp)──┘
//! ```
//!
//! Every answer carries a counter that grows by one through the whole guest, and a stamp of the
//! guest's clock. A guest that was set back to an earlier state after it had answered would use a
//! counter twice, with two stamps: that is how a history that was taken back is seen.

pub mod content;
pub mod domain;
pub mod guest;
pub mod proto;
pub mod report;

#[cfg(feature = "host")]
pub mod client;
#[cfg(feature = "host")]
pub mod image;
#[cfg(feature = "host")]
pub mod recorder;
