//! A modelled replicator: the contract of `havm_core::order`, with epochs as points of the guest's
//! history. Frames, pages and blocks are not modelled: what an epoch holds is its point.

use crate::check::Point;
use havm_core::ids::{EpochNo, LifeId, StreamId, Term};
use havm_core::order::{Counters, Mode, ReplicaState};

/// What the gate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Holds.
    Closed,
    /// Lets out at once.
    Open,
    /// Lets out what was acked.
    Acks,
}

/// The sending end of a stream.
#[derive(Debug, Clone)]
pub struct Sender {
    /// Names the capture session.
    pub stream: StreamId,
    /// Its place among all sessions ever: an old connection's data does not come after a new one's.
    pub order: u64,
    /// The term.
    pub term: Term,
    /// The receiver's life.
    pub peer_life: LifeId,
    /// Points of the epochs 1.. in order.
    pub points: Vec<Point>,
    /// The first epoch marked eligible.
    pub eligible_from: Option<u64>,
    /// The last acked.
    pub acked: u64,
    /// Exchanges until it counts as synced.
    pub sync_left: u32,
    /// It was reported.
    pub synced: bool,
    /// The first eligible ack was reported.
    pub protected: bool,
    /// The other end rejected it.
    pub broken: bool,
}

/// The receiving end.
#[derive(Debug, Clone)]
pub struct Receiver {
    /// The term.
    pub term: Term,
    /// This copy's life.
    pub my_life: LifeId,
    /// The session that it hears, if any yet.
    pub from: Option<(StreamId, u64)>,
    /// The last committed epoch.
    pub n: u64,
    /// Its state.
    pub point: Option<Point>,
    /// An epoch marked eligible was committed.
    pub complete: bool,
    /// Acks may be sent.
    pub confirmed: bool,
    /// Nothing is committed or acked any more.
    pub sealed: bool,
    /// The guest's own shutdown was reported.
    pub shutdown_said: bool,
}

/// What one replicator sends to the other.
#[derive(Debug, Clone)]
pub enum Packet {
    /// Everything up to epoch n.
    Data {
        /// Session.
        stream: StreamId,
        /// See [`Sender::order`].
        order: u64,
        /// Term.
        term: Term,
        /// For whom.
        to_life: LifeId,
        /// Epoch.
        n: u64,
        /// State.
        point: Point,
        /// Marked eligible.
        mark: bool,
        /// The guest shut itself down in it.
        shutdown: bool,
    },
    /// A sign of life, and the last acked epoch where acks are confirmed.
    Ack {
        /// Session.
        stream: StreamId,
        /// Acked.
        n: Option<u64>,
    },
    /// No such receiver.
    Reject {
        /// Session.
        stream: StreamId,
    },
}

/// The process.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Names the process.
    pub rid: u64,
    /// Highest term ordered.
    pub term: Term,
    /// Its mode.
    pub mode: Mode,
    /// The attached copy's life.
    pub life: Option<LifeId>,
    /// The guest's process is held.
    pub attached: bool,
    /// The gate.
    pub gate: Gate,
    /// Sending end.
    pub send: Option<Sender>,
    /// Receiving end.
    pub recv: Option<Receiver>,
    /// The last sign of the other end, microseconds.
    pub heard_us: u64,
    /// What was last reported about it.
    pub silent: bool,
    /// A handover waits for the ack of this epoch, until this time.
    pub handing: Option<(u64, u64)>,
}

impl Replica {
    /// A fresh one.
    pub fn new(rid: u64, now_us: u64) -> Replica {
        Replica {
            rid,
            term: Term(0),
            mode: Mode::Idle,
            life: None,
            attached: false,
            gate: Gate::Closed,
            send: None,
            recv: None,
            heard_us: now_us,
            silent: false,
            handing: None,
        }
    }

    /// Where it can be reached; the address itself means nothing here.
    pub fn ports(&self) -> Vec<std::net::SocketAddr> {
        vec![std::net::SocketAddr::from(([127, 0, 0, 1], 7000))]
    }

    /// Its own words.
    pub fn state(&self, running: bool) -> ReplicaState {
        let acked = match (&self.send, &self.recv) {
            (Some(s), _) if s.protected || self.mode == Mode::Handed => s.acked,
            (None, Some(r)) => r.n,
            _ => 0,
        };
        ReplicaState {
            version: havm_core::order::CONTROL_VERSION,
            mode: self.mode,
            term: self.term,
            life: self.life,
            stream: self.send.as_ref().map(|s| s.stream),
            acked: EpochNo(acked),
            closed: EpochNo(acked),
            running,
            stream_alive: (self.send.is_some() || self.recv.is_some()) && !self.silent,
            ports: if self.recv.is_some() || self.mode == Mode::Handed {
                self.ports()
            } else {
                vec![]
            },
            ram_bytes: 1 << 28,
            vcpus: 1,
            disk_bytes: 1 << 30,
            sync: None,
            counters: Counters::default(),
        }
    }
}
