//! The frame recorder: watches interfaces and finds answers in the raw frames.
//!
//! It does not trust TCP to have hidden anything: a frame that left a host is counted even when no
//! client would have taken it. Recording the switch ports `lan-alpha` and `lan-beta` says which host
//! each frame came from.

mod book;
mod packet;
mod run;

pub use book::{Book, Conflict, Recorded, Run};
pub use run::{Plan, RecorderHandle, run};
