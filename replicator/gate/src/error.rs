//! What can go wrong when a gate is made.

use std::io;

/// Why a gate could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// A name that is not a network interface name.
    #[error(
        "{0:?} is not a usable interface name: 1 to 15 characters, no '/', no white space, not '.' or '..'"
    )]
    Name(String),
    /// Not a hardware address.
    #[error("{0:?} is not a hardware address: expected six bytes like 52:54:00:12:34:56")]
    Mac(String),
    /// The guest's interface is a port of a bridge or bond: what the guest sends would bypass the gate.
    #[error(
        "interface {0} belongs to a bridge or bond, so the guest's output would bypass the gate: take it out (ip link set {0} nomaster)"
    )]
    Enslaved(String),
    /// The tap is held by another process.
    #[error(
        "interface {0} is in use by another process: is another replicator of this guest still running?"
    )]
    Busy(String),
    /// The bridge is missing.
    #[error("there is no bridge {0}: make it, or name another one in the config")]
    NoBridge(String),
    /// The kernel refused.
    #[error("cannot {what} ({dev}): {source}{}", hint(source))]
    Sys {
        /// What was tried.
        what: &'static str,
        /// On which device.
        dev: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn hint(e: &io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; the replicator needs root (CAP_NET_ADMIN, CAP_NET_RAW)"
        }
        Some(libc::ENOENT | libc::ENXIO) => "; is /dev/net/tun there (module tun)?",
        _ => "",
    }
}

/// The last error of the C library, as one of ours.
pub(crate) fn last(what: &'static str, dev: &str) -> GateError {
    GateError::Sys {
        what,
        dev: dev.to_owned(),
        source: io::Error::last_os_error(),
    }
}
