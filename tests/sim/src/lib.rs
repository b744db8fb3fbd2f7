//! A deterministic simulation of a pair: two real engines of `havm-core`, with modelled witness,
//! replicators, guests, network and faults, in virtual time. One seed is one history.
//!
//! First faults of every kind, with the checkers of [`check`] at every step; then the faults stop,
//! and the guest has to be protected again within a bounded time.

pub mod check;
pub mod faults;
pub mod node;
mod obey;
pub mod replica;
pub mod rng;
pub mod world;

pub use world::{Lie, Outcome, Setup, run};
