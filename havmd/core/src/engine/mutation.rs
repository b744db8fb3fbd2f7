//! Deliberate faults, to show that the checkers of the simulation bite. No binary turns the
//! feature `mutations` on; without it every question is answered by a constant `false`.

use super::Engine;

/// One deliberate fault, named after the rule that it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mutation {
    /// Rule 3: the eligible epoch is armed although `protected` is not durable.
    NoPersistBeforeProtect,
    /// Rule 3: acks are confirmed although `eligible` is not durable.
    NoPersistBeforeAck,
    /// Rule 7: the gate opens although `solo` is not durable.
    GateOpenedBeforePersist,
    /// Rule 8: a yield names the present term and promises nothing.
    YieldAtSameTerm,
    /// Rule 8: a yield is not durable: after a restart the node claims again.
    ReclaimAfterYield,
    /// Rule 9: the old primary counts as eligible as soon as it handed over.
    HandedOverEligibleAtOnce,
    /// Rule 9: the new primary of a handover opens its gate.
    HandoverToSolo,
    /// Rules 4, 5: a standby whose acks are in memory only claims from its disk.
    ColdClaimWithAckMemory,
    /// Rule 7: a grant is used although the claim is gone.
    GrantWithoutClaim,
    /// Rule 2: a primary that lost its standby opens its gate without any permit.
    OpenWithoutPermit,
    /// Rule 10: the node joins before it saw its old guest dead.
    RejoinWithoutKill,
    /// Rule 11: a protected primary without its guest starts it again in its own term.
    RestartProtected,
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

    /// Only in memory: what a missing `Persist` leaves.
    pub(super) fn pretend(&mut self, f: impl FnOnce(&mut crate::record::Record)) {
        if let Some(r) = self.rec.as_mut() {
            f(r);
        }
    }

    /// `change`, or with this fault only the pretence of it.
    pub(super) fn change_unless(
        &mut self,
        m: Mutation,
        f: impl FnOnce(&mut crate::record::Record),
    ) {
        if self.mutated(m) {
            self.pretend(f);
        } else {
            self.change(f);
        }
    }

    /// Makes this engine wrong, in one way.
    #[cfg(feature = "mutations")]
    pub fn mutate(&mut self, m: Mutation) {
        self.mutation = Some(m);
    }
}
