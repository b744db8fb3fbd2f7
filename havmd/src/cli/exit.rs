//! Exit codes of `havm`; they are part of its interface.

use std::process::ExitCode;

/// What a command ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It was done; in `status`: every guest is safe, or stopped on purpose.
    Ok = 0,
    /// It failed; nothing is known to be unsafe.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// Not safe: a guest is exposed, held or down; or the request would be dangerous now; or a
    /// comparison found a difference.
    NotSafe = 3,
    /// The daemon cannot be reached.
    NoDaemon = 4,
    /// The configuration is wrong.
    Config = 5,
    /// It was begun, and did not end in the time given.
    TimedOut = 6,
}

impl Exit {
    /// For `--help`.
    pub const HELP: &'static str = "Exit codes:\n  \
        0  done (status: every guest is safe, or stopped on purpose)\n  \
        1  failed\n  \
        2  wrong command line\n  \
        3  not safe: a guest is exposed, held or down; the request would be dangerous now; or a comparison found a difference\n  \
        4  the daemon cannot be reached\n  \
        5  the configuration is wrong\n  \
        6  begun, but not finished in the time given";
}

impl From<Exit> for ExitCode {
    fn from(e: Exit) -> ExitCode {
        ExitCode::from(e as u8)
    }
}
