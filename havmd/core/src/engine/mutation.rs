//! Deliberate faults, to show that the checkers of the simulation bite. No binary turns the
//! feature `mutations` on; without it every question is answered by a constant `false`.

use super::Engine;

/// One deliberate fault, named after the rule that it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mutation {
    /// Rule 3: the eligible epoch is armed without a durable `protected`.
    NoPersistBeforeProtect,
    /// Rule 7: the gate opens although the permit was not made durable.
    GateOpenedBeforePersist,
    /// Rule 8: a yield names the present term, not the next.
    YieldAtSameTerm,
    /// Rule 8: a node that yielded claims again.
    ReclaimAfterYield,
    /// Rule 9: the old primary counts as eligible as soon as it handed over.
    HandedOverEligibleAtOnce,
    /// Rule 9: the new primary of a handover opens its gate.
    HandoverToSolo,
    /// Rule 5: a standby whose acks are in memory only claims from its disk.
    ColdClaimWithAckMemory,
    /// Rule 5: eligibility survives a reboot.
    EligibilitySurvivesReboot,
    /// Rule 7: a grant is used although the claim is gone.
    GrantWithoutClaim,
    /// Rule 2: a primary that lost its standby opens its gate without any permit.
    OpenWithoutPermit,
    /// Rule 4: acks are confirmed although `eligible` was not made durable.
    NoPersistBeforeAck,
    /// Rule 3: a standby with a new life becomes eligible in the same term.
    EligibleAgainInTerm,
    /// Rule 10: the node joins before it saw its old guest dead.
    RejoinWithoutKill,
}

impl Engine {
    #[cfg(feature = "mutations")]
    pub(super) fn mutated(&self, m: Mutation) -> bool {
        self.mutation == Some(m)
    }

    #[cfg(not(feature = "mutations"))]
    pub(super) fn mutated(&self, _: Mutation) -> bool {
        let _ = self.mutation;
        false
    }

    /// Makes this engine wrong, in one way.
    #[cfg(feature = "mutations")]
    pub fn mutate(&mut self, m: Mutation) {
        self.mutation = Some(m);
    }
}
