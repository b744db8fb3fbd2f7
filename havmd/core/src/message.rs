//! What the two daemons of a pair say to each other about a guest.
//!
//! Any of these may be lost, repeated, late or out of order: the engine repeats what it still
//! needs, and drops what was not meant for its present life (rule 1).

use crate::ids::{EpochNo, GenId, GuestName, LifeId, NodeId, Term};
use crate::record::{Arbiter, Intent, Role};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A message about one guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Envelope {
    /// The guest.
    pub guest: GuestName,
    /// The sender's highest term.
    pub term: Term,
    /// Who says it.
    pub from: NodeId,
    /// The life of the sender's copy; none where it has none (no guest, no image).
    pub from_life: Option<LifeId>,
    /// The life that it is meant for. Hello and Yield name none.
    pub to_life: Option<LifeId>,
    /// What is said.
    pub body: Body,
}

/// Which side of a basis gave up its claim (rule 8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// It was the primary of the basis.
    Primary,
    /// It was, or could have been, its standby.
    Standby,
}

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Body {
    /// "This is what I am." Sent at start, on reconnect, and repeated by a primary that has no
    /// standby. From a primary of a newer term it makes the other rejoin (rule 10).
    Hello {
        /// The sender's basis.
        basis: Term,
        /// Its role in it.
        role: Role,
        /// It really runs the guest (or would, were the guest meant to run).
        active: bool,
        /// Whether the guest is meant to run.
        intent: Intent,
        /// Its data's generation.
        generation: GenId,
        /// Its parent.
        parent: GenId,
    },
    /// "I am your standby in this term; stream to these addresses." (rule 10)
    Join {
        /// Where the standby's replicator listens, one address a link.
        ports: Vec<SocketAddr>,
    },
    /// "We are protected from now on; this is the arbiter of our term." From the primary, when it
    /// has made `protected` durable; the standby needs it to make `eligible` durable (rule 3).
    Protect {
        /// Who may grant the next term.
        arbiter: Arbiter,
    },
    /// "My vCPUs stand, epoch `n` is my last: go on in the next term, protected by me." (rule 9)
    Hand {
        /// The last epoch, acked.
        n: EpochNo,
        /// Where the sender's replicator will receive.
        ports: Vec<SocketAddr>,
    },
    /// "I run, protected, in the term that you handed over." (rule 9)
    Conf,
    /// A primary asks its standby to give up its claim on everything after `basis` (rule 8).
    YieldAsk {
        /// The basis of the primary.
        basis: Term,
    },
    /// "I activated nothing after `basis` and never will at or below the envelope's term." (rule 8)
    Yield {
        /// The sender's basis.
        basis: Term,
        /// What the sender was in it.
        side: Side,
    },
}
