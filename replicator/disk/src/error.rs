//! What can go wrong with a disk, and what a person does about it.

use std::io;
use std::path::PathBuf;

/// Why the metadata beside a disk cannot be used. The image itself is untouched; the caller
/// creates fresh metadata ([`crate::Disk::create`]) and treats every block as possibly different.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// There is none yet.
    #[error("no disk metadata at {0}; create it (every block is then compared with the peer)")]
    Missing(PathBuf),
    /// Neither superblock copy, or a part that it points to (log, journal), is intact. A lost
    /// journal may have held committed epochs: the copy's life has ended.
    #[error(
        "disk metadata {path} is damaged ({what}); move it away and let havm make it anew (every block is then compared with the peer)"
    )]
    Corrupt {
        /// The metadata file.
        path: PathBuf,
        /// Which part.
        what: String,
    },
    /// It belongs to another disk.
    #[error(
        "disk metadata {path} belongs to another disk ({found}, expected {expected}); check the configured paths"
    )]
    Foreign {
        /// The metadata file.
        path: PathBuf,
        /// The disk id found.
        found: String,
        /// The disk id expected.
        expected: String,
    },
    /// A newer havm wrote it.
    #[error("disk metadata {path} has version {found}, this havm knows {known}; upgrade havm here")]
    Newer {
        /// The metadata file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest that we know.
        known: u32,
    },
    /// The disk was made larger or smaller since.
    #[error(
        "the disk has {found} bytes, its metadata {path} says {recorded}; resize both sides or put the right disk back"
    )]
    SizeChanged {
        /// The metadata file.
        path: PathBuf,
        /// The disk's size now.
        found: u64,
        /// The size in the metadata.
        recorded: u64,
    },
}

/// Why a disk could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// See [`MetaError`].
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path where there is one.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The image cannot be a guest's raw disk.
    #[error("{path} cannot be replicated: {why}")]
    Unsuitable {
        /// The image.
        path: PathBuf,
        /// Why, and the remedy.
        why: String,
    },
    /// Another process has it open.
    #[error("{0} is in use by another process; stop the other replicator or program first")]
    InUse(PathBuf),
    /// The request leaves the disk.
    #[error("request at {offset} of {len} bytes leaves the disk of {size} bytes")]
    OutOfRange {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The disk's size, bytes.
        size: u64,
    },
    /// A guest's write while this copy is a standby.
    #[error("this copy is a standby: guest writes are refused until it is promoted")]
    ReadOnly,
    /// An operation of another mode.
    #[error("{op} is not possible in mode {mode}")]
    WrongMode {
        /// What was asked.
        op: &'static str,
        /// The mode.
        mode: String,
    },
    /// The standby was sealed: nothing more is committed.
    #[error("the disk is sealed for promotion: nothing more is staged or committed")]
    Sealed,
    /// An epoch came out of order.
    #[error("epoch {got} cannot follow epoch {last}; the stream must be restarted")]
    OutOfOrder {
        /// The last one staged or committed.
        last: u64,
        /// The one that came.
        got: u64,
    },
    /// The open epoch outgrew every bound: tracking has ended, the blocks are marked instead.
    #[error(
        "more than {0} bytes of disk writes wait for the standby: tracking ended, the blocks are marked for resync"
    )]
    TrackingLost(u64),
    /// An earlier flush or metadata write failed: nothing is promised any more.
    #[error(
        "the disk failed earlier ({0}); nothing is promised to be durable, replace the disk or reopen it"
    )]
    Failed(String),
    /// Bytes from the peer that are not a valid message.
    #[error("damaged data from the peer: {0}")]
    BadWire(&'static str),
}

impl DiskError {
    /// Wraps an IO error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> DiskError {
        let what = what.into();
        move |source| DiskError::Io { what, source }
    }

    /// The error number that a guest's request is answered with (Linux's numbers, as NBD has them).
    pub fn errno(&self) -> u32 {
        let n = match self {
            DiskError::ReadOnly | DiskError::WrongMode { .. } | DiskError::Sealed => libc::EPERM,
            DiskError::OutOfRange { .. } => libc::EINVAL,
            DiskError::Io { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => libc::ENOSPC,
                Some(libc::ENOMEM) => libc::ENOMEM,
                _ => libc::EIO,
            },
            _ => libc::EIO,
        };
        n as u32
    }
}

impl MetaError {
    /// The journal is missing, damaged or foreign: committed epochs may be gone with it.
    pub(crate) fn journal(meta: &std::path::Path, what: &str) -> DiskError {
        let what = format!("its journal: {what}");
        MetaError::Corrupt {
            path: meta.to_owned(),
            what,
        }
        .into()
    }
}

/// The result of a disk operation.
pub type Result<T, E = DiskError> = std::result::Result<T, E>;
