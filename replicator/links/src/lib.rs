//! The links of a pair: who the other end is, and the striped stream between two replicators.
#![forbid(unsafe_code)]

pub mod identity;
pub mod tls;
