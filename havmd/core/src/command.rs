//! Everything the engine may ask of the daemon.
//!
//! Semantics, on which safety rests:
//! - commands of one event are carried out strictly in their order, before the next event;
//! - `Persist` is synchronous and durable (both copies) when the next command starts. If it fails,
//!   the rest of the list is dropped and [`crate::event::Event::PersistFailed`] delivered;
//! - an [`Order`] counts as carried out when it is written to the control socket. Without a
//!   replicator it is dropped (the engine hears of the loss by `ReplicatorLost`);
//! - `Send` may lose the message. `Witness`, `StartGuest`… start the work and return; the answer
//!   is an event;
//! - a crash between any two commands is safe.

use crate::ids::{Incarnation, LifeId, Term};
use crate::message::Envelope;
use crate::order::Order;
use crate::record::Record;
use serde::{Deserialize, Serialize};

/// A compare-and-swap on the guest's register at the witness (rule 6): granted iff the register
/// exists and (`reg.term <= basis`, or `reg.holder` is the asker and `reg.term < term`, or the
/// register is exactly (`term`, the asker) already).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WitnessRequest {
    /// The asker's basis.
    pub basis: Term,
    /// The term asked for.
    pub term: Term,
    /// The incarnation that the record names; another must not be asked.
    pub incarnation: Incarnation,
}

/// A request for a confirmed power-off of the peer (rule 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FenceRequest {
    /// The asker's basis.
    pub basis: Term,
    /// The peer's life in that basis; the proof names both.
    pub peer_life: LifeId,
}

/// How much a notice matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As expected.
    Info,
    /// Somebody should look when they can: protection is reduced.
    Warning,
    /// Somebody must act.
    Alarm,
}

/// What happened, for logs, hooks and `havm events`. The kebab-case name is stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoticeKind {
    /// The guest runs here without a standby.
    Solo,
    /// The first eligible epoch was acked.
    Protected,
    /// A standby joined; sync begins.
    SyncStarted,
    /// This node is a complete standby.
    StandbyReady,
    /// The peer and its stream are silent.
    PeerLost,
    /// The peer is heard again.
    PeerBack,
    /// This node took the next term after the peer was lost, or by its yield.
    Failover,
    /// A move was begun on purpose.
    SwitchoverStarted,
    /// The guest came here by a planned move.
    SwitchoverDone,
    /// A planned move did not happen; the guest is where it was.
    SwitchoverFailed,
    /// This copy was given up; the node joins the peer's primary.
    Rejoin,
    /// This side gave its claim up.
    Yielded,
    /// The witness refused: the guest stands still until the peer is heard.
    Frozen,
    /// No arbiter can be reached: output is held.
    Gated,
    /// The gate's queue is full; vCPUs stand.
    OutputFull,
    /// The guest was stopped on purpose.
    Stopped,
    /// The guest process ended unexpectedly.
    GuestCrashed,
    /// The guest process could not be started.
    StartFailed,
    /// The replicator's process ended unexpectedly.
    ReplicatorCrashed,
    /// The stream to the peer broke.
    StreamBroken,
    /// The record could not be written or read.
    RecordFault,
    /// Both sides say that they are primary, or the data does not descend from one another.
    Conflict,
    /// The witness refuses or is not the one that was enrolled.
    WitnessFault,
    /// An operator forced the promotion.
    Forced,
    /// Too many moves in a short time: automatic failback waits.
    Probation,
    /// An operator's request was not possible.
    RequestRefused,
    /// The result of a comparison.
    Verified,
    /// Protection has ended as asked.
    Unprotected,
    /// The replicator warns.
    Warning,
}

/// A typed happening.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Notice {
    /// What.
    pub kind: NoticeKind,
    /// How much it matters.
    pub severity: Severity,
    /// The record's term when it happened.
    pub term: Term,
    /// Plain words: what happened, and what to do where something is to be done.
    pub text: String,
}

/// A command to the daemon.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Make this record durable.
    Persist(Box<Record>),
    /// Remove the record: the guest is no longer protected.
    Forget,
    /// Send to the peer's daemon, over every link.
    Send(Envelope),
    /// Order the replicator.
    Order(Order),
    /// Start a replicator, or connect to the one that runs; then `ReplicatorUp`.
    StartReplicator,
    /// End the replicator: `Quit`, and kill it when it is still there after a second; then
    /// `ReplicatorLost`, also where there was none.
    StopReplicator,
    /// Start the guest's QEMU paused, from its disk; then `GuestStarted` or `GuestStartFailed`.
    /// The daemon keeps the life beside the process, so that a later daemon finds it.
    StartGuest {
        /// The new life.
        life: LifeId,
    },
    /// Start a waiting QEMU (`-incoming defer`); answers as for `StartGuest`.
    StartStandbyGuest {
        /// The life of the copy.
        life: LifeId,
    },
    /// Kill the guest's QEMU, primary or waiting, and see it dead; then `GuestKilled`, also where
    /// there was none. A start that is under way is waited for and killed too.
    KillGuest,
    /// Ask the guest to shut down, and end it when it has not after the configured time; then
    /// `GuestLost { intended: true }`.
    ShutdownGuest,
    /// Ask the witness.
    Witness(WitnessRequest),
    /// Have the peer's power cut.
    Fence(FenceRequest),
    /// Tell the world.
    Notice(Notice),
}
