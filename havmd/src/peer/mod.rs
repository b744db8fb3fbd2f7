//! The connection between the two daemons: TLS over TCP on every link, pinned both ways.
//!
//! ```text
//!   send(envelope)      one way; over every live link, heard once; may be lost
//!   request(json)       one answer, or an error at the deadline; survives a link's death
//! ```
//! The same message over all links costs little and means that a link that died a moment ago
//! delays nothing. [`start`] returns what the daemon listens to; the links run until the last
//! [`PeerClient`] is dropped.

mod link;
mod packet;
mod queue;
mod shared;

pub use packet::MAX_FRAME_BYTES;
pub use shared::PeerQuestion;

use crate::frame;
use crate::identity_store::{Myself, PairFile};
use crate::random;
use havm_config::Config;
use havm_core::ids::NodeId;
use havm_core::message::Envelope;
use havm_core::spec::LinkSpec;
use havm_links::identity::{Fingerprint, Identity};
use havm_links::tls::{self, Trust};
use packet::Packet;
use serde_json::Value;
use shared::{Shared, State};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

/// Protocol name (ALPN) of the daemons' connection.
const ALPN_PEER: &[u8] = b"havm-peer/1";
/// Messages that wait for the daemon at most; more are dropped.
const MAX_NOTES: usize = 1024;
/// Questions that wait for the daemon at most.
const MAX_QUESTIONS: usize = 64;

/// Who connects with whom, and where.
#[derive(Debug, Clone)]
pub struct PeerSettings {
    /// This node.
    pub node: NodeId,
    /// Its key and certificate.
    pub identity: Identity,
    /// The peer.
    pub peer: NodeId,
    /// Its certificate.
    pub peer_fingerprint: Fingerprint,
    /// The links.
    pub links: Vec<LinkSpec>,
    /// The TCP port, on both nodes.
    pub port: u16,
}

impl PeerSettings {
    /// As the config and the pairing say.
    pub fn from_config(config: &Config, me: &Myself, pair: &PairFile) -> Self {
        PeerSettings {
            node: me.node,
            identity: me.identity.clone(),
            peer: pair.peer,
            peer_fingerprint: pair.peer_fingerprint,
            links: config.peer.links.clone(),
            port: config.peer.peer_port,
        }
    }
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No link was live until the deadline.
    #[error(
        "the peer's daemon cannot be reached over any link: is it running, and are the links up (`havm status`)?"
    )]
    NoLink,
    /// It was asked, and gave no answer.
    #[error(
        "the peer's daemon did not answer in time; it may still do what it was asked: look at `havm status` there"
    )]
    NoAnswer,
    /// The question is too long.
    #[error("the question to the peer is too long: {0}")]
    TooLong(String),
}

/// What the daemon listens to.
#[derive(Debug)]
pub struct Served {
    /// Messages about guests.
    pub messages: mpsc::Receiver<Envelope>,
    /// Questions; answer each in a task of its own.
    pub requests: mpsc::Receiver<PeerQuestion>,
    /// Which links are connected, in the order of the config.
    pub links: watch::Receiver<Vec<bool>>,
}

/// The way to the peer's daemon; clones share it. The links end with the last one.
#[derive(Debug, Clone)]
pub struct PeerClient {
    shared: Arc<Shared>,
    _links: Arc<JoinSet<()>>,
}

/// Starts to connect, as the config and the pairing say.
pub async fn start(
    config: &Config,
    me: &Myself,
    pair: &PairFile,
) -> io::Result<(PeerClient, Served)> {
    start_with(PeerSettings::from_config(config, me, pair)).await
}

/// Starts to connect. The addresses need not be there yet.
pub async fn start_with(settings: PeerSettings) -> io::Result<(PeerClient, Served)> {
    let trust = Trust::Pinned(vec![settings.peer_fingerprint]);
    let setup = |e: tls::TlsSetupError| io::Error::other(e);
    let count = settings.links.len();
    let (notes, messages) = mpsc::channel(MAX_NOTES);
    let (questions, requests) = mpsc::channel(MAX_QUESTIONS);
    let (up, links) = watch::channel(vec![false; count]);
    let shared = Arc::new(Shared {
        node: settings.node,
        peer: settings.peer,
        session: u64::from_le_bytes(random::bytes()?),
        port: settings.port,
        links: settings.links,
        client_tls: tls::client_config(&settings.identity, &trust, ALPN_PEER).map_err(setup)?,
        server_tls: tls::server_config(&settings.identity, &trust, ALPN_PEER).map_err(setup)?,
        notes,
        questions,
        up,
        next: AtomicU64::new(1),
        state: Mutex::new(State::new(count)),
    });
    let mut tasks = JoinSet::new();
    for link in 0..count {
        // One side connects, so that both never do at once.
        tasks.spawn(link::keep(shared.clone(), link, shared.node < shared.peer));
    }
    let client = PeerClient {
        shared,
        _links: Arc::new(tasks),
    };
    let served = Served {
        messages,
        requests,
        links,
    };
    Ok((client, served))
}

impl PeerClient {
    /// Sends a message over every live link; it may be lost. `false`: there is no live link.
    pub fn send(&self, envelope: Envelope) -> bool {
        self.shared.send_note(envelope)
    }

    /// Asks the peer's daemon, waiting for a link where there is none, until the deadline. A
    /// question reaches the daemon there at most once, over however many links it was tried.
    pub async fn request(&self, body: Value, deadline: Duration) -> Result<Value, PeerError> {
        let until = Instant::now() + deadline;
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let bytes = frame::encode(&Packet::Ask { id, body }, MAX_FRAME_BYTES)
            .map_err(|e| PeerError::TooLong(e.to_string()))?;
        let bytes = Arc::new(bytes);
        let mut answer = self.shared.wait_for(id);
        let mut changes = self.shared.up.subscribe();
        let mut asked = false;
        let result = timeout_at(until, async {
            loop {
                changes.mark_unchanged();
                let over = self.shared.send_body(&bytes);
                asked |= over.is_some();
                loop {
                    tokio::select! {
                        a = &mut answer => return a.map_err(|_| PeerError::NoAnswer),
                        // The sender lives in `shared`, so this ends only by a change.
                        _ = changes.changed() => {}
                    }
                    // Ask again only when the link that it went over is gone.
                    if !over.as_ref().is_some_and(|l| self.shared.is_live(l)) {
                        break;
                    }
                }
            }
        })
        .await;
        self.shared.wait_no_more(id);
        match result {
            Ok(r) => r,
            Err(_) if asked => Err(PeerError::NoAnswer),
            Err(_) => Err(PeerError::NoLink),
        }
    }

    /// Which links are connected, in the order of the config.
    pub fn links_up(&self) -> Vec<bool> {
        self.shared.up.borrow().clone()
    }
}
