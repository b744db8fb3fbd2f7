//! Everything that the machine's thread hears.

use crate::primary::GuestEvent;
use crate::standby::StandbyEvent;
use havm_core::order::Order;

/// One input.
#[derive(Debug)]
pub enum Input {
    /// The daemon orders.
    Order(Order),
    /// The guest's thread tells.
    Guest(GuestEvent),
    /// The standby's threads tell.
    Standby(StandbyEvent),
    /// A signal asks us to leave.
    Terminate,
}
