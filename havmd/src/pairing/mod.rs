//! How two machines that know nothing of each other come to know each other for ever.

pub mod code;
pub mod proof;
