//! The main flows, event by event, with the exact list of commands for each: persist before you
//! speak, close before you persist, and nothing that was not asked for.

use havm_core::command::Command;
use havm_core::engine::{Engine, Identity};
use havm_core::event::{Event, Found, Ids, Operator, Peer, Started, WitnessReply};
use havm_core::ids::{EpochNo, GenId, Incarnation, LifeId, NodeId, StreamId, Term};
use havm_core::message::{Body, Envelope, Side};
use havm_core::order::{Counters, Mode, Order, ReplicaState, Report};
use havm_core::record::{Arbiter, Intent, Record, Role, RoleStatus};
use havm_core::settings::Settings;
use havm_core::status::Safety;
use std::net::SocketAddr;
use std::time::Duration;

const HOME: NodeId = NodeId([1; 16]);
const AWAY: NodeId = NodeId([2; 16]);
const WITNESS: Incarnation = Incarnation([9; 16]);

struct Node {
    engine: Engine,
    now_ms: u64,
    drawn: u8,
    peer: NodeId,
    record: Option<Record>,
    last: Option<Envelope>,
}

fn life(n: u8) -> LifeId {
    LifeId([n; 16])
}

fn ports() -> Vec<SocketAddr> {
    vec![SocketAddr::from(([127, 0, 0, 1], 7000))]
}

fn state(mode: Mode, life: Option<LifeId>, term: u64) -> ReplicaState {
    ReplicaState {
        version: 1,
        mode,
        term: Term(term),
        life,
        stream: None,
        acked: EpochNo(5),
        closed: EpochNo(5),
        running: mode != Mode::Idle,
        stream_alive: true,
        ports: ports(),
        ram_bytes: 0,
        vcpus: 1,
        disk_bytes: 0,
        sync: None,
        counters: Counters::default(),
    }
}

fn name(c: &Command) -> Option<String> {
    let order = |o: &Order| {
        let text = format!("{o:?}");
        text.split([' ', '{']).next().unwrap_or_default().to_owned()
    };
    Some(match c {
        Command::Persist(r) => {
            let status = match r.status {
                RoleStatus::Active => String::new(),
                s => format!(" {s:?}"),
            };
            format!("persist {:?}{status} {}/{}", r.role, r.term, r.basis)
        }
        Command::Send(e) => {
            let text = format!("{:?}", e.body);
            format!("say {}", text.split([' ', '{']).next().unwrap_or_default())
        }
        Command::Order(o) => order(o),
        Command::Notice(_) => return None,
        Command::Witness(r) => format!("ask witness for {}", r.term),
        c => {
            let text = format!("{c:?}");
            text.split([' ', '{']).next().unwrap_or_default().to_owned()
        }
    })
}

impl Node {
    fn new(me: NodeId) -> Node {
        let peer = if me == HOME { AWAY } else { HOME };
        let id = Identity {
            me,
            peer,
            guest: "web".parse().unwrap(),
            at_home: me == HOME,
        };
        let engine = Engine::new(id, Settings::default());
        let drawn = if me == HOME { 100 } else { 200 };
        Node {
            engine,
            now_ms: 0,
            drawn,
            peer,
            record: None,
            last: None,
        }
    }

    /// One event; what it led to, without notices.
    fn on(&mut self, event: Event) -> Vec<String> {
        self.drawn = self.drawn.wrapping_add(1);
        let ids = Ids {
            life: life(self.drawn),
            generation: GenId([self.drawn; 16]),
        };
        let out = self
            .engine
            .handle(event, Duration::from_millis(self.now_ms), ids);
        for c in &out {
            match c {
                Command::Persist(r) => self.record = Some((**r).clone()),
                Command::Send(e) => self.last = Some(e.clone()),
                _ => {}
            }
        }
        out.iter().filter_map(name).collect()
    }

    fn report(&mut self, r: Report) -> Vec<String> {
        self.on(Event::Report(r))
    }

    fn at(&mut self, ms: u64) -> Vec<String> {
        self.now_ms = ms;
        self.on(Event::Tick)
    }

    fn life(&self) -> LifeId {
        self.engine.status().life.expect("a life")
    }

    fn started(
        &mut self,
        record: Found,
        replica: Option<ReplicaState>,
        life: Option<LifeId>,
    ) -> Vec<String> {
        let waiting = matches!(
            replica.as_ref().map(|r| r.mode),
            Some(Mode::Receiving | Mode::Eligible)
        );
        self.on(Event::Started(Box::new(Started {
            record,
            replica,
            life,
            waiting,
            ended_on_purpose: false,
        })))
    }

    fn says(&self, to: Option<LifeId>, term: u64, body: Body, from_life: Option<LifeId>) -> Event {
        // As the peer of this node would say it.
        let from = self.peer;
        Event::Message(Envelope {
            guest: "web".parse().unwrap(),
            term: Term(term),
            from,
            from_life,
            to_life: to,
            body,
        })
    }
}

fn stream() -> StreamId {
    StreamId([7; 16])
}

/// A home node that runs the guest solo in term 1.
fn solo() -> Node {
    let mut n = Node::new(HOME);
    assert!(n.started(Found::Absent, None, None).is_empty());
    n.on(Event::Peer(Peer::Alive));
    n.on(Event::WitnessSeen(Some(WITNESS)));
    assert_eq!(
        n.on(Event::Operator(Operator::InitPrimary)),
        ["persist Solo 1/1", "say Hello", "StartReplicator"]
    );
    assert_eq!(
        n.on(Event::ReplicatorUp(Box::new(state(Mode::Idle, None, 0)))),
        ["StartGuest"]
    );
    let mine = n.life();
    assert_eq!(n.on(Event::GuestStarted { life: mine }), ["AttachPrimary"]);
    // The gate opens before the first instruction runs, under the durable record solo(1).
    assert_eq!(
        n.report(Report::Attached { life: mine }),
        ["OpenGate", "Run", "say Hello"]
    );
    n
}

const STANDBY: u8 = 77;

/// A home node whose guest is protected in term 1 by life STANDBY.
fn protected() -> Node {
    let mut n = solo();
    let mine = n.life();
    let join = n.says(
        Some(mine),
        1,
        Body::Join { ports: ports() },
        Some(life(STANDBY)),
    );
    assert_eq!(n.on(join.clone()), ["StartStream"]);
    assert!(
        n.on(join).is_empty(),
        "a repeated Join starts nothing again"
    );
    assert_eq!(n.engine.status().safety, Safety::Syncing);
    // Rule 3: gate closed, durable, told, and only then the eligible epoch.
    assert_eq!(
        n.report(Report::Synced { term: Term(1) }),
        ["CloseGate", "persist Protected 1/1", "say Protect", "Arm"]
    );
    assert_eq!(n.engine.status().safety, Safety::Changing);
    assert!(
        n.report(Report::Protected {
            term: Term(1),
            stream: stream(),
            n: EpochNo(3)
        })
        .is_empty()
    );
    assert_eq!(n.engine.status().safety, Safety::Safe);
    n
}

const PRIMARY: u8 = 66;

fn hello(n: &Node, term: u64, role: Role, active: bool) -> Event {
    let body = Body::Hello {
        basis: Term(term),
        role,
        active,
        intent: Intent::Run,
        generation: GenId([5; 16]),
        parent: GenId([4; 16]),
    };
    n.says(None, term, body, Some(life(PRIMARY)))
}

/// An away node that is the complete standby of life PRIMARY in term 1.
fn eligible() -> Node {
    let mut n = Node::new(AWAY);
    n.started(Found::Absent, None, None);
    n.on(Event::Peer(Peer::Alive));
    assert_eq!(
        n.on(Event::Operator(Operator::InitStandby)),
        ["persist Ineligible 1/1", "say Hello"]
    );
    let h = hello(&n, 1, Role::Solo, true);
    assert_eq!(n.on(h), ["persist Ineligible 1/1", "StartReplicator"]);
    assert_eq!(
        n.on(Event::ReplicatorUp(Box::new(state(Mode::Idle, None, 0)))),
        ["StartStandbyGuest"]
    );
    let mine = n.life();
    assert_eq!(n.on(Event::GuestStarted { life: mine }), ["AttachStandby"]);
    assert_eq!(n.report(Report::Attached { life: mine }), ["Receive"]);
    assert_eq!(
        n.report(Report::Listening {
            term: Term(1),
            ports: ports()
        }),
        ["say Join"]
    );
    let image = Report::EligibleImage {
        term: Term(1),
        stream: stream(),
        n: EpochNo(3),
    };
    assert!(n.report(image).is_empty(), "the arbiter is not known yet");
    let told = n.says(
        Some(mine),
        1,
        Body::Protect {
            arbiter: Arbiter::Witness(WITNESS),
        },
        Some(life(PRIMARY)),
    );
    assert_eq!(n.on(told), ["persist Eligible 1/1", "ConfirmEligible"]);
    let rec = n.record.as_ref().unwrap();
    assert_eq!(
        (rec.arbiter, rec.valid, rec.cold),
        (Arbiter::Witness(WITNESS), true, false)
    );
    assert_eq!(
        rec.lives.map(|l| (l.mine, l.peer)),
        Some((mine, life(PRIMARY)))
    );
    n
}

fn granted(term: u64, holder: NodeId) -> Event {
    Event::Witness(WitnessReply::Granted {
        term: Term(term),
        holder,
        incarnation: WITNESS,
    })
}

#[test]
fn a_guest_becomes_protected() {
    protected();
    eligible();
}

/// The failover: both signs silent, a short wait, the grant, then durable before the promotion.
#[test]
fn standby_takes_over() {
    let mut n = eligible();
    n.now_ms = 1_000;
    assert!(
        n.on(Event::Peer(Peer::Lost)).is_empty(),
        "the stream still lives"
    );
    assert!(
        n.report(Report::StreamSilent { term: Term(1) }).is_empty(),
        "the primary asks first"
    );
    assert_eq!(n.at(1_030), ["ask witness for 2"]);
    assert_eq!(
        n.on(granted(2, AWAY)),
        ["Seal", "persist Solo 2/2", "Promote"]
    );
    let promoted = Report::Promoted {
        term: Term(2),
        n: EpochNo(9),
        took_us: 9_000,
    };
    assert_eq!(n.report(promoted), ["say Hello"]);
    assert!(n.engine.status().runs_here);
    assert_eq!(
        n.report(Report::DiskFlushed { term: Term(2) }),
        ["persist Solo 2/2"]
    );
    assert!(n.record.as_ref().unwrap().cold);
}

/// Neither a restarted havmd nor a dead replicator of one guest is a reason to fail over.
#[test]
fn one_sign_is_not_enough() {
    let mut n = eligible();
    n.on(Event::Peer(Peer::Lost));
    assert!(n.at(60_000).is_empty());
    let mut n = eligible();
    n.report(Report::StreamSilent { term: Term(1) });
    assert!(n.at(60_000).is_empty());
}

/// A grant to the other node, in another term, or of another witness gives nothing.
#[test]
fn foreign_grants_are_void() {
    let other = Event::Witness(WitnessReply::Granted {
        term: Term(2),
        holder: AWAY,
        incarnation: Incarnation([8; 16]),
    });
    for reply in [granted(2, HOME), granted(3, AWAY), other] {
        let mut n = eligible();
        n.on(Event::Peer(Peer::Lost));
        n.report(Report::StreamSilent { term: Term(1) });
        n.at(1_000);
        assert!(n.on(reply).is_empty());
        assert_eq!(n.record.as_ref().unwrap().role, Role::Eligible);
    }
    // Without having asked.
    let mut n = eligible();
    assert!(n.on(granted(2, AWAY)).is_empty());
}

#[test]
fn primary_goes_on_alone_when_granted() {
    let mut n = protected();
    n.report(Report::StreamSilent { term: Term(1) });
    assert_eq!(n.on(Event::Peer(Peer::Lost)), ["ask witness for 2"]);
    assert_eq!(
        n.on(granted(2, HOME)),
        ["persist Solo 2/2", "StopStream", "OpenGate", "say Hello"]
    );
    assert_eq!(n.engine.status().safety, Safety::Exposed);
}

/// Refused: it falls silent, keeps its copy, and gives it up only when the other really runs.
#[test]
fn primary_freezes_when_refused_and_rejoins() {
    let mut n = protected();
    n.report(Report::StreamSilent { term: Term(1) });
    n.on(Event::Peer(Peer::Lost));
    let refused = WitnessReply::Refused {
        asked: Term(2),
        term: Term(2),
        holder: Some(AWAY),
    };
    assert_eq!(n.on(Event::Witness(refused)), ["Freeze", "say YieldAsk"]);
    assert_eq!(n.engine.status().safety, Safety::Down);
    let generation = n.record.as_ref().unwrap().generation.current;
    let hello = |n: &Node, active| {
        let body = Body::Hello {
            basis: Term(2),
            role: Role::Solo,
            active,
            intent: Intent::Run,
            generation: GenId([3; 16]),
            parent: generation,
        };
        n.says(None, 2, body, Some(life(STANDBY)))
    };
    let not_yet = hello(&n, false);
    assert!(
        n.on(not_yet).is_empty(),
        "the peer was granted the term, but does not run yet"
    );
    let runs = hello(&n, true);
    assert_eq!(n.on(runs), ["CloseGate", "Detach", "KillGuest"]);
    assert_eq!(
        n.on(Event::GuestKilled),
        ["persist Ineligible 2/2", "StopReplicator"]
    );
    assert!(!n.record.as_ref().unwrap().valid);
    assert_eq!(n.on(Event::ReplicatorLost), ["StartReplicator"]);
}

/// No witness, no yield: the guest is gated, nobody is promoted, and it heals with the link.
#[test]
fn gated_until_a_link_returns() {
    let mut n = protected();
    n.report(Report::StreamSilent { term: Term(1) });
    n.on(Event::Peer(Peer::Lost));
    assert!(n.on(Event::Witness(WitnessReply::NotDelivered)).is_empty());
    assert_eq!(n.engine.status().safety, Safety::Gated);
    assert_eq!(n.at(400), ["ask witness for 2"]);
    assert!(n.on(Event::Witness(WitnessReply::NotDelivered)).is_empty());
    n.report(Report::StreamAlive { term: Term(1) });
    n.on(Event::Peer(Peer::Alive));
    assert_eq!(n.engine.status().safety, Safety::Safe);
    assert!(n.at(60_000).is_empty());
}

/// Rule 7: an unanswered request is resolved before the standby acks again.
#[test]
fn standby_with_an_open_request_yields() {
    let mut n = eligible();
    n.on(Event::Peer(Peer::Lost));
    n.report(Report::StreamSilent { term: Term(1) });
    assert_eq!(n.at(100), ["ask witness for 2"]);
    assert_eq!(n.on(Event::Witness(WitnessReply::NoAnswer)), ["Seal"]);
    assert_eq!(
        n.on(Event::Peer(Peer::Alive)),
        [
            "say Hello",
            "Seal",
            "persist Eligible Yielded 2/1",
            "say Yield"
        ]
    );
    assert!(
        n.on(granted(2, AWAY)).is_empty(),
        "its claim is gone for good"
    );
}

#[test]
fn guest_crash_yields_to_the_standby() {
    let mut n = protected();
    let out = n.on(Event::GuestLost { intended: false });
    assert_eq!(
        out,
        [
            "Detach",
            "KillGuest",
            "StopReplicator",
            "persist Protected Yielded 2/1",
            "say Yield"
        ]
    );

    let mut s = eligible();
    let given = s.says(
        None,
        2,
        Body::Yield {
            basis: Term(1),
            side: Side::Primary,
        },
        None,
    );
    assert_eq!(s.on(given), ["Seal", "persist Solo 2/2", "Promote"]);
}

/// A stop on purpose is no failover: the standby is asked to give its claim up, and does.
#[test]
fn intended_stop() {
    let mut n = protected();
    let out = n.on(Event::GuestLost { intended: true });
    assert_eq!(
        out,
        [
            "Detach",
            "KillGuest",
            "StopReplicator",
            "persist Protected 1/1",
            "say YieldAsk"
        ]
    );
    assert_eq!(n.record.as_ref().unwrap().intent, Intent::Stopped);
    let mut s = eligible();
    let ask = s.says(None, 1, Body::YieldAsk { basis: Term(1) }, None);
    assert_eq!(
        s.on(ask),
        ["Seal", "persist Eligible Yielded 2/1", "say Yield"]
    );
    let given = n.says(
        None,
        2,
        Body::Yield {
            basis: Term(1),
            side: Side::Standby,
        },
        None,
    );
    n.on(Event::GuestKilled);
    assert_eq!(n.on(given), ["persist Solo 2/2", "say Hello"]);
    assert_eq!(n.engine.status().safety, Safety::Stopped);
    n.on(Event::ReplicatorLost);
    assert_eq!(
        n.on(Event::Operator(Operator::Start)),
        ["persist Solo 2/2", "say Hello", "StartReplicator"]
    );
}

/// A guest's own shutdown reaches the standby as a flag of an acked epoch: it never claims then.
#[test]
fn standby_of_a_guest_that_shut_down_does_not_claim() {
    let mut n = eligible();
    assert_eq!(
        n.report(Report::PeerGuestShutdown { term: Term(1) }),
        ["persist Eligible 1/1"]
    );
    n.on(Event::Peer(Peer::Lost));
    n.report(Report::StreamSilent { term: Term(1) });
    assert!(n.at(60_000).is_empty());
}

/// Rule 9, both sides: the guest is never unprotected, and no arbiter is asked.
#[test]
fn switchover() {
    let mut old = protected();
    assert_eq!(old.on(Event::Operator(Operator::Switchover)), ["HandOver"]);
    let handed = Report::HandedOver {
        term: Term(1),
        n: EpochNo(8),
        ports: ports(),
    };
    assert_eq!(
        old.report(handed),
        ["persist Protected Handing 2/1", "say Hand"]
    );

    let mut new = eligible();
    let mine = new.life();
    let hand = new.says(
        Some(mine),
        2,
        Body::Hand {
            n: EpochNo(8),
            ports: ports(),
        },
        Some(life(PRIMARY)),
    );
    assert_eq!(new.on(hand), ["Seal"]);
    assert_eq!(
        new.report(Report::Sealed {
            n: Some(EpochNo(8))
        }),
        ["persist Protected 2/2", "Promote"]
    );
    let promoted = Report::Promoted {
        term: Term(2),
        n: EpochNo(8),
        took_us: 9_000,
    };
    assert_eq!(new.report(promoted), ["say Conf"]);

    let mine = old.life();
    let conf = old.says(Some(mine), 2, Body::Conf, Some(life(STANDBY)));
    assert_eq!(old.on(conf), ["persist Eligible 2/2", "BecomeStandby"]);
    assert_eq!(old.report(Report::ImageHeld), ["Detach", "KillGuest"]);
    assert_eq!(old.on(Event::GuestKilled), ["StartStandbyGuest"]);
    assert_eq!(old.life(), mine, "the life goes on in the new process");
    assert_eq!(
        old.on(Event::GuestStarted { life: mine }),
        ["AttachStandby"]
    );
}

/// A standby at another epoch than the one handed over refuses; the old primary resumes.
#[test]
fn handover_without_a_taker() {
    let mut new = eligible();
    let mine = new.life();
    let hand = new.says(
        Some(mine),
        2,
        Body::Hand {
            n: EpochNo(8),
            ports: ports(),
        },
        Some(life(PRIMARY)),
    );
    new.on(hand);
    assert!(
        new.report(Report::Sealed {
            n: Some(EpochNo(7))
        })
        .is_empty()
    );

    let mut old = protected();
    old.on(Event::Operator(Operator::Switchover));
    old.report(Report::HandedOver {
        term: Term(1),
        n: EpochNo(8),
        ports: ports(),
    });
    let out = old.at(1_000);
    assert!(
        out.contains(&"ask witness for 3".into()) && out.contains(&"say YieldAsk".into()),
        "{out:?}"
    );
    assert_eq!(
        old.on(granted(3, HOME)),
        ["persist Solo 3/3", "Resume", "say Hello"]
    );
}

/// A restarted daemon finds everything running and touches nothing.
#[test]
fn adoption_disturbs_nothing() {
    let before = protected();
    let (rec, mine) = (before.record.clone().unwrap(), before.life());
    let mut n = Node::new(HOME);
    let out = n.started(
        Found::Loaded(rec),
        Some(state(Mode::Protected, Some(mine), 1)),
        Some(mine),
    );
    assert_eq!(out, ["say Hello"]);
    assert_eq!(n.engine.status().safety, Safety::Safe);

    let before = eligible();
    let (rec, mine) = (before.record.clone().unwrap(), before.life());
    let mut n = Node::new(AWAY);
    let out = n.started(
        Found::Loaded(rec),
        Some(state(Mode::Eligible, Some(mine), 1)),
        Some(mine),
    );
    assert_eq!(out, ["say Hello"]);
    assert_eq!(n.engine.status().safety, Safety::Safe);
}

/// A rebooted protected primary starts nothing: words first, the witness after a wait.
#[test]
fn rebooted_primary_waits_then_claims_cold() {
    let before = protected();
    let mut n = Node::new(HOME);
    assert_eq!(
        n.started(Found::Loaded(before.record.clone().unwrap()), None, None),
        ["say Hello", "say Hello"]
    );
    assert_eq!(n.at(4_999), ["say Hello"]);
    assert!(n.at(5_000).contains(&"ask witness for 2".into()));
    assert_eq!(
        n.on(granted(2, HOME)),
        ["persist Solo 2/2", "StartReplicator"]
    );
}

/// A rebooted standby whose acks were in memory never claims.
#[test]
fn rebooted_standby_never_claims() {
    let before = eligible();
    let mut n = Node::new(AWAY);
    n.started(Found::Loaded(before.record.clone().unwrap()), None, None);
    n.on(Event::Peer(Peer::Lost));
    for t in 1..100 {
        assert!(n.at(t * 1_000).iter().all(|c| c == "say Hello"));
    }
}

/// A record that cannot be written closes the gate; the same commands come again later.
#[test]
fn persist_failure_closes_the_gate() {
    let mut n = solo();
    let mine = n.life();
    let join = n.says(
        Some(mine),
        1,
        Body::Join { ports: ports() },
        Some(life(STANDBY)),
    );
    n.on(join);
    n.report(Report::Synced { term: Term(1) });
    assert_eq!(
        n.on(Event::PersistFailed {
            why: "no space".into()
        }),
        ["CloseGate"]
    );
    assert_eq!(n.engine.status().safety, Safety::Gated);
    assert!(n.on(Event::Peer(Peer::Lost)).is_empty(), "events wait");
    assert_eq!(
        n.at(1_000)[..3],
        ["persist Protected 1/1", "say Protect", "Arm"]
    );
}

/// Another's record, or an unreadable one, is no claim: the node may only join.
#[test]
fn unusable_record_only_rejoins() {
    let mut n = Node::new(AWAY);
    n.started(
        Found::Unusable {
            term: Term(3),
            why: "bad checksum".into(),
        },
        None,
        None,
    );
    n.on(Event::Peer(Peer::Lost));
    assert!(n.at(60_000).iter().all(|c| c == "say Hello"));
    let ask = n.says(None, 5, Body::YieldAsk { basis: Term(5) }, None);
    assert!(n.on(ask).is_empty(), "it cannot promise what it did not do");
    let old = hello(&n, 2, Role::Solo, true);
    assert!(
        !n.on(old).contains(&"KillGuest".into()),
        "known to be older"
    );
    let h = hello(&n, 6, Role::Solo, true);
    assert!(n.on(h).contains(&"KillGuest".into()));
    assert_eq!(
        n.on(Event::GuestKilled),
        ["persist Ineligible 6/6", "StartReplicator"]
    );
}

/// Two primaries in one term: both gates close, nobody guesses.
#[test]
fn same_term_twice_is_a_conflict() {
    let mut n = protected();
    let h = hello(&n, 1, Role::Solo, true);
    assert_eq!(n.on(h), ["Freeze"]);
    assert_eq!(n.engine.status().safety, Safety::Conflict);
}

/// Rule 16: never while the peer is alive, and never from an incomplete copy.
#[test]
fn force_promote() {
    let mut n = eligible();
    assert!(n.on(Event::Operator(Operator::ForcePromote)).is_empty());
    n.on(Event::Peer(Peer::Lost));
    assert_eq!(
        n.on(Event::Operator(Operator::ForcePromote)),
        ["Seal", "persist Solo 2/2", "Promote"]
    );

    let mut blank = Node::new(AWAY);
    blank.started(Found::Absent, None, None);
    blank.on(Event::Operator(Operator::InitStandby));
    blank.on(Event::Peer(Peer::Lost));
    assert!(blank.on(Event::Operator(Operator::ForcePromote)).is_empty());
}
