//! The proof that the standby holds an epoch: the only thing that opens a protected gate.
//!
//! [`AckLedger`] numbers the epochs of one stream and turns the standby's acks into proofs. An ack
//! counts for this term, this stream and the named life only, up to the last epoch closed, and
//! proves something only from the first eligible epoch on (rules 1 to 4).

use crate::back::Back;
use crate::epoch::{EpochError, OpenEpoch};
use crate::frame::{EpochEnd, Frame};
use crate::raw::Encoded;
use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId, Term};

/// An epoch that the standby acknowledged. Built by this crate's ledger when an authentic ack of
/// the present stream arrives, and nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckedEpoch(EpochId);

impl AckedEpoch {
    /// The epoch.
    pub fn id(&self) -> EpochId {
        self.0
    }

    /// For tests of the gate only: needs the feature `test-support`.
    #[cfg(feature = "test-support")]
    pub fn for_tests(id: EpochId) -> Self {
        AckedEpoch(id)
    }
}

/// What an ack says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckOutcome {
    /// Nothing new: another stream's, another life's, or of an epoch that was acked before.
    Nothing,
    /// The standby has this epoch, but it is not eligible: no output may follow from that.
    Received(EpochNo),
    /// The standby holds this epoch for good.
    Proof(AckedEpoch),
}

/// Faults in the numbering of epochs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// An epoch is open already, or the one to close is not it.
    #[error("epoch {asked} cannot be {what}: epoch {open:?} is open, {closed} was closed last")]
    Order {
        /// open or closed.
        what: &'static str,
        /// The epoch in question.
        asked: EpochNo,
        /// The open one.
        open: Option<EpochNo>,
        /// The last closed.
        closed: EpochNo,
    },
    /// Once protected, every epoch counts.
    #[error("epoch {0} is not marked eligible, but an earlier one was")]
    NoLongerEligible(EpochNo),
    /// An eligible epoch must be whole.
    #[error("epoch {0} cannot be eligible: it is sent in bulk or has no device state")]
    CannotBeEligible(EpochNo),
    /// The standby claims what was never sent.
    #[error(
        "the standby acknowledged epoch {acked}, but {closed} is the last: it is out of its mind"
    )]
    FromTheFuture {
        /// Its claim.
        acked: EpochNo,
        /// The truth.
        closed: EpochNo,
    },
    /// The last frame could not be made.
    #[error(transparent)]
    Epoch(#[from] EpochError),
}

/// Epoch numbers and acks of one stream, on the primary.
#[derive(Debug)]
pub struct AckLedger {
    term: Term,
    stream: StreamId,
    peer_life: LifeId,
    open: Option<EpochNo>,
    closed: EpochNo,
    acked: EpochNo,
    durable: EpochNo,
    first_eligible: Option<EpochNo>,
}

impl AckLedger {
    /// Of a new stream to the standby's life `peer_life`.
    pub fn new(term: Term, stream: StreamId, peer_life: LifeId) -> Self {
        AckLedger {
            term,
            stream,
            peer_life,
            open: None,
            closed: EpochNo(0),
            acked: EpochNo(0),
            durable: EpochNo(0),
            first_eligible: None,
        }
    }

    /// The last epoch closed.
    pub fn closed(&self) -> EpochNo {
        self.closed
    }
    /// The last epoch acked.
    pub fn acked(&self) -> EpochNo {
        self.acked
    }
    /// The last epoch that the standby reported durable.
    pub fn durable(&self) -> EpochNo {
        self.durable
    }
    /// The id of an epoch of this stream.
    pub fn id(&self, n: EpochNo) -> EpochId {
        EpochId {
            term: self.term,
            stream: self.stream,
            n,
        }
    }

    /// Opens the next epoch.
    pub fn open(&mut self, bulk: bool) -> Result<OpenEpoch, LedgerError> {
        let n = self.closed.next();
        if self.open.is_some() {
            return Err(self.order("opened", n));
        }
        self.open = Some(n);
        Ok(OpenEpoch::new(n, bulk))
    }

    /// Closes it: the frame that ends it, to be queued after all others.
    pub fn close(
        &mut self,
        epoch: OpenEpoch,
        eligible: bool,
        shutdown: bool,
    ) -> Result<Encoded, LedgerError> {
        let n = epoch.n();
        if self.open != Some(n) {
            return Err(self.order("closed", n));
        }
        if eligible && (epoch.is_bulk() || !epoch.has_device_state()) {
            return Err(LedgerError::CannotBeEligible(n));
        }
        if !eligible && self.first_eligible.is_some() {
            return Err(LedgerError::NoLongerEligible(n));
        }
        let end = EpochEnd {
            n,
            eligible,
            shutdown,
            tally: epoch.tally(),
        };
        let frame = Frame::EpochEnd(end).encode().map_err(EpochError::from)?;
        self.open = None;
        self.closed = n;
        if eligible {
            self.first_eligible.get_or_insert(n);
        }
        Ok(frame)
    }

    /// Takes a message of the standby; anything but [`Back::Ack`] and [`Back::Durable`] says
    /// nothing here.
    pub fn on_back(&mut self, back: &Back) -> Result<AckOutcome, LedgerError> {
        match back {
            Back::Ack { epoch, life } if *life == self.peer_life && self.is_mine(epoch) => {
                self.not_from_the_future(epoch.n)?;
                if epoch.n <= self.acked {
                    return Ok(AckOutcome::Nothing);
                }
                self.acked = epoch.n;
                Ok(match self.first_eligible {
                    Some(first) if epoch.n >= first => AckOutcome::Proof(AckedEpoch(*epoch)),
                    _ => AckOutcome::Received(epoch.n),
                })
            }
            Back::Durable { epoch } if self.is_mine(epoch) => {
                self.not_from_the_future(epoch.n)?;
                self.durable = self.durable.max(epoch.n);
                Ok(AckOutcome::Nothing)
            }
            _ => Ok(AckOutcome::Nothing),
        }
    }

    fn is_mine(&self, epoch: &EpochId) -> bool {
        epoch.term == self.term && epoch.stream == self.stream
    }

    fn not_from_the_future(&self, acked: EpochNo) -> Result<(), LedgerError> {
        if acked > self.closed {
            return Err(LedgerError::FromTheFuture {
                acked,
                closed: self.closed,
            });
        }
        Ok(())
    }

    fn order(&self, what: &'static str, asked: EpochNo) -> LedgerError {
        LedgerError::Order {
            what,
            asked,
            open: self.open,
            closed: self.closed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: LifeId = LifeId([9; 16]);

    fn ledger() -> AckLedger {
        AckLedger::new(Term(3), StreamId([1; 16]), LIFE)
    }

    fn run(l: &mut AckLedger, eligible: bool) {
        let mut e = l.open(false).unwrap();
        e.device_state(b"state").unwrap();
        l.close(e, eligible, false).unwrap();
    }

    fn ack(l: &AckLedger, n: u64) -> Back {
        Back::Ack {
            epoch: l.id(EpochNo(n)),
            life: LIFE,
        }
    }

    #[test]
    fn only_eligible_epochs_give_a_proof_and_each_only_once() {
        let mut l = ledger();
        run(&mut l, false);
        run(&mut l, true);
        run(&mut l, true);
        assert_eq!(l.on_back(&ack(&l, 1)), Ok(AckOutcome::Received(EpochNo(1))));
        let proof = l.on_back(&ack(&l, 3)).unwrap();
        assert!(matches!(proof, AckOutcome::Proof(p) if p.id() == l.id(EpochNo(3))));
        assert_eq!(l.on_back(&ack(&l, 3)), Ok(AckOutcome::Nothing));
        assert_eq!(l.on_back(&ack(&l, 2)), Ok(AckOutcome::Nothing));
    }

    #[test]
    fn acks_of_another_term_stream_or_life_prove_nothing() {
        let mut l = ledger();
        run(&mut l, true);
        let right = l.id(EpochNo(1));
        for (epoch, life) in [
            (
                EpochId {
                    term: Term(2),
                    ..right
                },
                LIFE,
            ),
            (
                EpochId {
                    stream: StreamId([2; 16]),
                    ..right
                },
                LIFE,
            ),
            (right, LifeId([8; 16])),
        ] {
            assert_eq!(
                l.on_back(&Back::Ack { epoch, life }),
                Ok(AckOutcome::Nothing)
            );
        }
        assert!(matches!(l.on_back(&ack(&l, 1)), Ok(AckOutcome::Proof(_))));
    }

    #[test]
    fn an_ack_of_what_was_never_closed_is_a_fault() {
        let mut l = ledger();
        run(&mut l, true);
        let _open = l.open(false).unwrap();
        assert!(matches!(
            l.on_back(&ack(&l, 2)),
            Err(LedgerError::FromTheFuture { .. })
        ));
        assert_eq!(l.acked(), EpochNo(0));
    }

    #[test]
    fn eligibility_never_ends_and_needs_a_whole_epoch() {
        let mut l = ledger();
        let bare = l.open(false).unwrap();
        assert!(matches!(
            l.close(bare, true, false),
            Err(LedgerError::CannotBeEligible(_))
        ));
        let mut l = ledger();
        run(&mut l, true);
        let mut e = l.open(false).unwrap();
        e.device_state(b"x").unwrap();
        assert!(matches!(
            l.close(e, false, false),
            Err(LedgerError::NoLongerEligible(_))
        ));
    }
}
