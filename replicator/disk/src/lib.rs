//! The replicated disk engine: one guest disk, served to QEMU over NBD, written into epochs on the
//! primary, committed from epochs on the standby, brought together again by resync.
//!
//! Usable and tested without QEMU. Threads and blocking IO; nothing here knows of the network.
//!
//! # States
//!
//! ```text
//!               open, create                                     seal, promote (at once)
//!                    │                       ┌──────────────────────────────────────────────┐
//!                    v                       │                                              v
//!   ┌───────── STANDBY ──────────────────────┤            go_solo                ┌──────── SOLO ────────┐
//!   │ guest writes refused, reads served     ├──────────────────────────────────>│ writes are marked    │
//!   │ begin_receiving; stage, commit         │                                   │ for the peer         │
//!   │ (eligible) or commit_direct, apply_sync│<───── become_standby ─────────────┤                      │
//!   └────────────────────────────────────────┘                  │                └──────────────────────┘
//!                                                               │     begin_tracking │  ^ end_tracking,
//!                                                               │                    v  │ or over every bound
//!                                                         ┌───────────────── TRACKING ────────────┐
//!                                                         │ writes ride in epochs: barrier, acked, │
//!                                                         │ peer_durable; resync: synced           │
//!                                                         └────────────────────────────────────────┘
//! ```
//!
//! # One epoch
//!
//! Primary: [`Disk::begin_tracking`]; while the vCPUs stand, [`Disk::barrier`] returns what the
//! guest wrote; [`Disk::acked`] and [`Disk::peer_durable`] report what the standby said.
//! [`Disk::over_limit`] asks for faster epochs; nothing ever blocks a guest's request on them.
//!
//! Standby: [`Disk::begin_receiving`], then for each complete epoch [`Disk::stage`] (it outlives
//! this process now, unseen) and [`Disk::commit`] (it is the disk's content now). While not
//! eligible, [`Disk::commit_direct`]. [`Disk::durable_upto`] is reported apart from acks.
//!
//! # One resync
//!
//! 1. Both sides know what may differ: [`Disk::out_of_sync`]. The standby sends its set
//!    ([`BlockSet::encode`]); the primary adds it ([`Disk::mark_out_of_sync`], durable).
//!    Where metadata was lost, generations do not connect, or a promotion was forced: the full set.
//! 2. During epoch `k` the primary sends [`Disk::hash_blocks`] of a piece; the standby answers, after
//!    `k - 1`, with [`Disk::compare`]. Equal ones are [`Disk::synced`] in the open epoch; the others
//!    travel as [`Disk::read_block`] in the open epoch, are [`Disk::synced`] there, and the standby
//!    does [`Disk::apply_sync`] before that epoch's guest writes.
//! 3. When the primary's set is empty, the next epoch can be eligible: its commit is
//!    [`Disk::stage`] + [`Disk::commit`], and the standby calls [`Disk::mark_consistent`].
//!    Should blocks be marked again later (a failed local write, a standby that never flushes), they
//!    are repaired without ending eligibility: [`Disk::read_block`] in the open epoch, put as writes
//!    *before* the others of that epoch's [`EpochWrites`], and [`Disk::synced`].
//! 4. The standby's own marks are taken off ([`Disk::forget_differences`]) when the last epoch is
//!    durable here and the primary has reported its disk flushed. Forgetting later is harmless.
//!
//! # What is on disk
//!
//! The image as it is; a metadata file ([`meta`]: superblock twice, write-intent log, bitmap); two
//! journal segments ([`journal`]).
//!
//! # Crash stories
//!
//! | where | what is left | what happens |
//! | --- | --- | --- |
//! | primary, in a guest write | the extent is in the log (durable before the write began) | its 16 blocks are compared |
//! | primary, in a log transaction | torn sectors; the other area is whole | no write waited for had begun |
//! | primary, while an extent leaves the log | its blocks are in the bitmap durably, or equal on both sides | a superset |
//! | standby, staging | a record that does not continue the chain | it never happened |
//! | standby, process killed after `stage` | a whole record | replayed if the commit index says so ([`Disk::open`], `upto`) |
//! | standby, power lost | a prefix of the committed epochs, at least up to `durable_upto` | replayed |
//! | standby, applying in place | some of an epoch in place, its record durable | replayed again |
//! | standby, syncing | superblock says inconsistent | not eligible; resync goes on with what is still marked |
//! | promoted, seal not durable | guest writes are only in the journal, behind the seal | all or nothing of both |
//! | promoted, journal not empty | guest writes over its blocks are in it too, in order | replay ends with the newest |
//! | metadata lost, foreign, damaged | [`DiskError::Meta`], image untouched | [`Disk::create`], full compare |
//! | journal missing, foreign, damaged | [`MetaError::Corrupt`], image untouched | the copy's life has ended; [`Disk::create`], full compare |
//! | fsync failed once | [`Disk::failed`] | every later write and flush is refused: nothing is promised |
//!
//! The tests `crash_standby` and `crash_primary` replay thousands of made-up crashes against these.
//!
//! # Durability of the standby
//!
//! With [`Durability::Memory`] (default of the product) an epoch is acked when its record is in the
//! page cache: it survives the replicator, not a power failure of the standby, which is then told
//! apart by `durable_upto` and by the primary's log. With [`Durability::Disk`] each commit waits for
//! one fdatasync of the journal. Either way no in-place write of an epoch starts before its record
//! is durable: committed bytes wait in memory, in an overlay that reads look into. So promotion does
//! not wait for any backlog; [`Disk::flush_after_promotion`] works it off behind the running guest.
//!
//! # Limits
//!
//! Raw images and block devices of whole 512-byte sectors, up to 64 TiB, size fixed while open. A
//! trim is replicated as zeroes. IO goes through the page cache (no O_DIRECT yet); the server does not
//! offer FAST_ZERO. On block devices holes are not known, so a full compare reads all.

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
mod pool;
pub mod store;
pub mod sync;
mod sys;
mod tracker;

pub use backing::Durability;
pub use blocks::{BLOCK_BYTES, BlockSet};
pub use counters::Counters;
pub use disk::{Disk, DiskConfig, MAX_WRITE_BYTES, Stores};
pub use epoch::{DiskWrite, EpochWrites, WriteOp};
pub use error::{DiskError, MetaError, Result};
pub use journal::replay::Replayed;
pub use sync::{BlockData, BlockHash, MAX_HASHES, ZERO_HASH, hash_block};
pub use tracker::Mode;
