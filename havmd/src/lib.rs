//! The daemon `havmd` and the CLI `havm`.

mod detach;

pub mod beats;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod driver;
pub mod durable;
pub mod events;
pub mod frame;
pub mod guests;
pub mod identity_store;
pub mod libvirt;
pub mod pairing;
pub mod peer;
pub mod process;
pub mod random;
pub mod record;
pub mod render;
pub mod replicators;
pub mod witness;
