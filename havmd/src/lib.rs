//! The daemon `havmd` and the CLI `havm`.

pub mod control;
mod detach;
pub mod driver;
pub mod durable;
pub mod events;
pub mod guests;
pub mod libvirt;
pub mod process;
pub mod record;
pub mod replicators;
