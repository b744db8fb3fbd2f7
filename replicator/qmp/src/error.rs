//! What can go wrong on a monitor connection.

use std::time::Duration;

/// Why a monitor command failed. After [`QmpError::Closed`] and [`QmpError::Protocol`] the
/// connection is of no more use; after the others it is.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The monitor hung up: QEMU is gone, or has handed the socket to somebody else.
    #[error(
        "QEMU closed its monitor socket {path}: the process has ended, or another client took the monitor"
    )]
    Closed {
        /// The socket.
        path: String,
    },
    /// No answer in time. The reply, should it still come, is dropped.
    #[error(
        "QEMU did not answer {command} within {} ms: it hangs, or its disk stalls (a stop waits for disk requests)",
        waited.as_millis()
    )]
    Timeout {
        /// The command, or what was waited for.
        command: String,
        /// How long.
        waited: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Command {
        /// The command.
        command: String,
        /// QMP's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// The other side does not speak QMP as we know it.
    #[error(
        "the monitor socket {path} does not speak QMP: {what}. Is it a QMP monitor (mode=control)?"
    )]
    Protocol {
        /// The socket.
        path: String,
        /// What was wrong.
        what: String,
    },
    /// The socket could not be reached or used.
    #[error(
        "cannot use the monitor socket {path}: {source}. Is the guest running, and may this user open the socket?"
    )]
    Io {
        /// The socket.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
}

impl QmpError {
    /// Whether QEMU (or at least its monitor) is gone for good.
    pub fn is_closed(&self) -> bool {
        matches!(self, QmpError::Closed { .. })
    }

    /// Whether the command does not exist in this QEMU.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, QmpError::Command { class, .. } if class == "CommandNotFound")
    }
}
