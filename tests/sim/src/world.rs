//! The world: one queue of events in virtual time, two nodes, a witness, the network between.

use crate::check::Checker;
use crate::node::{Daemon, Guest, Node};
use crate::replica::{Gate, Packet, Replica};
use crate::rng::Rng;
use havm_core::command::{Command, WitnessRequest};
use havm_core::detector::{Beat, Detector, DetectorSettings};
use havm_core::engine::{Engine, Identity};
use havm_core::event::{Event, Found, Ids, Operator, Started, WitnessReply};
use havm_core::ids::{GenId, GuestName, Incarnation, LifeId, NodeId, Term};
use havm_core::message::Envelope;
use havm_core::order::{Mode, Order, Report};
use havm_core::record::Intent;
use havm_core::settings::Settings;
use havm_core::status::Safety;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// One millisecond of virtual time, in its unit.
pub const MS: u64 = 1_000;
const BEAT_US: u64 = 20 * MS;
/// How often a modelled replicator closes an epoch.
pub const EPOCH_US: u64 = 40 * MS;

/// A world that does not keep its promise: the checkers have to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// Rule 13: the witness is restored from a backup now and then.
    WitnessForgets,
    /// Rule 6: the witness grants a term to the second that asks, too.
    WitnessGrantsTwice,
    /// Rule 2: the gate lets out what was not acked.
    UnackedOutput,
    /// Rule 1: an ack counts without its stream's id.
    AckOfAnyStream,
    /// Rule 4: the standby acks what it has not committed.
    AckBeforeCommit,
}

/// What a history is made of.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The seed.
    pub seed: u64,
    /// How long faults happen, microseconds of virtual time.
    pub faults_us: u64,
    /// How long healing may take after them.
    pub heal_us: u64,
    /// Keep and return the history.
    pub record: bool,
    /// Only these kinds of faults (all where empty).
    pub only: Vec<crate::faults::Fault>,
    /// A part of the modelled world that breaks its own promise.
    pub lie: Option<Lie>,
    /// One deliberate fault in both engines.
    #[cfg(feature = "mutations")]
    pub mutation: Option<havm_core::engine::Mutation>,
}

impl Setup {
    /// The usual bounds.
    pub fn seed(seed: u64) -> Setup {
        Setup {
            seed,
            faults_us: 12_000 * MS,
            heal_us: 40_000 * MS,
            record: false,
            only: vec![],
            lie: None,
            #[cfg(feature = "mutations")]
            mutation: None,
        }
    }
}

/// How a history ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What went wrong, if anything did.
    pub wrong: Option<String>,
    /// The history, where it was asked for.
    pub history: Vec<String>,
    /// Failovers, switchovers and the like that happened: takes of a term.
    pub highest_term: u64,
    /// Time from the last fault to protection, microseconds.
    pub healed_us: u64,
    /// Points that the outside saw.
    pub released: u64,
}

#[derive(Debug)]
pub(crate) enum Ev {
    Boot {
        node: usize,
    },
    DaemonStart {
        node: usize,
        boot: u64,
    },
    Deliver {
        node: usize,
        session: u64,
        event: Event,
    },
    Message {
        node: usize,
        envelope: Envelope,
    },
    Tick {
        node: usize,
        session: u64,
    },
    Beat {
        node: usize,
        session: u64,
    },
    Order {
        node: usize,
        rid: u64,
        order: Order,
    },
    ReplicaUp {
        node: usize,
        boot: u64,
    },
    ReplicaGone {
        node: usize,
        rid: u64,
    },
    Epoch {
        node: usize,
        rid: u64,
    },
    Packet {
        node: usize,
        packet: Packet,
    },
    GuestUp {
        node: usize,
        number: u64,
        life: LifeId,
        waiting: bool,
    },
    GuestEnds {
        node: usize,
        life: LifeId,
        intended: bool,
    },
    Flushed {
        node: usize,
        rid: u64,
        term: Term,
    },
    Ask {
        node: usize,
        session: u64,
        request: WitnessRequest,
        answer: bool,
    },
    NoAnswer {
        node: usize,
        session: u64,
    },
    Fault,
    HealBegins,
    HealCheck,
    Heal {
        what: crate::faults::Healing,
    },
}

struct Item {
    at: u64,
    seq: u64,
    ev: Ev,
}
impl PartialEq for Item {
    fn eq(&self, o: &Self) -> bool {
        (self.at, self.seq) == (o.at, o.seq)
    }
}
impl Eq for Item {}
impl PartialOrd for Item {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Item {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(o.at, o.seq))
    }
}

/// The register of the guest at the witness.
#[derive(Debug, Clone, Copy, Default)]
pub struct Register {
    /// The last granted term.
    pub term: Term,
    /// To whom.
    pub holder: Option<NodeId>,
}

/// Everything.
pub struct World {
    pub(crate) setup: Setup,
    pub(crate) now: u64,
    seq: u64,
    queue: BinaryHeap<Reverse<Item>>,
    pub(crate) rng: Rng,
    /// The nodes.
    pub nodes: [Node; 2],
    /// Whether packets pass from node to other, on each of the two links.
    pub(crate) links: [[bool; 2]; 2],
    pub(crate) register: Register,
    pub(crate) incarnation: Incarnation,
    pub(crate) check: Checker,
    pub(crate) faulty: bool,
    pub(crate) last_fault_us: u64,
    healed_us: Option<u64>,
    history: Vec<String>,
    counter: u64,
}

pub(crate) fn node_id(n: usize) -> NodeId {
    NodeId([n as u8 + 1; 16])
}

pub(crate) fn guest_name() -> GuestName {
    "sim".parse().expect("a good name")
}

fn settings() -> Settings {
    let mut s = Settings::default();
    let ms = Duration::from_millis;
    s.failback.stability = ms(1_500);
    s.failback.backoff = ms(1_000);
    s.failback.budget = 6;
    s.failback.window = ms(10_000);
    s.failback.probation = ms(4_000);
    s.cold_wait = ms(2_000);
    s.solo_start_wait = ms(600);
    s.restart_backoff = ms(100);
    s
}

/// Runs one history.
pub fn run(setup: &Setup) -> Outcome {
    let mut w = World::new(setup.clone());
    w.go();
    let highest_term = w
        .nodes
        .iter()
        .filter_map(|n| n.record.as_ref())
        .map(|r| r.term.0)
        .max();
    Outcome {
        wrong: w.check.wrong.clone(),
        highest_term: highest_term.unwrap_or(0),
        healed_us: w.healed_us.unwrap_or(0).saturating_sub(w.last_fault_us),
        released: w.check.released,
        history: w.history,
    }
}

impl World {
    fn new(setup: Setup) -> World {
        let mut rng = Rng::new(setup.seed);
        let incarnation = Incarnation(rng.id());
        let mut w = World {
            setup,
            now: 0,
            seq: 0,
            queue: BinaryHeap::new(),
            rng,
            nodes: [Node::new(), Node::new()],
            links: [[true; 2]; 2],
            register: Register::default(),
            incarnation,
            check: Checker::default(),
            faulty: false,
            last_fault_us: 0,
            healed_us: None,
            history: vec![],
            counter: 0,
        };
        let first = w.check.grow(None);
        w.nodes[0].disk.now = Some(first);
        w.nodes[0].disk.flushed = Some(first);
        w.push(0, Ev::Boot { node: 0 });
        w.push(0, Ev::Boot { node: 1 });
        let calm = w.rng.range(200, 4_000) * MS;
        w.push(calm, Ev::Fault);
        let end = w.setup.faults_us;
        w.push(end, Ev::HealBegins);
        w
    }

    pub(crate) fn log(&mut self, text: impl FnOnce() -> String) {
        if self.setup.record {
            let line = format!("{:>9.3} ms  {}", self.now as f64 / 1000.0, text());
            self.history.push(line);
        }
    }

    pub(crate) fn push(&mut self, delay: u64, ev: Ev) {
        self.seq += 1;
        self.queue.push(Reverse(Item {
            at: self.now + delay,
            seq: self.seq,
            ev,
        }));
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn go(&mut self) {
        let end = self.setup.faults_us + self.setup.heal_us;
        let mut at_once = 0;
        while let Some(Reverse(item)) = self.queue.pop() {
            at_once = if item.at == self.now { at_once + 1 } else { 0 };
            if at_once > 20_000 {
                return self
                    .check
                    .fail("time stands still: something goes round in circles");
            }
            self.now = item.at;
            if self.check.wrong.is_some() || self.healed_us.is_some() {
                return;
            }
            if self.now > end {
                let states: Vec<String> = (0..2).map(|n| self.describe(n)).collect();
                self.check.fail(format!(
                    "not protected again {} s after the last fault: {}",
                    self.setup.heal_us / 1_000_000,
                    states.join("; ")
                ));
                return;
            }
            if let Some(node) = owner(&item.ev) {
                let thaw = self.nodes[node].frozen_until_us;
                if thaw > self.now {
                    self.seq += 1;
                    self.queue.push(Reverse(Item {
                        at: thaw,
                        seq: self.seq,
                        ev: item.ev,
                    }));
                    continue;
                }
            }
            self.step(item.ev);
            self.check_gates();
        }
    }

    fn describe(&self, n: usize) -> String {
        let node = &self.nodes[n];
        let status = node.daemon.as_ref().map(|d| d.engine.status());
        let view = status.map_or("no daemon".into(), |s| format!("{:?}: {}", s.safety, s.why));
        let rec = node.record.as_ref().map_or("no record".into(), |r| {
            format!(
                "{:?} {:?} term {} basis {}",
                r.role, r.status, r.term, r.basis
            )
        });
        format!("node {n}: {rec}, {view}")
    }

    /// Never two open gates with a guest behind each.
    fn check_gates(&mut self) {
        let open = |n: &Node| {
            let gate = n
                .replica
                .as_ref()
                .is_some_and(|r| r.gate == Gate::Open && r.attached);
            gate && n.guest.as_ref().is_some_and(|g| g.running)
        };
        if open(&self.nodes[0]) && open(&self.nodes[1]) {
            self.check.fail("two open gates");
        }
    }

    fn step(&mut self, ev: Ev) {
        match ev {
            Ev::Boot { node } => self.boot(node),
            Ev::DaemonStart { node, boot } => self.start_daemon(node, boot),
            Ev::Deliver {
                node,
                session,
                event,
            } => self.deliver(node, Some(session), event),
            Ev::Message { node, envelope } => self.deliver(node, None, Event::Message(envelope)),
            Ev::Tick { node, session } => {
                if let Some(d) = self.nodes[node]
                    .daemon
                    .as_mut()
                    .filter(|d| d.session == session)
                {
                    d.tick_us = None;
                    self.deliver(node, Some(session), Event::Tick);
                }
            }
            Ev::Beat { node, session } => self.beat(node, session),
            Ev::Order { node, rid, order } => self.obey(node, rid, order),
            Ev::ReplicaUp { node, boot } => self.replica_up(node, boot),
            Ev::ReplicaGone { node, rid } => self.end_replica(node, rid),
            Ev::Epoch { node, rid } => self.epoch(node, rid),
            Ev::Packet { node, packet } => self.packet(node, packet),
            Ev::GuestUp {
                node,
                number,
                life,
                waiting,
            } => self.guest_up(node, number, life, waiting),
            Ev::GuestEnds {
                node,
                life,
                intended,
            } => self.guest_ends(node, life, intended),
            Ev::Flushed { node, rid, term } => self.flushed(node, rid, term),
            Ev::Ask {
                node,
                session,
                request,
                answer,
            } => self.ask(node, session, request, answer),
            Ev::NoAnswer { node, session } => {
                self.tell_session(node, session, Event::Witness(WitnessReply::NoAnswer));
            }
            Ev::Fault => self.fault(),
            Ev::HealBegins => self.heal_begins(),
            Ev::HealCheck => self.heal_check(),
            Ev::Heal { what } => self.heal(what),
        }
    }

    // ---- hosts and daemons ----

    pub(crate) fn boot(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        if n.up {
            return;
        }
        n.up = true;
        n.boot += 1;
        let boot = n.boot;
        self.log(|| format!("node {node}: boots"));
        let delay = self.rng.range(5, 200) * MS;
        self.push(delay, Ev::DaemonStart { node, boot });
    }

    fn start_daemon(&mut self, node: usize, boot: u64) {
        if !self.nodes[node].up
            || self.nodes[node].boot != boot
            || self.nodes[node].daemon.is_some()
        {
            return;
        }
        let session = self.number();
        let id = Identity {
            me: node_id(node),
            peer: node_id(1 - node),
            guest: guest_name(),
            at_home: node == 0,
        };
        let engine = Engine::new(id, settings());
        #[cfg(feature = "mutations")]
        let engine = {
            let mut engine = engine;
            if let Some(m) = self.setup.mutation {
                engine.mutate(m);
            }
            engine
        };
        let now = self.now;
        let n = &mut self.nodes[node];
        n.starting = None;
        n.daemon = Some(Daemon {
            session,
            engine,
            detector: Detector::new(DetectorSettings::default(), 2),
            started_us: now,
            tick_us: None,
            beats: 0,
        });
        let running = n.guest.as_ref().is_some_and(|g| g.running);
        let started = Started {
            record: n.record.clone().map_or(Found::Absent, Found::Loaded),
            replica: n.replica.as_ref().map(|r| r.state(running)),
            life: n.guest.as_ref().map(|g| g.life),
            waiting: n.guest.as_ref().is_some_and(|g| g.waiting),
            ended_on_purpose: std::mem::take(&mut n.ended_on_purpose),
        };
        let fresh = n.record.is_none();
        self.log(|| format!("node {node}: havmd starts"));
        self.deliver(node, Some(session), Event::Started(Box::new(started)));
        if fresh {
            let op = if node == 0 {
                Operator::InitPrimary
            } else {
                Operator::InitStandby
            };
            self.deliver(node, Some(session), Event::Operator(op));
        }
        self.push(0, Ev::Beat { node, session });
    }

    /// Ends the daemon only; guest and replicator live on.
    pub(crate) fn kill_daemon(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        let boot = n.boot;
        if n.daemon.take().is_some() {
            self.log(|| format!("node {node}: havmd dies"));
            let delay = self.rng.range(20, 2_500) * MS;
            self.push(delay, Ev::DaemonStart { node, boot });
        }
    }

    /// The host loses power.
    pub(crate) fn power_off(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        if !n.up {
            return;
        }
        n.up = false;
        n.boot += 1;
        if n.replica
            .as_ref()
            .is_some_and(|r| r.recv.as_ref().is_some_and(|v| v.complete))
        {
            // A standby's commits are durable now and then only (ack=memory).
            n.disk.now = n.disk.flushed;
        }
        n.daemon = None;
        n.replica = None;
        n.guest = None;
        n.starting = None;
        n.frozen_until_us = 0;
        n.ended_on_purpose = false;
        if n.disk.now.is_some() && n.unflushed {
            n.disk.now = n.disk.flushed;
        }
        self.nodes[node].unflushed = false;
        self.log(|| format!("node {node}: power off"));
    }

    fn beat(&mut self, node: usize, session: u64) {
        if self.nodes[node]
            .daemon
            .as_ref()
            .is_none_or(|d| d.session != session)
        {
            return;
        }
        let peer = &self.nodes[1 - node];
        let peer_there = peer.up && peer.frozen_until_us <= self.now;
        let peer_beats = peer.daemon.as_ref().map(|d| (d.session, d.beats));
        let links = self.links[1 - node];
        let lossy = self.faulty;
        let lost = [
            lossy && self.rng.chance(5, 100),
            lossy && self.rng.chance(5, 100),
        ];
        let now = Duration::from_micros(self.now);
        let witness = self.nodes[node].sees_witness.then_some(self.incarnation);
        let Some(d) = self.nodes[node].daemon.as_mut() else {
            return;
        };
        d.beats += 1;
        let poll_witness = d.beats % 25 == 1;
        if let (true, Some((session, seq))) = (peer_there, peer_beats) {
            for (link, up) in links.iter().enumerate() {
                if *up && !lost[link] {
                    d.detector.beat(
                        link,
                        Beat {
                            session,
                            seq,
                            rtt: None,
                        },
                        now,
                    );
                }
            }
        }
        let (verdict, new) = d.detector.poll(now);
        if new {
            self.log(|| format!("node {node}: peer {verdict:?}"));
            self.deliver(node, Some(session), Event::Peer(verdict));
        }
        if poll_witness {
            self.deliver(node, Some(session), Event::WitnessSeen(witness));
        }
        self.push(BEAT_US, Ev::Beat { node, session });
    }

    /// An event for the daemon that runs now, after a moment.
    pub(crate) fn tell(&mut self, node: usize, event: Event) {
        if let Some(session) = self.nodes[node].daemon.as_ref().map(|d| d.session) {
            let delay = self.rng.range(20, 400);
            // In order: the control socket and the daemon's own queue keep it.
            let _ = delay;
            self.push(
                100,
                Ev::Deliver {
                    node,
                    session,
                    event,
                },
            );
        }
    }

    fn tell_session(&mut self, node: usize, session: u64, event: Event) {
        if self.nodes[node]
            .daemon
            .as_ref()
            .is_some_and(|d| d.session == session)
        {
            self.deliver(node, Some(session), event);
        }
    }

    pub(crate) fn report(&mut self, node: usize, report: Report) {
        self.tell(node, Event::Report(report));
    }

    pub(crate) fn deliver(&mut self, node: usize, session: Option<u64>, event: Event) {
        let ids = Ids {
            life: LifeId(self.rng.id()),
            generation: GenId(self.rng.id()),
        };
        let now = self.now;
        if !self.nodes[node].up {
            return;
        }
        let Some(d) = self.nodes[node].daemon.as_mut() else {
            return;
        };
        if session.is_some_and(|s| s != d.session) {
            return;
        }
        let session = d.session;
        let quiet = matches!(
            event,
            Event::Tick | Event::WitnessSeen(_) | Event::Report(Report::State(_))
        );
        let line = (self.setup.record && !quiet).then(|| format!("node {node}: <- {event:?}"));
        let at = Duration::from_micros(now - d.started_us);
        let commands = d.engine.handle(event, at, ids);
        if let Some(line) = line {
            self.log(|| line);
        }
        self.carry_out(node, session, commands);
        self.schedule_tick(node, session);
    }

    fn schedule_tick(&mut self, node: usize, session: u64) {
        let now = self.now;
        let Some(d) = self.nodes[node]
            .daemon
            .as_mut()
            .filter(|d| d.session == session)
        else {
            return;
        };
        let Some(deadline) = d.engine.next_deadline() else {
            return;
        };
        let at = (d.started_us + deadline.as_micros() as u64).max(now);
        if d.tick_us.is_none_or(|t| t > at) {
            d.tick_us = Some(at);
            self.push(at - now, Ev::Tick { node, session });
        }
    }

    fn carry_out(&mut self, node: usize, session: u64, commands: Vec<Command>) {
        for c in commands {
            // A crash between any two commands.
            if self.faulty
                && self.allowed(crate::faults::Fault::MidCommand)
                && self.rng.chance(1, 400)
            {
                if self.rng.chance(1, 3) {
                    self.power_off(node);
                    let delay = self.rng.range(100, 6_000) * MS;
                    self.push(delay, Ev::Boot { node });
                } else {
                    self.kill_daemon(node);
                }
                return;
            }
            if self.nodes[node]
                .daemon
                .as_ref()
                .is_none_or(|d| d.session != session)
            {
                return;
            }
            if self.setup.record {
                let text = format!("node {node}: -> {c:?}");
                self.log(|| text);
            }
            if !self.command(node, session, c) {
                return;
            }
        }
    }

    fn command(&mut self, node: usize, session: u64, c: Command) -> bool {
        match c {
            Command::Persist(rec) => {
                if self.faulty
                    && self.allowed(crate::faults::Fault::Persist)
                    && self.rng.chance(1, 100)
                {
                    // It may have reached the disk in spite of the error.
                    if self.rng.chance(1, 2) {
                        self.store(node, *rec);
                    }
                    let event = Event::PersistFailed {
                        why: "disk full".into(),
                    };
                    self.deliver(node, Some(session), event);
                    return false;
                }
                self.store(node, *rec);
            }
            Command::Forget => self.nodes[node].record = None,
            Command::Send(envelope) => self.send_message(node, envelope),
            Command::Order(order) => {
                if let Some(r) = &self.nodes[node].replica {
                    let rid = r.rid;
                    self.push(150, Ev::Order { node, rid, order });
                }
            }
            Command::StartReplicator => {
                let boot = self.nodes[node].boot;
                let delay = self.rng.range(5, 60) * MS;
                self.push(delay, Ev::ReplicaUp { node, boot });
            }
            Command::StopReplicator => match self.nodes[node].replica.as_ref().map(|r| r.rid) {
                Some(rid) => {
                    let delay = self.rng.range(1, 40) * MS;
                    self.push(delay, Ev::ReplicaGone { node, rid });
                }
                None => self.tell(node, Event::ReplicatorLost),
            },
            Command::StartGuest { life } => self.start_guest(node, life, false),
            Command::StartStandbyGuest { life } => self.start_guest(node, life, true),
            Command::KillGuest => {
                self.nodes[node].starting = None;
                self.nodes[node].guest = None;
                self.tell(node, Event::GuestKilled);
            }
            Command::ShutdownGuest => {
                if let Some(life) = self.nodes[node].guest.as_ref().map(|g| g.life) {
                    let delay = self.rng.range(5, 300) * MS;
                    self.push(
                        delay,
                        Ev::GuestEnds {
                            node,
                            life,
                            intended: true,
                        },
                    );
                }
            }
            Command::Witness(request) => self.send_to_witness(node, session, request),
            Command::Fence(_) | Command::Notice(_) => {}
        }
        true
    }

    fn store(&mut self, node: usize, rec: havm_core::record::Record) {
        let old = self.nodes[node].record.clone();
        self.check.persist(node, old.as_ref(), &rec);
        self.nodes[node].record = Some(rec);
    }

    fn start_guest(&mut self, node: usize, life: LifeId, waiting: bool) {
        if self.nodes[node].guest.is_some() {
            self.check.fail(format!(
                "node {node}: a guest is started beside a living one"
            ));
        }
        let number = self.number();
        self.nodes[node].starting = Some(number);
        let delay = self.rng.range(30, 300) * MS;
        self.push(
            delay,
            Ev::GuestUp {
                node,
                number,
                life,
                waiting,
            },
        );
    }

    fn guest_up(&mut self, node: usize, number: u64, life: LifeId, waiting: bool) {
        if self.nodes[node].starting != Some(number) {
            return;
        }
        self.nodes[node].starting = None;
        if self.faulty && self.rng.chance(1, 30) {
            self.tell(node, Event::GuestStartFailed { why: "no".into() });
            return;
        }
        let mut point = None;
        if !waiting {
            let Some(disk) = self.nodes[node].disk.now else {
                return self.check.fail(format!(
                    "node {node}: the guest was started from an inconsistent disk"
                ));
            };
            point = Some(self.check.grow(Some(disk)));
        }
        self.nodes[node].guest = Some(Guest {
            life,
            waiting,
            running: false,
            point,
            down: false,
        });
        self.tell(node, Event::GuestStarted { life });
    }

    pub(crate) fn guest_ends(&mut self, node: usize, life: LifeId, intended: bool) {
        let n = &mut self.nodes[node];
        if n.guest.as_ref().is_none_or(|g| g.life != life) {
            return;
        }
        n.guest = None;
        if n.daemon.is_none() {
            n.ended_on_purpose = intended;
        }
        if let Some(r) = n.replica.as_mut() {
            r.attached = false;
        }
        self.log(|| format!("node {node}: the guest's process ends (intended: {intended})"));
        self.tell(node, Event::GuestLost { intended });
    }

    fn replica_up(&mut self, node: usize, boot: u64) {
        let now = self.now;
        if self.nodes[node].boot != boot || !self.nodes[node].up {
            return;
        }
        if self.nodes[node].replica.is_none() {
            let rid = self.number();
            self.nodes[node].replica = Some(Replica::new(rid, now));
            self.push(EPOCH_US, Ev::Epoch { node, rid });
        }
        let running = self.nodes[node].guest.as_ref().is_some_and(|g| g.running);
        if let Some(r) = &self.nodes[node].replica {
            let state = r.state(running);
            self.tell(node, Event::ReplicatorUp(Box::new(state)));
        }
    }

    pub(crate) fn end_replica(&mut self, node: usize, rid: u64) {
        if self.nodes[node]
            .replica
            .as_ref()
            .is_some_and(|r| r.rid == rid)
        {
            self.nodes[node].replica = None;
            self.log(|| format!("node {node}: the replicator ends"));
            self.tell(node, Event::ReplicatorLost);
        }
    }

    // ---- network and witness ----

    pub(crate) fn can_pass(&self, from: usize) -> bool {
        self.links[from].iter().any(|l| *l)
    }

    fn send_message(&mut self, from: usize, envelope: Envelope) {
        if !self.can_pass(from) || (self.faulty && self.rng.chance(5, 100)) {
            return;
        }
        let copies = if self.faulty && self.rng.chance(10, 100) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let mut delay = self.rng.range(100, 3_000);
            if self.faulty && self.rng.chance(4, 100) {
                delay += self.rng.range(10, 3_000) * MS;
            }
            self.push(
                delay,
                Ev::Message {
                    node: 1 - from,
                    envelope: envelope.clone(),
                },
            );
        }
    }

    pub(crate) fn send_packet(&mut self, from: usize, packet: Packet) {
        if !self.can_pass(from) {
            return;
        }
        let mut delay = self.rng.range(100, 2_000);
        if self.faulty && self.rng.chance(3, 100) {
            delay += self.rng.range(5, 400) * MS;
        }
        self.push(
            delay,
            Ev::Packet {
                node: 1 - from,
                packet,
            },
        );
    }

    fn send_to_witness(&mut self, node: usize, session: u64, request: WitnessRequest) {
        if !self.nodes[node].sees_witness {
            let event = Event::Witness(WitnessReply::NotDelivered);
            self.push(
                2 * MS,
                Ev::Deliver {
                    node,
                    session,
                    event,
                },
            );
            return;
        }
        let trip = self.rng.range(200, 4_000);
        if self.faulty && self.rng.chance(10, 100) {
            // Lost on the way there or back, or late by far: in any case no answer in time.
            if self.rng.chance(2, 3) {
                let late = self.rng.range(1, 4_000) * MS;
                self.push(
                    late,
                    Ev::Ask {
                        node,
                        session,
                        request,
                        answer: false,
                    },
                );
            }
            self.push(250 * MS, Ev::NoAnswer { node, session });
            return;
        }
        self.push(
            trip,
            Ev::Ask {
                node,
                session,
                request,
                answer: true,
            },
        );
    }

    fn ask(&mut self, node: usize, session: u64, req: WitnessRequest, answer: bool) {
        if self.setup.lie == Some(Lie::WitnessForgets) && self.rng.chance(1, 3) {
            self.register = Register::default();
        }
        if req.incarnation != self.incarnation {
            if answer {
                let reply = WitnessReply::WrongIncarnation {
                    incarnation: self.incarnation,
                };
                let event = Event::Witness(reply);
                self.push(
                    MS,
                    Ev::Deliver {
                        node,
                        session,
                        event,
                    },
                );
            }
            return;
        }
        let me = Some(node_id(node));
        let reg = self.register;
        let again = reg.term == req.term && reg.holder == me;
        let twice = self.setup.lie == Some(Lie::WitnessGrantsTwice) && reg.term <= req.term;
        let granted =
            reg.term <= req.basis || (reg.holder == me && reg.term < req.term) || again || twice;
        if granted {
            self.register = Register {
                term: req.term,
                holder: me,
            };
        }
        self.log(|| format!("witness: node {node} asks for term {} (basis {}): granted {granted}, register was {reg:?}, answer {answer}", req.term, req.basis));
        if !answer {
            return;
        }
        let reply = if granted {
            WitnessReply::Granted {
                term: req.term,
                holder: node_id(node),
                incarnation: self.incarnation,
            }
        } else {
            WitnessReply::Refused {
                asked: req.term,
                term: reg.term,
                holder: reg.holder,
            }
        };
        let trip = self.rng.range(200, 4_000);
        self.push(
            trip,
            Ev::Deliver {
                node,
                session,
                event: Event::Witness(reply),
            },
        );
    }

    // ---- healing ----

    fn heal_begins(&mut self) {
        self.faulty = false;
        self.last_fault_us = self.now;
        self.links = [[true; 2]; 2];
        for node in 0..2 {
            self.nodes[node].sees_witness = true;
            self.nodes[node].frozen_until_us =
                self.nodes[node].frozen_until_us.min(self.now + 100 * MS);
            if !self.nodes[node].up {
                self.push(100 * MS, Ev::Boot { node });
            }
        }
        self.log(|| "---- the faults stop ----".into());
        self.push(500 * MS, Ev::HealCheck);
    }

    fn heal_check(&mut self) {
        let mut safe = 0;
        let mut primaries = 0;
        let mut moving = false;
        for node in 0..2 {
            let Some(d) = self.nodes[node].daemon.as_ref() else {
                continue;
            };
            let session = d.session;
            let s = d.engine.status();
            safe += usize::from(s.safety == Safety::Safe);
            primaries += usize::from(s.runs_here);
            moving |= s.moving;
            let stopped = s.safety == Safety::Stopped && s.intent == Some(Intent::Stopped);
            // Rule 7: a host that failed before the flush after a promotion. Only an operator
            // starts from such a disk, and knows that acked writes may be missing.
            let suspect =
                s.safety == Safety::Down && s.why.contains("may lack acknowledged writes");
            if suspect && self.now > self.last_fault_us + 3_000 * MS {
                self.check.forget_line();
            }
            if stopped || (suspect && self.now > self.last_fault_us + 3_000 * MS) {
                self.deliver(node, Some(session), Event::Operator(Operator::Start));
            }
        }
        let flows = self.now.saturating_sub(self.check.last_release_us) < 4 * EPOCH_US;
        if safe == 2 && primaries == 1 && !moving && flows {
            self.healed_us = Some(self.now);
            return;
        }
        self.push(500 * MS, Ev::HealCheck);
    }
}

/// On whose processor an event happens; none for the world's own.
fn owner(ev: &Ev) -> Option<usize> {
    match ev {
        Ev::Deliver { node, .. }
        | Ev::Message { node, .. }
        | Ev::Tick { node, .. }
        | Ev::Beat { node, .. }
        | Ev::Order { node, .. }
        | Ev::ReplicaUp { node, .. }
        | Ev::ReplicaGone { node, .. }
        | Ev::Epoch { node, .. }
        | Ev::Packet { node, .. }
        | Ev::GuestUp { node, .. }
        | Ev::GuestEnds { node, .. }
        | Ev::Flushed { node, .. }
        | Ev::NoAnswer { node, .. }
        | Ev::DaemonStart { node, .. } => Some(*node),
        Ev::Boot { .. }
        | Ev::Ask { .. }
        | Ev::Fault
        | Ev::HealBegins
        | Ev::HealCheck
        | Ev::Heal { .. } => None,
    }
}

/// The mode in which a replicator counts as a running primary's.
pub(crate) fn primary_mode(m: Mode) -> bool {
    matches!(
        m,
        Mode::Solo | Mode::Syncing | Mode::Protected | Mode::Attached
    )
}
