//! The thread that hears the standby: an ack goes from here straight to the gate.

use crate::disks::Disks;
use crate::input::Input;
use crate::nics::Nics;
use crate::primary::Cmd;
use havm_core::ids::{EpochId, EpochNo};
use havm_links::link::run_sooner;
use havm_links::outgoing::{OutEvent, Outgoing};
use havm_wire::acked::{AckLedger, AckOutcome};
use havm_wire::back::Back;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long the thread sleeps at most before it looks whether it should end.
const TICK: Duration = Duration::from_millis(100);

/// What the machine must know of a stream.
#[derive(Debug)]
pub enum StreamEvent {
    /// The first eligible epoch was acked.
    Protected(EpochNo),
    /// Nothing comes from the standby.
    Silent,
    /// Something came again.
    Alive,
    /// It is over.
    Broken(String),
    /// The answer to a comparison.
    Verified(Back),
}

/// What the thread works with.
pub struct Parts {
    /// The stream, with epoch 0.
    pub id: EpochId,
    /// Its links.
    pub out: Arc<Outgoing>,
    /// Its numbering.
    pub ledger: Arc<Mutex<AckLedger>>,
    /// What acks release.
    pub nics: Nics,
    /// What acks settle.
    pub disks: Disks,
    /// The guest's thread.
    pub guest: Sender<Cmd>,
    /// The machine.
    pub events: Sender<Input>,
    /// The first proof came.
    pub protected: bool,
}

/// The handle: dropping it ends the stream, and the thread soon after.
pub struct Acks {
    out: Arc<Outgoing>,
    end: Arc<AtomicBool>,
}

impl Acks {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread for us.
    pub fn start(mut parts: Parts) -> std::io::Result<Acks> {
        let end = Arc::new(AtomicBool::new(false));
        let out = parts.out.clone();
        let seen = end.clone();
        std::thread::Builder::new()
            .name("acks".into())
            .spawn(move || {
                run_sooner();
                while !seen.load(SeqCst) {
                    if let Some(e) = parts.out.event(TICK) {
                        parts.hear(e);
                    }
                }
            })?;
        Ok(Acks { out, end })
    }

    /// The links.
    pub fn out(&self) -> &Outgoing {
        &self.out
    }
}

impl Drop for Acks {
    fn drop(&mut self) {
        self.out.abort();
        // Not waited for: ending the links takes its time, and a handover has none.
        self.end.store(true, SeqCst);
    }
}

impl Parts {
    fn hear(&mut self, e: OutEvent) {
        match e {
            OutEvent::Back(b) => self.back(b),
            OutEvent::LinkUp(i) => tracing::info!(link = i, "link carries the stream"),
            OutEvent::LinkDown(i, why) => tracing::warn!(link = i, why, "link down"),
            OutEvent::Silent => self.tell(StreamEvent::Silent),
            OutEvent::Alive => self.tell(StreamEvent::Alive),
            OutEvent::Broken(why) => self.tell(StreamEvent::Broken(why)),
        }
    }

    fn back(&mut self, b: Back) {
        let (outcome, durable) = {
            let mut l = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
            (l.on_back(&b), l.durable())
        };
        match outcome {
            Ok(AckOutcome::Proof(acked)) => {
                self.nics.release(acked);
                let n = acked.id().n;
                self.disks.acked(n);
                let _ = self.guest.send(Cmd::Wake);
                if !std::mem::replace(&mut self.protected, true) {
                    self.tell(StreamEvent::Protected(n));
                }
            }
            Ok(AckOutcome::Received(n)) => {
                self.disks.acked(n);
                let _ = self.guest.send(Cmd::Wake);
            }
            Ok(AckOutcome::Nothing) => match b {
                Back::Durable { .. } => self.disks.peer_durable(durable),
                Back::HashReply { .. } | Back::PeerSet { .. } => {
                    let _ = self.guest.send(Cmd::Back(self.id.stream, b));
                }
                Back::Verified { .. } => self.tell(StreamEvent::Verified(b)),
                Back::Bye { reason } => self.tell(StreamEvent::Broken(reason)),
                Back::Ack { .. } => {}
            },
            Err(e) => self.tell(StreamEvent::Broken(e.to_string())),
        }
    }

    fn tell(&self, e: StreamEvent) {
        let _ = self.events.send(Input::Stream(self.id.stream, e));
    }
}
