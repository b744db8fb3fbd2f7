//! The decisions of havm: events in, commands out.
//!
//! Nothing here reads a clock, opens a socket, starts a task or draws a random number: `now` is
//! passed in, ids are passed in, and every effect is a [`command::Command`] that the daemon
//! carries out in order. The safety rules are those of `docs/safety.md` (rule numbers in the
//! comments refer to it).
#![forbid(unsafe_code)]

pub mod claim;
pub mod command;
pub mod detector;
pub mod engine;
pub mod event;
pub mod evidence;
pub mod failback;
pub mod ids;
pub mod message;
pub mod order;
pub mod permit;
pub mod record;
pub mod role;
pub mod settings;
pub mod spec;
pub mod status;
pub mod timer;
