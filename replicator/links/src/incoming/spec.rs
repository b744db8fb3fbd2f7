//! What a listener for streams is given, and what it says.

use crate::beat::Timers;
use crate::identity::{Fingerprint, Identity};
use crate::listen::ListenError;
use crate::tls::TlsSetupError;
use havm_core::ids::{GuestName, LifeId, Term};
use havm_wire::hello::StreamHello;
use havm_wire::raw::RawFrame;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// Which stream may come. A field that is given must be equal, else the peer is refused for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expect {
    /// The guest.
    pub guest: GuestName,
    /// The term.
    pub term: Option<Term>,
    /// The life of this copy.
    pub my_life: Option<LifeId>,
    /// The primary's life.
    pub peer_life: Option<LifeId>,
}

/// Where to listen, and for whom.
#[derive(Debug, Clone)]
pub struct IncomingSpec {
    /// Who we are.
    pub identity: Identity,
    /// Who the peer is.
    pub peer: Fingerprint,
    /// One address a link.
    pub bind: Vec<IpAddr>,
    /// Ports to choose from; `0..=0` lets the system choose.
    pub ports: RangeInclusive<u16>,
    /// What may come.
    pub expect: Expect,
    /// Bytes received that wait for [`Incoming::recv`].
    pub window_bytes: usize,
    /// Timers.
    pub timers: Timers,
}

/// What comes in.
#[derive(Debug)]
pub enum In {
    /// The next frame of the stream, in order.
    Frame(RawFrame),
    /// The peer wants to send this stream: [`Incoming::accept`] or [`Incoming::refuse`] it.
    NewStream(StreamHello),
    /// A link carries the stream.
    LinkUp(usize),
    /// It does no more.
    LinkDown(usize, String),
    /// Nothing was heard from the peer over any link for `silent_after`.
    Silent,
    /// Something was heard (again).
    Alive,
    /// The stream broke the rules and is over.
    Broken(String),
}

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsSetupError),
    /// Ports.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Threads.
    #[error("cannot start the threads of the listener: {0}")]
    Thread(#[from] io::Error),
}

/// Why a message was not queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// No stream.
    #[error("no stream is being received")]
    NoStream,
    /// The primary takes nothing.
    #[error("the primary takes no more messages: {0}")]
    Full(String),
    /// Over the bounds.
    #[error(transparent)]
    TooLarge(#[from] havm_wire::raw::TooLarge),
}
