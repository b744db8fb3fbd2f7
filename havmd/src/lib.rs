//! The daemon `havmd` and the CLI `havm`.

mod detach;
pub mod durable;
pub mod libvirt;
pub mod process;
pub mod record;
pub mod replicators;
