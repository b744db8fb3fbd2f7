//! The protocol of the data plane, without sockets, clocks or tasks.
#![forbid(unsafe_code)]

pub mod acked;
