//! A standby copy: what is received, staged, acked, and committed behind the ack.
//!
//! ```text
//!   links ──frames in order──> receiver ──complete epoch──> queue ──> committer ──> image, disks
//!                                 └── ack (once the record says eligible)   └── durable, answers
//!
//!   receiving ──first eligible epoch committed: EligibleImage──> (record persisted) confirm ──> eligible
//!   eligible ──seal──> sealed ──finish──> the image and device state for a promotion
//! ```

mod answer;
mod commit;
mod receive;
mod shared;

use crate::disks::Disks;
use crate::input::Input;
use commit::Committer;
use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId};
use havm_image::RamImage;
use havm_links::incoming::Incoming;
use havm_links::link::LinkCounters;
use havm_wire::back::Back;
use shared::{Shared, Work};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

/// What the threads of a standby tell the machine.
#[derive(Debug)]
pub enum StandbyEvent {
    /// The first eligible epoch is complete and committed.
    EligibleImage(EpochId),
    /// The image is in the waiting QEMU.
    Ready,
    /// Nothing comes from the primary's replicator.
    Silent,
    /// Something came again.
    Alive,
    /// The stream is over; the copy stays what it is.
    Broken(String),
    /// The guest shut itself down in a committed epoch.
    GuestShutdown,
    /// The copy cannot be kept.
    Spoilt(String),
}

/// The way to the machine, with the copy's number.
#[derive(Clone)]
pub(crate) struct Events {
    pub to: Sender<Input>,
    pub number: u64,
}

impl Events {
    fn tell(&self, e: StandbyEvent) {
        let _ = self.to.send(Input::Standby(self.number, e));
    }
}

/// The way back to the primary.
#[derive(Clone)]
pub(crate) struct Reply(Arc<Incoming>);

impl Reply {
    fn send(&self, b: Back) {
        if let Err(e) = self.0.reply(&b) {
            tracing::debug!(error = %e, "a message to the primary was not queued");
        }
    }

    /// Acks up to `id` unless the copy is sealed, or eligible epochs may not be acked yet.
    fn ack(&self, shared: &Shared, id: EpochId, eligible: bool) {
        // Under the lock: when `seal` has returned, no ack follows.
        let mut p = shared.lock();
        if p.sealed || (eligible && !p.confirmed) || id.n <= p.acked {
            return;
        }
        p.acked = id.n;
        self.send(Back::Ack {
            epoch: id,
            life: shared.life,
        });
    }
}

/// What a standby is made of.
pub struct Parts {
    /// This copy's life.
    pub life: LifeId,
    /// Where the stream comes in.
    pub incoming: Incoming,
    /// The disks, as standby.
    pub disks: Disks,
    /// An image held already (after a handover).
    pub image: Option<RamImage>,
    /// The record says eligible already (after a handover).
    pub confirmed: bool,
    /// Acks wait until the epoch is on disk.
    pub ack_disk: bool,
    /// Bounds what may be staged, bytes.
    pub max_epoch_bytes: u64,
    /// The machine.
    pub events: Sender<Input>,
    /// Which copy of this process it is.
    pub number: u64,
}

/// What is left of a standby when it is promoted.
pub struct Finished {
    /// The image.
    pub image: Option<RamImage>,
    /// The devices at the last committed epoch.
    pub device_state: Vec<u8>,
    /// That epoch; none where no eligible one came.
    pub last: Option<EpochNo>,
    /// The guest shut itself down in it.
    pub guest_shut_down: bool,
    /// The copy is spoilt.
    pub spoilt: bool,
}

/// How far a copy is, for status.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// The stream.
    pub stream: Option<StreamId>,
    /// The last complete epoch.
    pub complete: EpochNo,
    /// The last committed epoch.
    pub committed: EpochNo,
    /// Links that carry it.
    pub links_up: u32,
}

/// A running standby copy.
pub struct Standby {
    shared: Arc<Shared>,
    incoming: Arc<Incoming>,
    end: Arc<AtomicBool>,
    receiver: Option<JoinHandle<()>>,
    committer: Option<JoinHandle<commit::Held>>,
}

impl Standby {
    /// Starts its threads.
    ///
    /// # Errors
    /// The system has no threads for us.
    pub fn start(p: Parts) -> std::io::Result<Standby> {
        let shared = Arc::new(Shared::new(p.life, p.ack_disk, p.confirmed));
        let incoming = Arc::new(p.incoming);
        let end = Arc::new(AtomicBool::new(false));
        let events = Events {
            to: p.events,
            number: p.number,
        };
        let committer = Committer {
            shared: shared.clone(),
            image: p.image,
            disks: p.disks,
            reply: Reply(incoming.clone()),
            events: events.clone(),
            stream: None,
            device_state: Vec::new(),
            durable: EpochNo(0),
            touched: false,
            verify: None,
        };
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let committer = thread("committer").spawn(move || committer.run())?;
        let receiver = receive::Receiver {
            shared: shared.clone(),
            incoming: incoming.clone(),
            events,
            end: end.clone(),
            max_epoch_bytes: p.max_epoch_bytes,
        };
        let receiver = thread("receiver").spawn(move || receiver.run())?;
        Ok(Standby {
            shared,
            incoming,
            end,
            receiver: Some(receiver),
            committer: Some(committer),
        })
    }

    /// Where the stream comes in.
    pub fn ports(&self) -> &[SocketAddr] {
        self.incoming.ports()
    }

    /// A waiting QEMU is there: the image moves into its RAM, and goes on there.
    pub fn rehome(&self, fresh: RamImage) {
        self.shared.push(Work::Rehome(fresh), None);
    }

    /// The record says eligible: what is complete is acked now.
    pub fn confirm(&self) {
        let complete = {
            let mut p = self.shared.lock();
            p.confirmed = true;
            if self.shared.ack_after_commit {
                // What is complete but not committed is acked by its commit.
                p.complete.map(|c| EpochId {
                    n: c.n.min(p.committed),
                    ..c
                })
            } else {
                p.complete
            }
        };
        if let Some(id) = complete {
            Reply(self.incoming.clone()).ack(&self.shared, id, true);
        }
    }

    /// It may be promoted.
    pub fn is_confirmed(&self) -> bool {
        self.shared.lock().confirmed
    }

    /// No commit of a later epoch and no ack any more; returns the last epoch, committed. `None` where there
    /// is no eligible image.
    pub fn seal(&self) -> Option<EpochNo> {
        {
            let mut p = self.shared.lock();
            p.sealed = true;
        }
        self.shared.notify();
        self.shared.drain();
        let p = self.shared.lock();
        p.complete.filter(|_| p.confirmed && !p.end).map(|id| id.n)
    }

    /// Sealed?
    pub fn is_sealed(&self) -> bool {
        self.shared.lock().sealed
    }

    /// How far it is.
    pub fn seen(&self) -> Seen {
        let p = self.shared.lock();
        Seen {
            stream: p.complete.map(|c| c.stream),
            complete: p.complete.map_or(p.committed, |c| c.n),
            committed: p.committed,
            links_up: self.incoming.links_up() as u32,
        }
    }

    /// Traffic per link.
    pub fn link_counters(&self) -> Vec<LinkCounters> {
        self.incoming.counters()
    }

    /// Ends it and hands over what it held.
    pub fn finish(mut self) -> Finished {
        let last = self.seal();
        let spoilt = {
            let mut p = self.shared.lock();
            std::mem::replace(&mut p.end, true)
        };
        let held = self.stop();
        let guest_shut_down = self.shared.lock().guest_shut_down;
        let (image, device_state) = held.map_or((None, Vec::new()), |h| (h.image, h.device_state));
        Finished {
            image,
            device_state,
            last,
            guest_shut_down,
            spoilt,
        }
    }

    fn stop(&mut self) -> Option<commit::Held> {
        self.shared.lock().end = true;
        self.end.store(true, SeqCst);
        self.shared.notify();
        if let Some(t) = self.receiver.take() {
            let _ = t.join();
        }
        self.committer.take()?.join().ok()
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        self.stop();
    }
}
