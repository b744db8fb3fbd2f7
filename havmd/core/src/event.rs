//! Everything that can happen to one guest on one node, as the daemon tells it to the engine.
//!
//! The daemon keeps one engine a guest. It delivers events one at a time and carries out the
//! commands of one event, in order, before it delivers the next. `now` and fresh random ids come
//! in beside the event, never from here.

use crate::ids::{GenId, Incarnation, LifeId, NodeId, Term};
use crate::message::Envelope;
use crate::order::{ReplicaState, Report};
use crate::record::Record;

/// Random ids for one call of [`crate::engine::Engine::handle`]: fresh in every call, and thrown
/// away unused mostly. A call uses each at most once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// A life, should a guest process be started.
    pub life: LifeId,
    /// A generation, should a term be taken.
    pub generation: GenId,
}

/// What was found of the durable record at start.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// The newer good copy.
    Loaded(Record),
    /// There is none: nothing was ever promised about this guest here.
    Absent,
    /// There is one, but it cannot be believed (unreadable, foreign, known to be older): the node
    /// makes no claim and may only rejoin.
    Unusable {
        /// The highest term that is known of in spite of it; 0 where none is.
        term: Term,
        /// For a person.
        why: String,
    },
}

/// What a node finds when its daemon starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Started {
    /// The durable record.
    pub record: Found,
    /// The replicator that outlived the last daemon, if one answers.
    pub replica: Option<ReplicaState>,
    /// The life of the guest process that outlived the last daemon (as primary or waiting), as
    /// it was given in `StartGuest` or `StartStandbyGuest`.
    pub life: Option<LifeId>,
    /// That process was started by `StartStandbyGuest` (and promoted since, perhaps).
    pub waiting: bool,
    /// The guest ended on purpose while no daemon looked (shut down from inside, `virsh destroy`).
    pub ended_on_purpose: bool,
}

/// The host-level verdict about the peer, from the beats of all links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A link carries beats.
    Alive,
    /// Every link is late, none long enough to count as lost.
    Suspect,
    /// Every beat link is silent.
    Lost,
}

/// The witness's answer to a [`crate::command::WitnessRequest`], or the lack of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WitnessReply {
    /// The register now says (term, holder). A grant counts only where the holder is this node.
    Granted {
        /// The granted term, as asked.
        term: Term,
        /// Who holds it.
        holder: NodeId,
        /// The witness's incarnation.
        incarnation: Incarnation,
    },
    /// Another holds it, or the register is above the basis.
    Refused {
        /// The term that was asked for.
        asked: Term,
        /// The register's term.
        term: Term,
        /// The register's holder.
        holder: Option<NodeId>,
    },
    /// No connection: the request was certainly not delivered.
    NotDelivered,
    /// It may have been delivered, but no answer came in time.
    NoAnswer,
    /// The witness does not know this guest. It never makes a key by itself (rule 13).
    KeyAbsent,
    /// Another incarnation than the one that the record names, or a witness that is behind.
    WrongIncarnation {
        /// The one that answered.
        incarnation: Incarnation,
    },
}

/// The outcome of a fence request (arbiter `fence`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FenceOutcome {
    /// `off` was confirmed by status after the request; the proof names what it was asked for.
    Proof {
        /// The basis of the asker, when it asked.
        basis: Term,
        /// The peer's life in that basis.
        peer_life: LifeId,
    },
    /// It failed, or could not be confirmed.
    Failed,
}

/// What an operator (or the command line, or policy outside the engine) asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operator {
    /// First protection, at the guest's home: makes the record. Only where none exists.
    InitPrimary,
    /// First protection, at the peer: makes the record. Only where none exists.
    InitStandby,
    /// Move the guest to the peer. At the primary.
    Switchover,
    /// Move the guest to its home. At the primary.
    Failback,
    /// Run the guest (again).
    Start,
    /// Shut the guest down on purpose.
    Stop,
    /// End protection: the primary goes solo and seeks no standby any more.
    Unprotect,
    /// "The peer is off, I vouch for it": take the highest known term + 1 (rule 16).
    ForcePromote,
    /// Give up this node's copy after a conflict; it rejoins the peer's.
    DiscardMine,
    /// Compare RAM and disk of both sides at one epoch.
    Verify {
        /// Names the answer.
        id: u64,
    },
}

/// An event for one guest's engine.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The first event, once.
    Started(Box<Started>),
    /// A message of the peer.
    Message(Envelope),
    /// The verdict about the peer's host changed (or is repeated).
    Peer(Peer),
    /// The replicator says.
    Report(Report),
    /// A replicator (just started, or reconnected) answered `Status`.
    ReplicatorUp(Box<ReplicaState>),
    /// The replicator's process is gone (seen by pidfd), also after `StopReplicator`.
    ReplicatorLost,
    /// The guest process that `StartGuest` or `StartStandbyGuest` asked for exists, paused or waiting.
    GuestStarted {
        /// As ordered.
        life: LifeId,
    },
    /// It does not; nothing of it is left.
    GuestStartFailed {
        /// For a person.
        why: String,
    },
    /// The guest process is gone (seen by pidfd) without `KillGuest`.
    GuestLost {
        /// Somebody meant it: shut down from inside, `virsh destroy`, `virsh shutdown`.
        intended: bool,
    },
    /// After `KillGuest`: the process is seen dead (pidfd), or there was none.
    GuestKilled,
    /// The answer to a `Witness` command. One answer each.
    Witness(WitnessReply),
    /// The witness was polled in passing: its incarnation where it answered. At start, every few
    /// seconds, and when it changes.
    WitnessSeen(Option<Incarnation>),
    /// The answer to a `Fence` command.
    Fence(FenceOutcome),
    /// `Persist` failed: the rest of that event's commands was dropped. This is delivered before
    /// any other event.
    PersistFailed {
        /// For a person.
        why: String,
    },
    /// Somebody asks.
    Operator(Operator),
    /// The deadline that [`crate::engine::Engine::next_deadline`] named has come.
    Tick,
}
