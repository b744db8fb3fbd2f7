//! Everything that `havm status` shows, as one value: the text and the JSON are both made from it.

use crate::ids::{GuestName, Incarnation, LifeId, Term};
use crate::order::ReplicaState;
use crate::record::{Arbiter, Generation, Intent, Role, RoleStatus};
use serde::{Deserialize, Serialize};

/// How safe a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Safety {
    /// Protected: either host may die.
    Safe,
    /// A standby is being brought up to date.
    Syncing,
    /// It runs here alone.
    Exposed,
    /// It stands between two states and goes on by itself (start, handover, yield).
    Changing,
    /// Its output is held: the peer is silent and no arbiter answers.
    Gated,
    /// It stands still: the arbiter refused, or it could not be started.
    Down,
    /// It was stopped on purpose.
    Stopped,
    /// An operator must decide.
    Conflict,
    /// This node holds no part in it.
    Absent,
}

/// What the peer's host looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerView {
    /// Beats come.
    Alive,
    /// They are late.
    Suspect,
    /// Every link is silent.
    Lost,
}

/// One guest on one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// The guest.
    pub guest: GuestName,
    /// This node is its home.
    pub at_home: bool,
    /// How safe it is.
    pub safety: Safety,
    /// Since when, milliseconds since the daemon's start (the daemon turns it into a time of day).
    pub safety_since_ms: u64,
    /// Why, in plain words.
    pub why: String,
    /// What a person should do; none where nothing is to be done.
    pub what_to_do: Option<String>,
    /// The guest's vCPUs run on this node.
    pub runs_here: bool,
    /// The highest promised term.
    pub term: Term,
    /// The term that the role is meant in.
    pub basis: Term,
    /// The role; none without a record.
    pub role: Option<Role>,
    /// Where the role stands.
    pub role_status: Option<RoleStatus>,
    /// Who arbitrates the next term.
    pub arbiter: Option<Arbiter>,
    /// Which data this is.
    pub generation: Option<Generation>,
    /// Whether the guest is meant to run.
    pub intent: Option<Intent>,
    /// The life of the copy here.
    pub life: Option<LifeId>,
    /// The peer's host.
    pub peer: PeerView,
    /// The epoch stream carries something.
    pub stream_alive: bool,
    /// The witness, where it was seen lately.
    pub witness: Option<Incarnation>,
    /// A planned move is under way.
    pub moving: bool,
    /// When the guest moves home by itself, milliseconds since the daemon's start.
    pub failback_at_ms: Option<u64>,
    /// Automatic moves rest because there were too many.
    pub probation: bool,
    /// The replicator's own words.
    pub replica: Option<ReplicaState>,
}

/// One replication link, as the beats see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Its name in the config.
    pub name: String,
    /// Beats come.
    pub up: bool,
    /// Smoothed round trip time, microseconds.
    pub rtt_us: Option<u64>,
    /// Beats that did not come.
    pub missed: u64,
}

/// The witness, as this node sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WitnessStatus {
    /// Where it is.
    pub address: String,
    /// It answers.
    pub reachable: bool,
    /// Which initialisation answers.
    pub incarnation: Option<Incarnation>,
}

/// One node with all its guests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// This node's name in the config.
    pub node: String,
    /// The peer's.
    pub peer_node: String,
    /// The peer's host.
    pub peer: PeerView,
    /// The links between them.
    pub links: Vec<LinkStatus>,
    /// The witness, where one is configured.
    pub witness: Option<WitnessStatus>,
    /// Every guest.
    pub guests: Vec<GuestStatus>,
}
