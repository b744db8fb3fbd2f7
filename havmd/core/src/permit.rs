//! Permits: the only makers of the right to act in a higher term (rules 6, 8, 16).
//!
//! A [`Permit`] cannot be built or copied elsewhere, and is used up by the take.

use crate::claim::{Claim, claim};
use crate::command::WitnessRequest;
use crate::event::{FenceOutcome, WitnessReply};
use crate::ids::{LifeId, NodeId, Term};
use crate::message::Side;
use crate::record::{Arbiter, Record, Role, RoleStatus};

/// Where a permit came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The witness's grant.
    Witness,
    /// A confirmed power-off.
    Fence,
    /// The peer's yield.
    Yield,
    /// The operator's word.
    Operator,
}

/// The right to become primary in a term, or to open the gate alone in it.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Permit {
    term: Term,
    source: Source,
}

impl Permit {
    /// The term.
    pub fn term(&self) -> Term {
        self.term
    }
    /// Where it came from.
    pub fn source(&self) -> Source {
        self.source
    }

    /// From the witness's answer to `asked`. The claim must still hold, nothing higher may have
    /// been promised since, and no other kind of arbiter may be named (rules 5, 6, 7).
    pub fn from_witness(
        record: &Record,
        life: Option<LifeId>,
        me: NodeId,
        asked: &WitnessRequest,
        reply: &WitnessReply,
    ) -> Option<Permit> {
        let WitnessReply::Granted {
            term,
            holder,
            incarnation,
        } = *reply
        else {
            return None;
        };
        let fits = holder == me
            && term == asked.term
            && asked.basis == record.basis
            && term > record.term
            && record.arbiter == Arbiter::Witness(incarnation)
            && claim(record, life).is_some();
        fits.then_some(Permit {
            term,
            source: Source::Witness,
        })
    }

    /// From a fence proof: warm only, never where the arbiter is a witness, and only for the
    /// basis and the peer's life that it was asked for (rule 6).
    pub fn from_fence(
        record: &Record,
        life: Option<LifeId>,
        outcome: &FenceOutcome,
    ) -> Option<Permit> {
        let FenceOutcome::Proof { basis, peer_life } = *outcome else {
            return None;
        };
        let fits = record.arbiter == Arbiter::Fence
            && basis == record.basis
            && record.lives.map(|l| l.peer) == Some(peer_life)
            && claim(record, life) == Some(Claim::Warm);
        fits.then_some(Permit {
            term: record.term.next(),
            source: Source::Fence,
        })
    }

    /// From the peer's yield of everything after `basis`, up to `term` (rule 8).
    pub fn from_yield(record: &Record, term: Term, basis: Term, side: Side) -> Option<Permit> {
        let fits = match (record.role, side) {
            (Role::Protected | Role::Solo, Side::Standby) => basis <= record.basis,
            // The taker of an unconfirmed handover lost the guest: it released nothing in that
            // term, for no one has acked to it (found by the simulation; without an arbiter there
            // is no other way out).
            (Role::Protected, Side::Primary) => {
                record.status == RoleStatus::Handing && basis == record.term
            }
            (Role::Eligible, Side::Primary) => {
                record.status == RoleStatus::Active && basis == record.basis
            }
            _ => false,
        };
        (fits && term > record.term && record.valid).then_some(Permit {
            term,
            source: Source::Yield,
        })
    }

    /// The operator vouches that the peer is off: above everything known (rule 16).
    pub fn forced(record: &Record, highest_known: Term) -> Option<Permit> {
        record.valid.then(|| Permit {
            term: record.term.max(highest_known).next(),
            source: Source::Operator,
        })
    }
}
