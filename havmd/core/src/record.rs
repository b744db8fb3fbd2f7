//! The durable record: what a node has promised about a guest, and must never forget.
//!
//! One per guest and node. The daemon writes it twice (two files, each written aside, synced,
//! renamed, and the folder synced) *before* the message, gate order or write that it justifies.

use crate::ids::{GenId, GuestName, Incarnation, Lives, NodeId, Term};
use serde::{Deserialize, Serialize};

/// What this node was, in the term it joined last. Solo and protected are both primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Primary with an open gate and no standby that counts.
    Solo,
    /// Primary whose output waits for the named standby's acks.
    Protected,
    /// Standby that may be promoted.
    Eligible,
    /// Standby that may not (yet, or no more).
    Ineligible,
}

/// Where a role stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoleStatus {
    /// In force.
    Active,
    /// A primary that gave its role to the standby and waits for the word that it runs (rule 9).
    Handing,
    /// Promised to activate nothing up to `term` (rule 8). Final in this basis.
    Yielded,
}

/// Who may grant the next term (rule 6). Chosen when protection starts, fixed for the basis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arbiter {
    /// A witness of this incarnation.
    Witness(Incarnation),
    /// A confirmed power-off of the peer.
    Fence,
    /// Nobody: only the peer's yield.
    None,
}

/// Which data this is, and what it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Generation {
    /// This generation.
    pub current: GenId,
    /// The one it was made from.
    pub parent: GenId,
}

/// Whether the guest is meant to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Intent {
    /// It should run.
    Run,
    /// It was shut down on purpose: from inside, by `virsh`, or by `havm stop`.
    Stopped,
}

/// The durable record of one guest on one node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The guest.
    pub guest: GuestName,
    /// The node that wrote this record; another's is not obeyed.
    pub owner: NodeId,
    /// The highest term promised: never newly acts in a term at or below it.
    pub term: Term,
    /// The term joined last; `role` is meant in it. `basis <= term`.
    pub basis: Term,
    /// The role in `basis`.
    pub role: Role,
    /// Where the role stands.
    pub status: RoleStatus,
    /// Who may grant the term after `basis`.
    pub arbiter: Arbiter,
    /// The only two lives that may act in `basis` while it is protected.
    pub lives: Option<Lives>,
    /// Which data this node holds.
    pub generation: Generation,
    /// This disk alone holds every acked write durably, and is enough to start from.
    pub cold: bool,
    /// Image and disk are one consistent state; false from the first resync write on.
    pub valid: bool,
    /// Whether the guest is meant to run.
    pub intent: Intent,
}
