//! What people see: text from the same values that `--json` prints.

pub mod events;
pub mod metrics;
pub mod status;
pub mod time;
