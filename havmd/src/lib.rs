//! The daemon `havmd` and the CLI `havm`.
