//! What `havm status` and `havm events` show, pinned.

use havm_core::command::Severity;
use havm_core::ids::{EpochNo, GuestName, LifeId, Term};
use havm_core::order::{CONTROL_VERSION, Counters, Mode, ReplicaState};
use havm_core::record::{Intent, Role, RoleStatus};
use havm_core::status::{GuestStatus, LinkStatus, PeerView, Safety, Status, WitnessStatus};
use havm_daemon::control::HostStatus;
use havm_daemon::events::Entry;
use havm_daemon::render::{events, status};

const START: u64 = 1_795_244_400_000;

fn replica(mode: Mode) -> ReplicaState {
    ReplicaState {
        version: CONTROL_VERSION,
        mode,
        term: Term(3),
        life: Some(LifeId([1; 16])),
        stream: None,
        acked: EpochNo(4711),
        closed: EpochNo(4712),
        running: true,
        stream_alive: true,
        ports: vec![],
        ram_bytes: 256 << 20,
        vcpus: 1,
        disk_bytes: 1 << 30,
        sync: None,
        counters: Counters {
            epochs: 4712,
            pause_us_p50: 1850,
            pause_us_p99: 3620,
            interval_us: 101_000,
            dirty_bytes: 1000 << 20,
            wire_bytes: 420 << 20,
            links_up: 2,
            ..Counters::default()
        },
    }
}

fn guest(name: &str, safety: Safety, why: &str) -> GuestStatus {
    GuestStatus {
        guest: name.parse().expect("name"),
        at_home: true,
        safety,
        safety_since_ms: 60_000,
        why: why.into(),
        what_to_do: None,
        runs_here: true,
        term: Term(3),
        basis: Term(3),
        role: Some(Role::Protected),
        role_status: Some(RoleStatus::Active),
        arbiter: None,
        generation: None,
        intent: Some(Intent::Run),
        life: None,
        peer: PeerView::Alive,
        stream_alive: true,
        witness: None,
        moving: false,
        failback_at_ms: None,
        probation: false,
        replica: Some(replica(Mode::Protected)),
    }
}

fn host(guests: Vec<GuestStatus>) -> HostStatus {
    HostStatus {
        version: "0.1.0".into(),
        started_at_ms: START,
        now_ms: START + 3_725_000,
        faults: vec![],
        status: Status {
            node: "alpha".into(),
            peer_node: "beta".into(),
            peer: PeerView::Alive,
            links: vec![
                LinkStatus {
                    name: "rep0".into(),
                    up: true,
                    rtt_us: Some(120),
                    missed: 0,
                },
                LinkStatus {
                    name: "rep1".into(),
                    up: false,
                    rtt_us: None,
                    missed: 812,
                },
            ],
            witness: Some(WitnessStatus {
                address: "10.9.0.9:7422".into(),
                reachable: true,
                incarnation: None,
            }),
            guests,
        },
    }
}

/// A quiet pair.
#[test]
fn a_safe_guest() {
    let h = host(vec![guest(
        "web",
        Safety::Safe,
        "the guest runs here; its standby is complete",
    )]);
    insta::assert_snapshot!(status::text(&h, None));
}

/// The peer is gone: the first line says so, the second what to do.
#[test]
fn an_exposed_guest_after_a_failover() {
    let mut g = guest(
        "web",
        Safety::Exposed,
        "the guest runs here alone: the peer's host is silent on every link",
    );
    g.what_to_do = Some("bring the peer back; it joins by itself".into());
    g.at_home = false;
    g.role = Some(Role::Solo);
    let mut r = replica(Mode::Solo);
    r.counters.disk_out_of_sync_bytes = 37 << 20;
    g.replica = Some(r);
    let mut h = host(vec![g]);
    h.status.peer = PeerView::Lost;
    h.status.witness.as_mut().expect("witness").reachable = false;
    h.faults = vec!["the configs of both nodes differ".into()];
    insta::assert_snapshot!(status::text(&h, None));
}

/// A standby being filled, a guest that waits to go home, and one that moves too often.
#[test]
fn guests_on_the_way() {
    let mut filling = guest(
        "db",
        Safety::Syncing,
        "the guest runs here while a standby is brought up to date",
    );
    filling.role = Some(Role::Solo);
    let mut r = replica(Mode::Syncing);
    r.sync = Some((300 << 20, 1200 << 20));
    filling.replica = Some(r);
    let mut away = guest(
        "web",
        Safety::Safe,
        "the guest runs here; its standby is complete",
    );
    away.at_home = false;
    away.failback_at_ms = Some(3_740_000);
    let mut flapping = guest(
        "mail",
        Safety::Safe,
        "the guest runs here; its standby is complete",
    );
    flapping.at_home = false;
    flapping.probation = true;
    let h = host(vec![filling, away, flapping]);
    insta::assert_snapshot!(status::text(&h, None));
    let only: GuestName = "web".parse().expect("name");
    let one = status::text(&h, Some(&only));
    assert!(
        one.contains("web: SAFE") && !one.contains("db:") && !one.contains("node alpha"),
        "{one}"
    );
}

/// Only safe and stopped guests let people sleep.
#[test]
fn only_safe_and_stopped_are_calm() {
    use Safety::*;
    for s in [
        Safe, Syncing, Exposed, Changing, Gated, Down, Stopped, Conflict, Absent,
    ] {
        assert_eq!(status::calm(s), matches!(s, Safe | Stopped), "{s:?}");
    }
}

/// A host without guests says how to begin.
#[test]
fn nothing_protected_yet() {
    assert!(status::text(&host(vec![]), None).contains("havm protect GUEST"));
}

/// What a monitoring system reads, pinned.
#[test]
fn metrics_of_a_pair() {
    let exposed = guest("db", Safety::Exposed, "the guest runs here alone");
    let h = host(vec![guest("web", Safety::Safe, "fine"), exposed]);
    insta::assert_snapshot!(havm_daemon::render::metrics::text(&h));
}

/// One event, one line.
#[test]
fn an_event_is_one_line() {
    let e = Entry {
        seq: 7,
        at_ms: START + 1234,
        guest: Some("web".parse().expect("name")),
        kind: "peer-lost".into(),
        severity: Severity::Warning,
        term: Term(4),
        text: "beta is silent".into(),
    };
    assert_eq!(
        events::line(&e),
        "2026-11-21 07:00:01Z WARNING web peer-lost: beta is silent (term 4)"
    );
}
