//! The stream over real sockets, with a proxy on each link that can be cut, stalled and healed.

use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId, Term};
use havm_links::beat::Timers;
use havm_links::identity::Identity;
use havm_links::incoming::{Expect, In, Incoming, IncomingSpec};
use havm_links::outgoing::{OutEvent, Outgoing, OutgoingSpec, SendError};
use havm_wire::back::Back;
use havm_wire::frame::Frame;
use havm_wire::hello::StreamHello;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

mod proxy;
use proxy::Proxy;

const LONG: Duration = Duration::from_secs(20);

fn timers() -> Timers {
    Timers {
        silent_after: Duration::from_millis(300),
        link_dead_after: Duration::from_millis(600),
        ..Timers::default()
    }
}

fn hello(stream: u8) -> StreamHello {
    StreamHello {
        guest: "g".parse().unwrap(),
        term: Term(4),
        stream: StreamId([stream; 16]),
        my_life: LifeId([2; 16]),
        peer_life: LifeId([3; 16]),
    }
}

fn listen(me: &Identity, peer: &Identity, links: usize, window_bytes: usize) -> Incoming {
    Incoming::listen(IncomingSpec {
        identity: me.clone(),
        peer: peer.fingerprint(),
        bind: vec![IpAddr::V4(Ipv4Addr::LOCALHOST); links],
        ports: 0..=0,
        expect: Expect {
            guest: "g".parse().unwrap(),
            term: Some(Term(4)),
            my_life: Some(LifeId([3; 16])),
            peer_life: None,
        },
        window_bytes,
        timers: timers(),
    })
    .unwrap()
}

fn connect(me: &Identity, peer: &Identity, to: &[SocketAddr], hello: StreamHello) -> Outgoing {
    Outgoing::connect(OutgoingSpec {
        identity: me.clone(),
        peer: peer.fingerprint(),
        links: to.iter().map(|a| (None, *a)).collect(),
        hello,
        window_bytes: 8 << 20,
        timers: timers(),
    })
    .unwrap()
}

/// Two nodes, two links, a proxy on each.
struct Pair {
    out: Outgoing,
    incoming: Incoming,
    proxies: Vec<Proxy>,
    a: Identity,
    b: Identity,
}

fn pair() -> Pair {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let incoming = listen(&b, &a, 2, 8 << 20);
    let proxies: Vec<Proxy> = incoming.ports().iter().map(|p| Proxy::to(*p)).collect();
    let to: Vec<SocketAddr> = proxies.iter().map(|p| p.addr).collect();
    let out = connect(&a, &b, &to, hello(1));
    Pair {
        out,
        incoming,
        proxies,
        a,
        b,
    }
}

/// A frame that says which it is, with some bulk.
fn numbered(i: u64) -> havm_wire::raw::Encoded {
    let len = 8 + (i as usize * 7919) % 40_000;
    let mut entries = vec![i as u8; len];
    entries[..8].copy_from_slice(&i.to_le_bytes());
    Frame::Pages {
        block: 0,
        entries: entries.into(),
    }
    .encode()
    .unwrap()
}

fn number(raw: &havm_wire::raw::RawFrame) -> u64 {
    match Frame::decode(raw).unwrap() {
        Frame::Pages { entries, .. } => {
            let i = u64::from_le_bytes(entries[..8].try_into().unwrap());
            assert!(entries[8..].iter().all(|b| *b == i as u8), "content of {i}");
            i
        }
        other => panic!("{other:?}"),
    }
}

/// Receives `count` numbered frames, in order, acking each hundredth; accepts the stream.
fn receive(incoming: &Incoming, count: u64) -> Vec<String> {
    let mut next = 0;
    let mut events = Vec::new();
    let deadline = Instant::now() + LONG;
    while next < count {
        assert!(
            Instant::now() < deadline,
            "only {next} of {count} came; {events:?}"
        );
        match incoming.recv(Duration::from_millis(100)) {
            Some(In::Frame(raw)) => {
                assert_eq!(number(&raw), next);
                next += 1;
                if next % 100 == 0 {
                    incoming.reply(&ack(next)).unwrap();
                }
            }
            Some(In::NewStream(h)) => assert!(incoming.accept(h.stream)),
            Some(In::Broken(why)) => panic!("{why}"),
            Some(other) => events.push(format!("{other:?}")),
            None => {}
        }
    }
    events
}

fn ack(n: u64) -> Back {
    let epoch = EpochId {
        term: Term(4),
        stream: StreamId([1; 16]),
        n: EpochNo(n),
    };
    Back::Ack {
        epoch,
        life: LifeId([3; 16]),
    }
}

/// Waits for the acks 100, 200, ... `last`, in order.
fn await_acks(out: &Outgoing, last: u64) -> Vec<OutEvent> {
    let mut next = 100;
    let mut events = Vec::new();
    while next <= last {
        match out.event(LONG).expect("an ack") {
            OutEvent::Back(back) => {
                assert_eq!(back, ack(next));
                next += 100;
            }
            OutEvent::Broken(why) => panic!("{why}"),
            other => events.push(other),
        }
    }
    events
}

/// Sends `count` numbered frames while `trouble` is called with each number.
fn run(p: &Pair, count: u64, trouble: impl Fn(u64) + Send) -> (Vec<OutEvent>, Vec<String>) {
    std::thread::scope(|s| {
        let rx = s.spawn(|| receive(&p.incoming, count));
        let acks = s.spawn(|| await_acks(&p.out, count / 100 * 100));
        for i in 0..count {
            trouble(i);
            p.out.send(numbered(i), LONG).unwrap();
        }
        (acks.join().unwrap(), rx.join().unwrap())
    })
}

#[test]
fn both_links_carry_and_all_arrives_in_order() {
    let p = pair();
    run(&p, 3000, |_| ());
    let sent: Vec<u64> = p.out.counters().iter().map(|c| c.sent_bytes).collect();
    assert!(sent.iter().all(|b| *b > 5_000_000), "{sent:?}");
}

#[test]
fn a_link_cut_in_mid_stream_costs_a_resend_and_nothing_else() {
    let p = pair();
    let (events, _) = run(&p, 3000, |i| {
        if i % 500 == 250 {
            p.proxies[(i / 500 % 2) as usize].cut();
        }
    });
    assert!(
        events.iter().any(|e| matches!(e, OutEvent::LinkDown(..))),
        "{events:?}"
    );
    assert!(
        !events.iter().any(|e| matches!(e, OutEvent::Silent)),
        "{events:?}"
    );
}

#[test]
fn a_link_that_stalls_without_a_word_holds_nothing_up_for_long() {
    let p = pair();
    run(&p, 200, |_| ());
    p.proxies[1].stall(true);
    let start = Instant::now();
    std::thread::scope(|s| {
        let rx = s.spawn(|| receive_from(&p.incoming, 200, 400));
        (200..400).for_each(|i| p.out.send(numbered(i), LONG).unwrap());
        rx.join().unwrap();
    });
    // Late frames (20 ms) go over the other link; the dead one is found after 600 ms only.
    let took = start.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}");
    let resent: u64 = p.out.counters().iter().map(|c| c.resent_frames).sum();
    assert!(resent > 0);
}

fn receive_from(incoming: &Incoming, from: u64, to: u64) {
    let mut next = from;
    while next < to {
        if let In::Frame(raw) = incoming.recv(LONG).expect("a frame") {
            assert_eq!(number(&raw), next);
            next += 1;
        }
    }
}

#[test]
fn both_links_down_is_silence_and_the_stream_goes_on_when_one_is_back() {
    let p = pair();
    run(&p, 300, |_| ());
    p.proxies.iter().for_each(Proxy::down);
    let mut seen_silent = false;
    let deadline = Instant::now() + LONG;
    while !seen_silent && Instant::now() < deadline {
        seen_silent |= matches!(p.out.event(LONG), Some(OutEvent::Silent));
    }
    let mut standby_silent = false;
    while !standby_silent && Instant::now() < deadline {
        standby_silent |= matches!(p.incoming.recv(LONG), Some(In::Silent));
    }
    assert!(seen_silent && standby_silent);
    (300..320).for_each(|i| p.out.send(numbered(i), LONG).unwrap());
    p.incoming.reply(&ack(400)).unwrap();
    p.proxies[0].up();
    receive_from(&p.incoming, 300, 320);
    let (mut alive, mut acked) = (false, false);
    while !(alive && acked) {
        match p.out.event(LONG).expect("life and an ack") {
            OutEvent::Alive => alive = true,
            OutEvent::Back(back) => {
                assert_eq!(back, ack(400));
                acked = true;
            }
            _ => {}
        }
    }
}

#[test]
fn a_full_window_blocks_the_sender_and_an_abort_lets_it_go() {
    let p = pair();
    while !matches!(p.incoming.recv(LONG), Some(In::NewStream(h)) if p.incoming.accept(h.stream)) {}
    let mut sent = 0;
    let full = loop {
        match p.out.send(numbered(sent), Duration::from_millis(300)) {
            Ok(()) => sent += 1,
            Err(e) => break e,
        }
    };
    assert!(matches!(full, SendError::TimedOut(_)), "{full}");
    assert!(p.out.held_bytes() <= 8 << 20);
    std::thread::scope(|s| {
        let waiting = s.spawn(|| p.out.send(numbered(sent), LONG));
        std::thread::sleep(Duration::from_millis(50));
        p.out.abort();
        assert_eq!(waiting.join().unwrap(), Err(SendError::Closed));
    });
}

#[test]
fn the_wrong_guest_term_or_life_is_refused_for_good_and_says_why() {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let incoming = listen(&b, &a, 1, 1 << 20);
    for (wrong, word) in [
        (
            StreamHello {
                term: Term(5),
                ..hello(1)
            },
            "term",
        ),
        (
            StreamHello {
                guest: "other".parse().unwrap(),
                ..hello(1)
            },
            "guest",
        ),
        (
            StreamHello {
                peer_life: LifeId([9; 16]),
                ..hello(1)
            },
            "life",
        ),
    ] {
        let out = connect(&a, &b, incoming.ports(), wrong);
        let why = broken(&out);
        assert!(why.contains(word), "{why}");
        assert!(matches!(
            out.send(numbered(1), LONG),
            Err(SendError::Broken(_))
        ));
    }
    assert!(
        incoming.recv(Duration::ZERO).is_none(),
        "nobody was bothered"
    );
}

fn broken(out: &Outgoing) -> String {
    loop {
        match out.event(LONG).expect("it breaks") {
            OutEvent::Broken(why) => return why,
            OutEvent::LinkUp(_) => panic!("it came up"),
            _ => {}
        }
    }
}

#[test]
fn a_stream_that_the_owner_refuses_is_refused_and_a_new_one_replaces_the_old() {
    let p = pair();
    run(&p, 100, |_| ());
    let ports = p.incoming.ports().to_vec();
    let second = connect(&p.a, &p.b, &ports, hello(2));
    loop {
        if let Some(In::NewStream(h)) = p.incoming.recv(LONG) {
            p.incoming.refuse(h.stream, "not now, not ever");
            break;
        }
    }
    assert_eq!(broken(&second), "not now, not ever");
    drop(second);
    let third = connect(&p.a, &p.b, &ports, hello(3));
    std::thread::scope(|s| {
        s.spawn(|| receive(&p.incoming, 10));
        (0..10).for_each(|i| third.send(numbered(i), LONG).unwrap());
    });
    // The replaced one is told so when it comes back.
    drop(p.out);
}

#[test]
fn a_standby_that_lost_its_memory_breaks_the_stream() {
    let Pair {
        out,
        incoming,
        proxies,
        a,
        b,
    } = pair();
    std::thread::scope(|s| {
        s.spawn(|| receive(&incoming, 50));
        (0..50).for_each(|i| out.send(numbered(i), LONG).unwrap());
    });
    drop(incoming);
    let restarted = listen(&b, &a, 1, 1 << 20);
    proxies.iter().for_each(|p| p.point(restarted.ports()[0]));
    std::thread::scope(|s| {
        s.spawn(|| {
            let deadline = Instant::now() + LONG;
            while Instant::now() < deadline {
                if let Some(In::NewStream(h)) = restarted.recv(Duration::from_millis(100)) {
                    restarted.accept(h.stream);
                    break;
                }
            }
        });
        loop {
            match out.event(LONG).expect("it breaks") {
                OutEvent::Broken(why) => {
                    assert!(why.contains("lost what it had received"), "{why}");
                    break;
                }
                _ => continue,
            }
        }
    });
}

#[test]
fn a_dropped_listener_gives_its_ports_back() {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let incoming = listen(&b, &a, 2, 1 << 20);
    let ports = incoming.ports().to_vec();
    drop(incoming);
    let deadline = Instant::now() + LONG;
    for port in ports {
        while std::net::TcpListener::bind(port).is_err() {
            assert!(Instant::now() < deadline, "{port} is still taken");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn goodbye_is_the_last_thing_that_arrives() {
    let Pair { out, incoming, .. } = pair();
    std::thread::scope(|s| {
        s.spawn(|| {
            receive(&incoming, 500);
            loop {
                if let In::Frame(raw) = incoming.recv(LONG).expect("a goodbye") {
                    assert_eq!(
                        Frame::decode(&raw),
                        Ok(Frame::Bye {
                            reason: "handed over".into()
                        })
                    );
                    break;
                }
            }
        });
        (0..500).for_each(|i| out.send(numbered(i), LONG).unwrap());
        out.close("handed over", LONG);
    });
}

/// Four busy loops on this machine, and for 3 s neither side takes the other for dead.
#[test]
fn load_is_not_silence() {
    let p = pair();
    run(&p, 100, |_| ());
    let end = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let mut x = 1u64;
                while Instant::now() < end {
                    (0..10_000).for_each(|i| x = std::hint::black_box(x.wrapping_mul(31) + i));
                }
            });
        }
        while Instant::now() < end {
            if let Some(e) = p.out.event(Duration::from_millis(50)) {
                assert!(
                    !matches!(e, OutEvent::Silent | OutEvent::LinkDown(..)),
                    "{e:?}"
                );
            }
            if let Some(e) = p.incoming.recv(Duration::from_millis(50)) {
                assert!(!matches!(e, In::Silent | In::LinkDown(..)), "{e:?}");
            }
        }
    });
}
