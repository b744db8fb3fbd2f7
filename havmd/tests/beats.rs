//! Heartbeats over loopback: two nodes, two links, noise, silence, restarts. Two minutes under load, with
//! what detection takes then, are a measurement of `havm-bench`.

use havm_core::detector::DetectorSettings;
use havm_core::event::Peer;
use havm_core::ids::NodeId;
use havm_daemon::beats::{BeatEvent, BeatLink, BeatSettings, Beats, FLAG_READY};
use havm_daemon::identity_store::PairKey;
use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const KEY: [u8; 32] = [7; 32];
const LOST: Duration = Duration::from_millis(300);

/// Two links; each test has its own pair of loopback addresses.
fn links(test: u8) -> (Vec<BeatLink>, Vec<BeatLink>) {
    let free = || {
        UdpSocket::bind("127.0.0.1:0")
            .and_then(|s| s.local_addr())
            .expect("a port")
            .port()
    };
    let ends: Vec<(SocketAddr, SocketAddr)> = (0..2u8)
        .map(|i| {
            let port = free();
            (
                ([127, 44, test, 2 * i + 1], port).into(),
                ([127, 44, test, 2 * i + 2], port).into(),
            )
        })
        .collect();
    let a = ends
        .iter()
        .map(|(a, b)| BeatLink {
            local: *a,
            peer: *b,
        })
        .collect();
    let b = ends
        .iter()
        .map(|(a, b)| BeatLink {
            local: *b,
            peer: *a,
        })
        .collect();
    (a, b)
}

fn start(me: u8, links: &[BeatLink], key: [u8; 32]) -> (Beats, Receiver<BeatEvent>) {
    let (tx, rx) = channel();
    let settings = BeatSettings {
        node: NodeId([me; 16]),
        peer: NodeId([3 - me; 16]),
        key: PairKey(key),
        links: links.to_vec(),
        detector: DetectorSettings {
            interval: Duration::from_millis(10),
            suspect_after: LOST / 2,
            lost_after: LOST,
        },
    };
    let beats = Beats::start(settings, move |e| {
        let _ = tx.send(e);
    });
    (beats.expect("heartbeats"), rx)
}

fn wait(rx: &Receiver<BeatEvent>, what: impl Fn(&BeatEvent) -> bool) -> BeatEvent {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let e = rx.recv_timeout(left).expect("it did not come in 10 s");
        if what(&e) {
            return e;
        }
    }
}

fn verdict(want: Peer) -> impl Fn(&BeatEvent) -> bool {
    move |e| matches!(e, BeatEvent::Verdict { peer, .. } if *peer == want)
}

#[test]
fn two_nodes_meet_lose_each_other_and_meet_again() {
    let (la, lb) = links(1);
    let (a, ra) = start(1, &la, KEY);
    let (b, rb) = start(2, &lb, KEY);
    b.set_flags(FLAG_READY);
    wait(&ra, verdict(Peer::Alive));
    wait(&rb, verdict(Peer::Alive));
    std::thread::sleep(Duration::from_millis(200));
    let s = a.snapshot();
    assert_eq!(s.peer_session, Some(b.session()));
    assert_eq!(s.peer_flags, FLAG_READY);
    for l in &s.links {
        assert!(
            l.up && l.counters.received > 5 && l.rtt_us.is_some(),
            "{l:?}"
        );
        assert_eq!(l.counters.forged, 0);
    }
    let t = Instant::now();
    drop(b);
    wait(&ra, verdict(Peer::Lost));
    let took = t.elapsed();
    assert!(
        took > LOST - Duration::from_millis(50) && took < LOST * 3,
        "{took:?}"
    );
    let (b, _rb) = start(2, &lb, KEY);
    let e = wait(&ra, |e| matches!(e, BeatEvent::PeerSession { .. }));
    assert_eq!(
        e,
        BeatEvent::PeerSession {
            session: b.session()
        }
    );
    wait(&ra, verdict(Peer::Alive));
}

#[test]
fn noise_and_another_key_are_no_signs_of_life() {
    let (la, lb) = links(2);
    let (a, ra) = start(1, &la, KEY);
    wait(&ra, verdict(Peer::Lost));
    // Somebody at the peer's address who has another key.
    let (wrong, rw) = start(2, &lb, [8; 32]);
    let end = Instant::now() + Duration::from_millis(600);
    let noise = UdpSocket::bind((lb[0].local.ip(), 0)).expect("a socket");
    let mut n = 0u32;
    while Instant::now() < end {
        let bytes: Vec<u8> = (0..n % 200)
            .map(|i| (i.wrapping_mul(n) >> 3) as u8)
            .collect();
        noise.send_to(&bytes, la[0].local).expect("sent");
        n += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    let s = a.snapshot();
    assert_eq!(s.peer, Peer::Lost);
    assert!(s.links[0].counters.forged > 50, "{:?}", s.links[0]);
    assert!(ra.try_iter().all(|e| !verdict(Peer::Alive)(&e)));
    drop(wrong);
    assert!(rw.iter().all(|e| !verdict(Peer::Alive)(&e)));
    // And the right one is still heard after all that.
    let (_b, _rb) = start(2, &lb, KEY);
    wait(&ra, verdict(Peer::Alive));
}

/// A recording of the peer's beats, played after its death, revives nobody.
#[test]
fn a_recording_does_not_revive_the_dead() {
    let (la, lb) = links(3);
    // A man in the middle on link 0: a talks to m, m to b.
    let middle: SocketAddr = ([127, 44, 3, 9], la[0].local.port()).into();
    let via = |l: &[BeatLink]| {
        vec![BeatLink {
            local: l[0].local,
            peer: middle,
        }]
    };
    let m = UdpSocket::bind(middle).expect("a socket");
    m.set_read_timeout(Some(Duration::from_millis(20)))
        .expect("a timeout");
    let (_a, ra) = start(1, &via(&la), KEY);
    let (b, _rb) = start(2, &via(&lb), KEY);
    let mut recording = Vec::new();
    let end = Instant::now() + Duration::from_millis(700);
    let mut buffer = [0; 200];
    while Instant::now() < end {
        if let Ok((n, from)) = m.recv_from(&mut buffer) {
            let to = if from == la[0].local {
                lb[0].local
            } else {
                la[0].local
            };
            if from == lb[0].local {
                recording.push(buffer[..n].to_vec());
            }
            m.send_to(&buffer[..n], to).expect("sent");
        }
    }
    wait(&ra, verdict(Peer::Alive));
    drop(b);
    wait(&ra, verdict(Peer::Lost));
    for beat in &recording {
        m.send_to(beat, la[0].local).expect("sent");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(recording.len() > 20);
    assert_eq!(ra.try_iter().find(|e| verdict(Peer::Alive)(e)), None);
}
