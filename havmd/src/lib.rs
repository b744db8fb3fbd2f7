//! The daemon `havmd` and the CLI `havm`.

pub mod libvirt;
