//! The version of the wire, told by both sides before anything else.
//!
//! Both must be the same. What changed is listed here, newest first:
//!
//! - 1: first.

/// The version this build speaks.
pub const WIRE_VERSION: u32 = 1;

/// The first bytes of every [`crate::hello::Hello`], of every version.
pub const MAGIC: [u8; 8] = *b"HAVMWIRE";

/// The two sides speak different versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the peer speaks version {theirs} of the replication protocol, this side version {ours}: install the same havm on both servers"
)]
pub struct VersionMismatch {
    /// This build's.
    pub ours: u32,
    /// The peer's.
    pub theirs: u32,
}

/// Whether a peer of version `theirs` can be talked to.
pub fn check(theirs: u32) -> Result<(), VersionMismatch> {
    if theirs == WIRE_VERSION {
        Ok(())
    } else {
        Err(VersionMismatch {
            ours: WIRE_VERSION,
            theirs,
        })
    }
}
