//! What can go wrong with a standby image.

use havm_qmp::QmpError;

/// Why a standby image cannot be made, moved or run.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The waiting QEMU is not the guest that the primary runs.
    #[error(
        "the waiting guest differs from the primary's: {0}; its definition must be the one that `havm protect` installed (run `havm protect` again)"
    )]
    Mismatch(String),
    /// The guest's RAM is not in a file that can be mapped.
    #[error("RAM block {block} of the waiting guest cannot be mapped: {why}")]
    Map {
        /// The block.
        block: String,
        /// The cause.
        why: String,
    },
    /// QEMU did not load the image.
    #[error("QEMU did not load the image: {0}")]
    Load(String),
    /// The monitor failed.
    #[error("the waiting guest's monitor: {0}")]
    Qmp(#[from] QmpError),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}
