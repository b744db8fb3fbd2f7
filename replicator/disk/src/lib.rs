//! The replicated disk engine. (Module page: see below, being written.)

pub mod backing;
pub mod blocks;
pub mod counters;
pub mod disk;
pub mod epoch;
pub mod error;
mod intent;
pub mod journal;
pub mod meta;
pub mod nbd;
mod overlay;
pub mod store;
pub mod sync;
mod sys;
mod tracker;

pub use backing::Durability;
pub use blocks::{BLOCK_BYTES, BlockSet};
pub use counters::Counters;
pub use disk::{Disk, DiskConfig, Stores};
pub use epoch::{DiskWrite, EpochWrites, WriteOp};
pub use error::{DiskError, MetaError, Result};
pub use sync::{BlockData, BlockHash};
pub use tracker::Mode;
