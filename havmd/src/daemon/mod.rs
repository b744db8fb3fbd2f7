//! The daemon: one loop that owns every guest's engine.
//!
//! ```text
//!   beats verdict ┐
//!   peer messages ┤                     ┌─ Persist (here, synced)
//!   task results  ┼─> event ─> engine ─>┤─ Order, Send (written at once)
//!   operators     ┤      ^              └─ Start…, Kill…, Witness ─> task ─> event
//!   deadline ─────┘      └──────────────────────────────────────────────────────┘
//! ```
//! One event at a time, and the commands of one before the next. Nothing in the loop waits for
//! anything but the record's disk.

mod guest;
mod protect;
mod remote;
mod requests;
mod shared;
mod start;

pub use start::run;

use crate::control::{HostStatus, VerifyResult};
use crate::driver::Outcome;
use crate::guests;
use crate::random::RandomId;
use guest::{Born, Running};
use havm_core::command::{Command, NoticeKind, Severity};
use havm_core::event::{Event, Ids, Operator, Peer};
use havm_core::ids::{GenId, GuestName, Incarnation, LifeId};
use havm_core::message::Envelope;
use havm_core::order::Report;
use havm_core::status::{GuestStatus, LinkStatus, PeerView, Status, WitnessStatus};
use shared::Shared;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Events kept for a guest that is just being taken in.
const MAX_EARLY: usize = 1000;

/// Who waits for the end of something; the error is for a person.
pub type Reply<T> = oneshot::Sender<Result<T, String>>;

/// What comes into the loop beside the peer's messages and verdict.
pub enum Input {
    /// A task's result or a process's report.
    Guest(GuestName, Box<Event>),
    /// A guest whose processes were looked for: from now on it has an engine.
    Born(Box<Born>),
    /// Take a guest in whose files are complete; with its first wish, and who asked.
    TakeIn(GuestName, Option<Operator>, Reply<()>),
    /// An operator's wish; the answer is the engine's refusal, if any.
    Operate(GuestName, Operator, Reply<()>),
    /// Compare both sides.
    Verify(GuestName, Reply<VerifyResult>),
    /// One guest's status.
    GuestStatus(GuestName, oneshot::Sender<Option<GuestStatus>>),
    /// Everything.
    Status(oneshot::Sender<HostStatus>),
    /// The verdict about the peer's host changed.
    Verdict(Peer),
    /// A link became silent, or is heard again.
    Link(usize, bool),
    /// The witness was probed.
    Witness(Option<Incarnation>),
    /// What is wrong with the node as a whole.
    Faults(Vec<String>),
}

/// What the loop listens to.
pub struct Ears {
    /// See [`Input`].
    pub inputs: mpsc::UnboundedReceiver<Input>,
    /// The peer's messages about guests.
    pub messages: mpsc::Receiver<Envelope>,
}

struct Loop {
    shared: Arc<Shared>,
    beats: crate::beats::Beats,
    guests: BTreeMap<GuestName, Running>,
    /// Events that came for a guest before it was born, and who waits for its birth.
    early: HashMap<GuestName, Vec<Event>>,
    born_waits: HashMap<GuestName, (Option<Operator>, Reply<()>)>,
    verifying: HashMap<u64, (GuestName, Reply<VerifyResult>)>,
    next_verify: u64,
    verdict: Peer,
    witness: Option<Incarnation>,
    faults: Vec<String>,
}

impl Loop {
    async fn run(mut self, mut ears: Ears) {
        let mut poll = tokio::time::interval(Duration::from_secs(5));
        loop {
            let next = self
                .guests
                .values()
                .filter_map(|g| g.engine.next_deadline())
                .min();
            let wait = next.map(|at| at.saturating_sub(self.shared.now()));
            let tick = async {
                match wait {
                    Some(d) => tokio::time::sleep(d).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                input = ears.inputs.recv() => match input {
                    Some(input) => self.input(input),
                    None => return,
                },
                message = ears.messages.recv() => match message {
                    Some(m) => {
                        let guest = m.guest.clone();
                        self.event(&guest, Event::Message(m));
                    }
                    None => return,
                },
                () = tick => self.tick(),
                _ = poll.tick() => {
                    self.all(|v| Event::Peer(v.verdict));
                    self.all(|v| Event::WitnessSeen(v.witness));
                }
            }
        }
    }

    fn tick(&mut self) {
        let now = self.shared.now();
        let due: Vec<GuestName> = self
            .guests
            .iter()
            .filter(|(_, g)| g.engine.next_deadline().is_some_and(|at| at <= now))
            .map(|(n, _)| n.clone())
            .collect();
        for g in due {
            self.event(&g, Event::Tick);
        }
    }

    fn all(&mut self, event: impl Fn(&Loop) -> Event) {
        let names: Vec<GuestName> = self.guests.keys().cloned().collect();
        for g in names {
            let e = event(self);
            self.event(&g, e);
        }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Guest(guest, event) => {
                if let Event::Report(report) = &*event {
                    self.overhear(&guest, report);
                }
                if *event == Event::ReplicatorLost {
                    self.verifying.retain(|_, (g, _)| *g != guest);
                }
                self.event(&guest, *event);
            }
            Input::Born(born) => self.born(*born),
            Input::TakeIn(guest, first, reply) => self.take_in(guest, first, reply),
            Input::Operate(guest, op, reply) => {
                let r = self.operate(&guest, op);
                let _ = reply.send(r);
            }
            Input::Verify(guest, reply) => {
                let id = self.next_verify;
                self.next_verify += 1;
                match self.operate(&guest, Operator::Verify { id }) {
                    Ok(()) => drop(self.verifying.insert(id, (guest, reply))),
                    Err(why) => drop(reply.send(Err(why))),
                }
            }
            Input::GuestStatus(guest, reply) => {
                let known = self.guests.get(&guest).map(|g| g.engine.status());
                let _ = reply.send(known);
            }
            Input::Status(reply) => drop(reply.send(self.status())),
            Input::Verdict(peer) => {
                self.verdict = peer;
                self.all(|v| Event::Peer(v.verdict));
            }
            Input::Link(link, up) => self.link_changed(link, up),
            Input::Witness(seen) => {
                let new = seen != self.witness;
                let (was, is) = (self.witness.is_some(), seen.is_some());
                self.witness = seen;
                if was != is {
                    self.witness_changed(is);
                }
                if new {
                    self.all(|v| Event::WitnessSeen(v.witness));
                }
            }
            Input::Faults(f) => {
                for new in f.iter().filter(|x| !self.faults.contains(x)) {
                    self.shared.say(None, Severity::Warning, new.clone());
                }
                self.faults = f;
            }
        }
    }

    /// Gives an event to a guest's engine and carries its commands out; events that this leads to
    /// at once (a failed `Persist`) follow.
    fn event(&mut self, guest: &GuestName, event: Event) -> Option<String> {
        let Some(g) = self.guests.get_mut(guest) else {
            if let Some(early) = self.early.get_mut(guest)
                && early.len() < MAX_EARLY
            {
                early.push(event);
            } else {
                tracing::debug!(%guest, ?event, "an event for a guest that is not protected here");
            }
            return None;
        };
        let mut next = Some(event);
        let mut refused = None;
        while let Some(event) = next.take() {
            if !matches!(
                event,
                Event::Report(Report::State(_) | Report::SyncProgress { .. })
            ) {
                tracing::debug!(%guest, ?event, "event");
            }
            let ids = match fresh_ids() {
                Ok(ids) => ids,
                Err(e) => {
                    // Without new lives nothing may be started; the event is as good as lost.
                    tracing::error!(%guest, error = %e, "no random numbers");
                    return None;
                }
            };
            let commands = g.engine.handle(event, self.shared.now(), ids);
            for c in &commands {
                if let Command::Notice(n) = c
                    && n.kind == NoticeKind::RequestRefused
                {
                    refused = Some(n.text.clone());
                }
            }
            match g.driver.run(commands) {
                Outcome::Done => {}
                Outcome::Dropped(event) => next = Some(*event),
                Outcome::Forgotten => {
                    self.forgotten(guest);
                    return refused;
                }
            }
        }
        refused
    }

    fn operate(&mut self, guest: &GuestName, op: Operator) -> Result<(), String> {
        if !self.guests.contains_key(guest) {
            return Err(format!(
                "guest {guest} is not protected on {}",
                self.shared.config.node.name
            ));
        }
        self.event(guest, Event::Operator(op)).map_or(Ok(()), Err)
    }

    /// The record is gone. The processes were told to go before it; what is left are files.
    fn forgotten(&mut self, guest: &GuestName) {
        self.guests.remove(guest);
        if let Err(e) = guests::forget(&self.shared.paths, guest) {
            tracing::error!(%guest, error = %e, "the state folder could not be cleared");
        }
    }

    /// Results that somebody at a command line waits for; the engine gets them too.
    fn overhear(&mut self, guest: &GuestName, report: &Report) {
        if let Report::Verified {
            id,
            ram_different,
            ram_pages,
            disk_different,
            disk_blocks,
            error,
        } = report
            && let Some((_, reply)) = self.verifying.remove(id)
        {
            let result = match error {
                Some(why) => Err(format!("the comparison could not be done: {why}")),
                None => Ok(VerifyResult {
                    memory_equal: *ram_different == 0,
                    disk_equal: *disk_different == 0,
                    ram_different: *ram_different,
                    ram_pages: *ram_pages,
                    disk_different: *disk_different,
                    disk_blocks: *disk_blocks,
                }),
            };
            let _ = reply.send(result);
        }
        if let Report::Refused { order, why } = report {
            tracing::warn!(%guest, order, why, "the replicator refused an order");
        }
    }

    fn take_in(&mut self, guest: GuestName, first: Option<Operator>, reply: Reply<()>) {
        if self.guests.contains_key(&guest) || self.early.contains_key(&guest) {
            let _ = reply.send(Err(format!("guest {guest} is protected here already")));
            return;
        }
        self.early.insert(guest.clone(), Vec::new());
        self.born_waits.insert(guest.clone(), (first, reply));
        guest::look_for(self.shared.clone(), guest);
    }

    fn born(&mut self, born: Born) {
        let guest = born.guest.clone();
        let early = self.early.remove(&guest).unwrap_or_default();
        let waits = self.born_waits.remove(&guest);
        let (running, started) = match born.parts {
            Ok(parts) => parts,
            Err(why) => {
                self.shared.say(Some(&guest), Severity::Alarm, why.clone());
                if let Some((_, reply)) = waits {
                    let _ = reply.send(Err(why));
                }
                return;
            }
        };
        self.guests.insert(guest.clone(), running);
        self.event(&guest, Event::Started(Box::new(started)));
        self.event(&guest, Event::Peer(self.verdict));
        self.event(&guest, Event::WitnessSeen(self.witness));
        for e in early {
            self.event(&guest, e);
        }
        if let Some((first, reply)) = waits {
            let r = first.map_or(Ok(()), |op| self.operate(&guest, op));
            let _ = reply.send(r);
        }
    }

    fn link_changed(&self, link: usize, up: bool) {
        let links = &self.shared.config.peer.links;
        let name = links.get(link).map_or("?", |l| l.name.as_str());
        if up {
            let text = format!("link {name} carries heartbeats");
            self.shared.tell("link-up", Severity::Info, &text);
        } else {
            let text = format!(
                "link {name} is silent: look at its cable, card and switch, or at the peer"
            );
            self.shared.tell("link-down", Severity::Warning, &text);
        }
    }

    fn witness_changed(&self, up: bool) {
        if up {
            self.shared
                .tell("witness-back", Severity::Info, "the witness answers");
        } else {
            let text = "the witness does not answer: a host that is lost now cannot be replaced until it does";
            self.shared.tell("witness-lost", Severity::Warning, text);
        }
    }

    fn links(&self) -> Vec<LinkStatus> {
        let names = self.shared.config.peer.links.iter().map(|l| l.name.clone());
        names
            .zip(self.beats.snapshot().links)
            .map(|(name, l)| LinkStatus {
                name,
                up: l.up,
                rtt_us: l.rtt_us,
                missed: l.counters.lost,
            })
            .collect()
    }

    fn faults(&self) -> Vec<String> {
        let mut out = self.faults.clone();
        let wanted = self.shared.config.witness != havm_config::model::Witness::None;
        if wanted && self.shared.witness().is_none() {
            out.push("this node is not enrolled at the witness: run `havm pair --witness`".into());
        }
        out
    }

    fn status(&self) -> HostStatus {
        let config = &self.shared.config;
        let witness = match &config.witness {
            havm_config::model::Witness::Builtin { addresses } => Some(WitnessStatus {
                address: addresses
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
                reachable: self.witness.is_some(),
                incarnation: self.witness,
            }),
            havm_config::model::Witness::None => None,
        };
        HostStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            started_at_ms: self.shared.started_at_ms,
            now_ms: crate::events::wall_ms(),
            faults: self.faults(),
            status: Status {
                node: config.node.name.clone(),
                peer_node: config.peer.name.clone(),
                peer: match self.verdict {
                    Peer::Alive => PeerView::Alive,
                    Peer::Suspect => PeerView::Suspect,
                    Peer::Lost => PeerView::Lost,
                },
                links: self.links(),
                witness,
                guests: self.guests.values().map(|g| g.engine.status()).collect(),
            },
        }
    }
}

fn fresh_ids() -> std::io::Result<Ids> {
    Ok(Ids {
        life: LifeId::random()?,
        generation: GenId::random()?,
    })
}
