//! One guest on one node: events in, commands out.
//!
//! The durable [`Record`] says what was promised; everything else here may be lost at any time and
//! is found again at start (rule 11). Each event first changes what is known, then
//! [`Engine::advance`] drives the local processes one step nearer to what the record asks for:
//!
//! ```text
//!   solo        replicator -> guest (paused) -> attach -> open gate, run -> Hello … Join -> stream
//!               -> synced -> close gate, persist protected, Protect, arm
//!   ineligible  (Hello) kill guest, persist -> fresh replicator -> waiting QEMU -> attach
//!               -> receive -> Join -> image complete + Protect -> persist eligible, confirm
//!   protected   peer gone: ask the arbiter -> take | frozen | gated
//!               standby in trouble: ask it to yield -> take; guest lost: yield -> the standby takes
//!   eligible    primary gone: wait a moment, ask the arbiter -> take: seal, persist solo, promote
//! ```

mod adopt;
mod hand;
mod local;
mod mutation;
mod operator;
mod primary;
mod processes;
mod seek;
mod standby;
mod view;
mod words;

pub use mutation::Mutation;

use crate::command::{Command, Notice, NoticeKind, Severity, WitnessRequest};
use crate::event::{Event, Ids, Peer};
use crate::evidence::Stream;
use crate::failback::Failback;
use crate::ids::{GuestName, Incarnation, LifeId, NodeId, Term};
use crate::order::{Order, ReplicaState};
use crate::record::{Arbiter, Intent, Record, Role, RoleStatus};
use crate::role;
use crate::settings::Settings;
use crate::status::Safety;
use crate::timer::{Timer, Timers};
use std::collections::VecDeque;
use std::time::Duration;

/// At most so many events wait while the record cannot be written; beyond it the oldest goes,
/// which is as if a message or report was lost.
const MAX_WAITING: usize = 1024;

/// Who this engine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// This node.
    pub me: NodeId,
    /// The other node of the pair.
    pub peer: NodeId,
    /// The guest.
    pub guest: GuestName,
    /// This node is the guest's home.
    pub at_home: bool,
}

/// The replicator's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rep {
    Down,
    Starting,
    Up,
    Stopping,
}

/// The guest's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Qemu {
    None,
    Starting,
    Up,
    Killing,
}

/// Whether the replicator holds the guest's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attach {
    No,
    Asked,
    Done,
}

/// A primary's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// None was started.
    Idle,
    /// A stream to this life was started.
    Syncing(LifeId),
    /// It has all but the last small epoch.
    Synced(LifeId),
    /// Protected is durable; the first eligible ack is awaited since.
    Armed(Duration),
    /// Acks come.
    Protected,
    /// It cannot be mended.
    Broken,
}

/// An old primary's steps of a handover.
#[derive(Debug, Clone, PartialEq)]
enum Hand {
    No,
    /// The replicator was ordered.
    Ordered,
    /// vCPUs stand; Hand is repeated.
    Sent(crate::message::Body),
}

/// A standby's steps of a handover.
#[derive(Debug, Clone, PartialEq)]
struct TakeOver {
    term: Term,
    n: crate::ids::EpochNo,
    ports: Vec<std::net::SocketAddr>,
}

/// The image moves from the old primary's QEMU into a waiting one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    No,
    /// Until `ImageHeld`.
    Holding,
    /// The old QEMU is killed, the new one started and attached; until `Ready`.
    Swapping,
}

/// What a primary's Hello said, for a node that rejoins it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Target {
    term: Term,
    generation: crate::record::Generation,
    intent: Intent,
    life: Option<LifeId>,
}

/// The last word of the peer about itself.
#[derive(Debug, Clone, Copy, PartialEq)]
struct PeerWord {
    basis: Term,
    role: Role,
    active: bool,
    life: Option<LifeId>,
}

/// A wish that the standby yields.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ask {
    since: Duration,
    /// Only the stream's silence made it: taken back when the stream lives again.
    silence: bool,
}

/// The engine of one guest.
#[derive(Debug, Clone)]
pub struct Engine {
    id: Identity,
    set: Settings,
    now: Duration,
    ids: Ids,
    out: Vec<Command>,
    timers: Timers,
    started: bool,
    rec: Option<Record>,
    unusable: Option<String>,
    /// The highest term that anybody named.
    seen_term: Term,

    rep: Rep,
    rep_fresh: bool,
    replica: Option<ReplicaState>,
    qemu: Qemu,
    /// The guest's process waits for a migration, or did before it was promoted.
    waiting: bool,
    attach: Attach,
    life: Option<LifeId>,
    crashes: u32,
    last_crash: Duration,

    gate_open: bool,
    running: bool,
    link: Link,
    frozen: bool,
    conflict: Option<String>,
    unprotecting: bool,
    /// The disk may lack acked writes (`cold` is false, and the host may have been booted): only
    /// an operator starts a guest from it.
    disk_suspect: bool,

    join: Option<Target>,
    rejoin: Option<Target>,
    receive_asked: bool,
    ports: Option<Vec<std::net::SocketAddr>>,
    image_ready: bool,
    told: Option<(Arbiter, LifeId)>,
    sealed: bool,
    sealed_at: Option<crate::ids::EpochNo>,
    moving: Move,
    promoting: bool,
    /// Promote as soon as the image is in a waiting QEMU.
    promote_due: Option<crate::order::PromoteAs>,

    peer: Peer,
    peer_word: Option<PeerWord>,
    stream: Stream,
    witness: Option<Incarnation>,
    in_flight: Option<WitnessRequest>,
    fence_asked: bool,
    /// A request may have reached the arbiter, and no answer came.
    open: bool,
    refused: bool,
    unreachable: bool,
    cold_due: bool,
    hand_due: bool,
    ask: Option<Ask>,
    /// Since when the standby's daemon says that its copy is lost, while the stream lives.
    doubt: Option<Duration>,
    hand: Hand,
    take_over: Option<TakeOver>,
    confirming: bool,
    failback: Failback,
    automatic_move: bool,
    last_hello: Option<Duration>,

    /// Commands from the failed `Persist` on, to be tried again.
    fault: Option<Vec<Command>>,
    /// Role and basis before the last `Persist`: what is durable when it fails.
    before: Option<(Role, Term)>,
    last_tail: Vec<Command>,
    waiting_events: VecDeque<Event>,
    said: Option<NoticeKind>,
    safety: (Safety, Duration),
    mutation: Option<Mutation>,
}

impl Engine {
    /// A new engine; its first event must be [`Event::Started`].
    pub fn new(id: Identity, set: Settings) -> Engine {
        let zero = Ids {
            life: LifeId([0; 16]),
            generation: crate::ids::GenId([0; 16]),
        };
        Engine {
            id,
            set,
            now: Duration::ZERO,
            ids: zero,
            out: vec![],
            timers: Timers::default(),
            started: false,
            rec: None,
            unusable: None,
            seen_term: Term(0),
            rep: Rep::Down,
            rep_fresh: false,
            replica: None,
            qemu: Qemu::None,
            waiting: false,
            attach: Attach::No,
            life: None,
            crashes: 0,
            last_crash: Duration::ZERO,
            gate_open: false,
            running: false,
            link: Link::Idle,
            frozen: false,
            conflict: None,
            unprotecting: false,
            disk_suspect: false,
            join: None,
            rejoin: None,
            receive_asked: false,
            ports: None,
            image_ready: false,
            told: None,
            sealed: false,
            sealed_at: None,
            moving: Move::No,
            promoting: false,
            promote_due: None,
            peer: Peer::Suspect,
            peer_word: None,
            stream: Stream::None,
            witness: None,
            in_flight: None,
            fence_asked: false,
            open: false,
            refused: false,
            unreachable: false,
            cold_due: false,
            hand_due: false,
            ask: None,
            doubt: None,
            hand: Hand::No,
            take_over: None,
            confirming: false,
            failback: Failback::default(),
            automatic_move: false,
            last_hello: None,
            fault: None,
            before: None,
            last_tail: vec![],
            waiting_events: VecDeque::new(),
            said: None,
            safety: (Safety::Absent, Duration::ZERO),
            mutation: None,
        }
    }

    /// The record as it is (or is being made) durable.
    pub fn record(&self) -> Option<&Record> {
        self.rec.as_ref()
    }

    /// When to deliver [`Event::Tick`] at the latest; none while nothing is awaited.
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.fault.is_some() {
            return self.timers.get(Timer::Persist);
        }
        if !self.waiting_events.is_empty() {
            return Some(self.now);
        }
        self.timers.next()
    }

    /// Takes one event in; the commands are to be carried out in order (see [`crate::command`]).
    /// `now` is the time since the daemon's start and never goes back.
    pub fn handle(&mut self, event: Event, now: Duration, ids: Ids) -> Vec<Command> {
        self.now = self.now.max(now);
        self.ids = ids;
        self.out.clear();
        match event {
            Event::PersistFailed { why } => self.on_persist_failed(why),
            event if self.fault.is_some() => {
                self.wait_with(event);
                if self
                    .timers
                    .get(Timer::Persist)
                    .is_none_or(|at| at <= self.now)
                {
                    self.retry_persist();
                }
            }
            event => {
                let event = if self.waiting_events.is_empty() {
                    event
                } else {
                    self.wait_with(event);
                    self.waiting_events.pop_front().unwrap_or(Event::Tick)
                };
                self.dispatch(event);
                while let Some(t) = self.timers.take_due(self.now) {
                    self.on_timer(t);
                }
                self.advance();
            }
        }
        self.note_safety();
        let out = std::mem::take(&mut self.out);
        let tail = out.iter().position(|c| matches!(c, Command::Persist(_)));
        self.last_tail = tail.map_or(vec![], |i| out[i..].to_vec());
        out
    }

    fn wait_with(&mut self, event: Event) {
        if event == Event::Tick {
            return;
        }
        if self.waiting_events.len() == MAX_WAITING {
            self.waiting_events.pop_front();
        }
        self.waiting_events.push_back(event);
    }

    fn dispatch(&mut self, event: Event) {
        if !self.started && !matches!(event, Event::Started(_)) {
            return;
        }
        match event {
            Event::Started(s) => self.on_started(*s),
            Event::Message(env) => self.on_message(env),
            Event::Peer(p) => self.on_peer(p),
            Event::Report(r) => self.on_report(r),
            Event::ReplicatorUp(state) => self.on_replicator_up(*state),
            Event::ReplicatorLost => self.on_replicator_lost(),
            Event::GuestStarted { life } => self.on_guest_started(life),
            Event::GuestStartFailed { why } => self.on_guest_start_failed(&why),
            Event::GuestLost { intended } => self.on_guest_lost(intended),
            Event::GuestKilled => self.on_guest_killed(),
            Event::Witness(reply) => self.on_witness(reply),
            Event::WitnessSeen(seen) => self.on_witness_seen(seen),
            Event::Fence(outcome) => self.on_fence(outcome),
            Event::Operator(op) => self.on_operator(op),
            Event::PersistFailed { .. } | Event::Tick => {}
        }
    }

    fn on_timer(&mut self, t: Timer) {
        match t {
            Timer::Hello => self.on_hello_timer(),
            Timer::Resend => self.on_resend_timer(),
            Timer::Arbiter => self.ask_arbiter(),
            Timer::StreamGrace => self.on_stream_grace(),
            Timer::Hand => self.on_hand_timer(),
            Timer::Cold => {
                self.cold_due = true;
                self.ask_arbiter();
            }
            Timer::Failback => self.on_failback_timer(),
            Timer::SoloStart | Timer::Restart | Timer::Persist => {}
        }
    }

    /// One step nearer to what the record asks for. Called after every event.
    fn advance(&mut self) {
        if !self.started || self.conflict.is_some() {
            return;
        }
        self.consider();
        self.drive();
    }

    // ---- the record ----

    fn is(&self, role: Role, status: RoleStatus) -> bool {
        self.rec
            .as_ref()
            .is_some_and(|r| (r.role, r.status) == (role, status))
    }

    fn term(&self) -> Term {
        self.rec.as_ref().map_or(Term(0), |r| r.term)
    }

    fn basis(&self) -> Term {
        self.rec.as_ref().map_or(Term(0), |r| r.basis)
    }

    fn intent(&self) -> Intent {
        self.rec.as_ref().map_or(Intent::Run, |r| r.intent)
    }

    /// The copy here is the one that the record names.
    fn warm(&self) -> bool {
        let named = self.rec.as_ref().and_then(|r| r.lives).map(|l| l.mine);
        named.is_some() && named == self.life
    }

    fn peer_life(&self) -> Option<LifeId> {
        self.rec.as_ref().and_then(|r| r.lives).map(|l| l.peer)
    }

    /// Changes the record and makes it durable, before anything that it justifies.
    fn persist(&mut self, new: Record) {
        assert!(
            role::allowed(self.rec.as_ref(), &new),
            "prohibited edge from {:?} to {new:?}",
            self.rec
        );
        if self.rec.as_ref() == Some(&new) {
            return;
        }
        self.before = self.rec.as_ref().map(|r| (r.role, r.basis));
        self.rec = Some(new.clone());
        self.unusable = None;
        self.out.push(Command::Persist(Box::new(new)));
    }

    fn change(&mut self, f: impl FnOnce(&mut Record)) {
        if let Some(mut r) = self.rec.clone() {
            f(&mut r);
            self.persist(r);
        }
    }

    fn on_persist_failed(&mut self, why: String) {
        let text = format!(
            "the guest's record could not be written ({why}): its gate is closed until it can; make room or mend the state directory"
        );
        if self.fault.is_none() {
            self.fault = Some(std::mem::take(&mut self.last_tail));
        }
        // A protected gate lets out only what was acked, and needs no new promise for it. The order
        // names the durable term: the replicator must not hear of a higher one before it is.
        if let Some((Role::Solo, term)) = self.before {
            self.order(Order::CloseGate { term });
        }
        self.notice(NoticeKind::RecordFault, Severity::Alarm, text);
        self.timers
            .set(Timer::Persist, self.now + self.set.persist_retry);
    }

    /// The same commands again, from the failed `Persist` on; events wait until it is done.
    fn retry_persist(&mut self) {
        self.timers.stop(Timer::Persist);
        if let Some(tail) = self.fault.take() {
            self.out.extend(tail);
            let term = self.basis();
            if self.is(Role::Solo, RoleStatus::Active) && self.gate_open {
                // Ends a stream that had begun: the next Join starts another.
                if self.link != Link::Idle {
                    self.link = Link::Broken;
                }
                self.order(Order::OpenGate { term });
            }
        }
    }

    // ---- small tools ----

    fn order(&mut self, order: Order) {
        if self.rep == Rep::Up {
            self.out.push(Command::Order(order));
        }
    }

    fn notice(&mut self, kind: NoticeKind, severity: Severity, text: impl Into<String>) {
        self.said = Some(kind);
        self.out.push(Command::Notice(Notice {
            kind,
            severity,
            term: self.term(),
            text: text.into(),
        }));
    }

    /// As `notice`, but not twice in a row.
    fn notice_once(&mut self, kind: NoticeKind, severity: Severity, text: impl Into<String>) {
        if self.said != Some(kind) {
            self.notice(kind, severity, text);
        }
    }
}
