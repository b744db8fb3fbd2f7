//! Carries out an engine's commands for one guest, strictly in their order.
//!
//! ```text
//!   Persist ── on this thread, both copies synced; a failure drops the rest of the list
//!   Order, Send ── written at once, or lost                    (the engine repeats what it needs)
//!   StartGuest, KillGuest, Witness, Fence… ── started here, answered by an event
//! ```

pub mod qemu;

use crate::events::EventLog;
use crate::record::RecordStore;
use crate::replicators::{Post, Replicator};
use havm_core::command::{Command, FenceRequest, WitnessRequest};
use havm_core::event::{Event, FenceOutcome};
use havm_core::ids::GuestName;
use havm_core::message::Envelope;
use havm_core::order::Order;
use qemu::Qemu;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A list of commands that takes longer than this holds up other guests; it is logged.
const SLOW: Duration = Duration::from_millis(20);

/// Asks the witness for a guest; posts the one answer.
pub type AskWitness = dyn Fn(&GuestName, WitnessRequest, Post) + Send + Sync;
/// Writes a guest's spec.
pub type WriteSpec = dyn Fn(&GuestName) -> std::io::Result<()> + Send + Sync;

/// The ways out of this node.
#[derive(Clone)]
pub struct Outside {
    /// Sends to the peer's daemon; may lose it.
    pub send: Arc<dyn Fn(Envelope) + Send + Sync>,
    /// Asks the witness; the answer is posted as an event, once.
    pub witness: Arc<AskWitness>,
    /// Writes a guest's spec before its replicator starts.
    pub write_spec: Arc<WriteSpec>,
}

/// One guest's hands.
pub struct Driver {
    guest: GuestName,
    record: RecordStore,
    replicator: Replicator,
    qemu: Qemu,
    outside: Outside,
    events: Arc<Mutex<EventLog>>,
    post: Post,
}

/// What a list of commands led to.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// All were carried out (or begun).
    Done,
    /// `Persist` failed; the rest was dropped. Deliver this event next.
    Dropped(Box<Event>),
    /// The record is gone: the guest is no longer protected.
    Forgotten,
}

impl Driver {
    /// The hands of a guest.
    pub fn new(
        guest: GuestName,
        record: RecordStore,
        replicator: Replicator,
        qemu: Qemu,
        outside: Outside,
        events: Arc<Mutex<EventLog>>,
        post: Post,
    ) -> Driver {
        Driver {
            guest,
            record,
            replicator,
            qemu,
            outside,
            events,
            post,
        }
    }

    /// Its replicator.
    pub fn replicator(&self) -> &Replicator {
        &self.replicator
    }

    /// Carries a list out.
    pub fn run(&mut self, commands: Vec<Command>) -> Outcome {
        let began = Instant::now();
        let mut outcome = Outcome::Done;
        for command in commands {
            tracing::debug!(guest = %self.guest, ?command, "command");
            match self.one(command) {
                Outcome::Done => {}
                Outcome::Forgotten => outcome = Outcome::Forgotten,
                dropped @ Outcome::Dropped(_) => return dropped,
            }
        }
        if began.elapsed() > SLOW {
            tracing::warn!(guest = %self.guest, ms = began.elapsed().as_millis(),
                "carrying out commands took long; is the disk of the state folder slow?");
        }
        outcome
    }

    fn one(&mut self, command: Command) -> Outcome {
        match command {
            Command::Persist(record) => {
                if let Err(e) = self.record.persist(&record) {
                    return Outcome::Dropped(Box::new(Event::PersistFailed { why: e.to_string() }));
                }
            }
            Command::Forget => {
                if let Err(e) = self.record.forget() {
                    return Outcome::Dropped(Box::new(Event::PersistFailed { why: e.to_string() }));
                }
                return Outcome::Forgotten;
            }
            Command::Send(envelope) => (self.outside.send)(envelope),
            Command::Order(order) => self.order(&order),
            Command::StartReplicator => match (self.outside.write_spec)(&self.guest) {
                Ok(()) => self.replicator.start(self.post.clone()),
                Err(e) => {
                    tracing::error!(guest = %self.guest, error = %e, "the replicator's spec cannot be written");
                    (self.post)(Event::ReplicatorLost);
                }
            },
            Command::StopReplicator => self.replicator.stop(&self.post),
            Command::StartGuest { life } => self.qemu.start(life, false),
            Command::StartStandbyGuest { life } => self.qemu.start(life, true),
            Command::KillGuest => self.qemu.kill(),
            Command::ShutdownGuest => self.qemu.shutdown(),
            Command::Witness(request) => {
                (self.outside.witness)(&self.guest, request, self.post.clone());
            }
            Command::Fence(request) => self.fence(request),
            Command::Notice(notice) => {
                let mut log = self
                    .events
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                log.add(Some(&self.guest), &notice);
            }
        }
        Outcome::Done
    }

    fn order(&self, order: &Order) {
        if !self.replicator.order(order) {
            tracing::debug!(guest = %self.guest, ?order, "no replicator to take an order");
        }
    }

    /// No fencing method can be configured in this version: a request is answered as failed, so
    /// that nobody is ever promoted on the strength of it.
    fn fence(&self, request: FenceRequest) {
        tracing::error!(guest = %self.guest, ?request, "fencing was asked for, but none is configured");
        (self.post)(Event::Fence(FenceOutcome::Failed));
    }
}
