//! The proof that the standby holds an epoch: the only thing that opens a protected gate.

use havm_core::ids::EpochId;

/// An epoch that the standby acknowledged. Built by this crate's sender when an authentic ack of
/// the present stream arrives, and nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckedEpoch(EpochId);

impl AckedEpoch {
    /// The epoch.
    pub fn id(&self) -> EpochId {
        self.0
    }

    #[allow(dead_code, reason = "the sender is its only maker")]
    pub(crate) fn new(id: EpochId) -> Self {
        AckedEpoch(id)
    }

    /// For tests of the gate only: needs the feature `test-support`.
    #[cfg(feature = "test-support")]
    pub fn for_tests(id: EpochId) -> Self {
        AckedEpoch(id)
    }
}
