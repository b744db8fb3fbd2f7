//! The links of a pair: who the other end is, and the striped stream between two replicators.
//!
//! The rules of the stream are in `havm_wire`; here are its sockets, threads and clocks.
//!
//! ```text
//!   primary: Outgoing ── link 0: thread, TLS ══════ link 0: thread, TLS ── Incoming :standby
//!               │    └── link 1: thread, TLS ══════ link 1: thread, TLS ──┘   │
//!             beat                                                          beat
//! ```
#![deny(unsafe_code)]

pub mod beat;
pub mod conn;
pub mod identity;
pub mod incoming;
mod lane;
pub mod link;
pub mod listen;
pub mod outgoing;
mod sys;
pub mod tls;
