//! Everything that the machine's thread hears.

use crate::acks::StreamEvent;
use crate::primary::GuestEvent;
use crate::standby::StandbyEvent;
use havm_core::ids::{StreamId, Term};
use havm_core::order::Order;

/// One input.
#[derive(Debug)]
pub enum Input {
    /// The daemon orders.
    Order(Order),
    /// A guest's thread tells: which, and what.
    Guest(u64, GuestEvent),
    /// A stream that we send tells.
    Stream(StreamId, StreamEvent),
    /// The threads of a standby copy tell: which, and what.
    Standby(u64, StandbyEvent),
    /// After a promotion in this term: all of the disk is durable.
    Flushed(Term),
}
