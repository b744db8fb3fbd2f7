//! What an outgoing stream is given, and what it says.

use crate::beat::Timers;
use crate::identity::{Fingerprint, Identity};
use crate::tls::TlsSetupError;
use havm_wire::back::Back;
use havm_wire::hello::StreamHello;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// What to connect to, and how.
#[derive(Debug, Clone)]
pub struct OutgoingSpec {
    /// Who we are.
    pub identity: Identity,
    /// Who the peer is.
    pub peer: Fingerprint,
    /// One entry a link: our address on it (where it must be that one), the peer's port.
    pub links: Vec<(Option<IpAddr>, SocketAddr)>,
    /// Which stream.
    pub hello: StreamHello,
    /// Bytes that may be on their way, not yet taken by the standby's consumer. The standby's own
    /// bound counts where it is smaller.
    pub window_bytes: usize,
    /// Timers.
    pub timers: Timers,
}

/// What happens on the way.
#[derive(Debug)]
pub enum OutEvent {
    /// A link carries the stream.
    LinkUp(usize),
    /// A link failed, or could not be connected (told once per reason).
    LinkDown(usize, String),
    /// A message of the standby, in its order.
    Back(Back),
    /// Nothing was heard from the peer over any link for `silent_after`.
    Silent,
    /// Something was heard (again).
    Alive,
    /// The stream is over; it needs a new one.
    Broken(String),
}

/// Why a frame was not queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The stream is broken.
    #[error("the stream to the standby is broken: {0}")]
    Broken(String),
    /// It was closed, or the sender asked to be let go.
    #[error("the stream to the standby was closed on this side")]
    Closed,
    /// The window stayed full.
    #[error("the standby took nothing for {0:?}: its window is full")]
    TimedOut(Duration),
}

/// Why no stream could be set up.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsSetupError),
    /// Threads.
    #[error("cannot start the threads of the stream: {0}")]
    Thread(#[from] io::Error),
    /// No link.
    #[error("the standby named no address to stream to")]
    NoLinks,
}
