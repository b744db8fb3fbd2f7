//! Hooks: every event of havm is given to the executables in a folder.
//!
//! ```text
//!   fire(event, guest, json) ──> bounded queue, in order per guest ──> worker ──┬─> 10-page-me
//!        never blocks            (full: dropped, counted)                       └─> 20-log
//! ```
//!
//! A hook gets the event as JSON on its standard input, and its name and guest as `HAVM_EVENT` and
//! `HAVM_GUEST`. The folder is read anew for every event, so hooks come and go without a restart.
//! A hook can delay later events of the same guest to other hooks, and nothing else: it runs in its own
//! process group, under a deadline, and whatever is left of the group when it ends is killed. (For
//! lasting work a hook should start a service.)

pub mod catalogue;
mod discover;
mod process;
mod runner;
mod text;

pub use discover::{Found, Skipped, discover};
pub use process::{Ending, Outcome};
pub use runner::{Counters, Limits, Runner};
