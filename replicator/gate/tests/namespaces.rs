//! The gate between real network namespaces: what may get out, and when. Needs root; says so and
//! passes where it is not.

mod common;

use common::raw::Raw;
use common::{CLIENT, GUEST, HOST, Lab, numbers, output, send, until, usable};
use havm_core::ids::{EpochId, EpochNo, StreamId, Term};
use havm_gate::{Gate, GateError, Limits, State, remove_guest_tap};
use havm_wire::acked::AckedEpoch;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const TERM: Term = Term(7);
const STREAM: StreamId = StreamId([9; 16]);
const QUIET: Duration = Duration::from_millis(150);

fn ack(term: Term, stream: StreamId, n: u64) -> AckedEpoch {
    AckedEpoch::for_tests(EpochId {
        term,
        stream,
        n: EpochNo(n),
    })
}

/// Output commit: nothing is outside before its epoch is acked, and then all of it, in order; an
/// ack of another term, another stream, or an epoch that is still open lets nothing out.
#[test]
fn only_an_ack_of_the_closed_epoch_lets_frames_out() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    lab.fix_neighbours();
    let gate = lab.gate(Limits::default());
    let (guest, client) = (lab.udp("G", GUEST, CLIENT), lab.udp("C", CLIENT, GUEST));
    gate.hold(STREAM, TERM, EpochNo(1));
    assert!(!gate.wait_for_output(Duration::from_millis(10)));
    send(&guest, 0..10);
    assert!(gate.wait_for_output(Duration::from_secs(2)));
    until("10 held", || gate.held().frames == 10);
    assert_eq!(
        gate.release(ack(TERM, STREAM, 1)),
        0,
        "epoch 1 is still open"
    );
    gate.barrier(EpochNo(1));
    assert!(
        !gate.wait_for_output(Duration::from_millis(10)),
        "an ack will do, no barrier needed"
    );
    send(&guest, 10..15);
    until("15 held", || gate.held().frames == 15);
    for wrong in [
        ack(Term(6), STREAM, 1),
        ack(Term(8), STREAM, 1),
        ack(TERM, StreamId([8; 16]), 1),
    ] {
        assert_eq!(gate.release(wrong), 0);
    }
    assert_eq!(gate.release(ack(TERM, STREAM, 2)), 0, "epoch 2 is open");
    assert!(
        numbers(&client, QUIET).is_empty(),
        "something got out without an ack"
    );
    assert_eq!(gate.release(ack(TERM, STREAM, 1)), 10);
    assert_eq!(numbers(&client, QUIET), (0..10).collect::<Vec<_>>());
    gate.barrier(EpochNo(2));
    send(&guest, 15..20);
    gate.barrier(EpochNo(3));
    until("10 held", || gate.held().frames == 10);
    gate.barrier(EpochNo(4));
    // Acks are cumulative.
    assert_eq!(gate.release(ack(TERM, STREAM, 4)), 10);
    assert_eq!(numbers(&client, QUIET), (10..20).collect::<Vec<_>>());
    assert_eq!(gate.counters().acks_refused, 5);
    // Input flowed all the time.
    send(&client, 0..5);
    assert_eq!(numbers(&guest, QUIET), (0..5).collect::<Vec<_>>());
}

/// What was held under one stream waits for the first epoch of the next; a solo permit lets it out
/// in order before anything newer; without the right to it, it is dropped.
#[test]
fn held_frames_across_streams_permits_and_discards() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    lab.fix_neighbours();
    let gate = lab.gate(Limits::default());
    let (guest, client) = (lab.udp("G", GUEST, CLIENT), lab.udp("C", CLIENT, GUEST));
    gate.hold(STREAM, TERM, EpochNo(5));
    send(&guest, 0..4);
    until("4 held", || gate.held().frames == 4);
    gate.barrier(EpochNo(5));
    let other = StreamId([1; 16]);
    gate.hold(other, TERM, EpochNo(1));
    assert_eq!(
        gate.release(ack(TERM, STREAM, 5)),
        0,
        "an ack of the old stream counts no more"
    );
    gate.barrier(EpochNo(1));
    assert!(numbers(&client, QUIET).is_empty());
    assert_eq!(gate.release(ack(TERM, other, 1)), 4);
    send(&guest, 4..8);
    until("4 held", || gate.held().frames == 4);
    assert_eq!(gate.pass(true), 4);
    send(&guest, 8..12);
    assert_eq!(numbers(&client, QUIET), (0..12).collect::<Vec<_>>());
    gate.hold(STREAM, Term(8), EpochNo(1));
    send(&guest, 12..16);
    until("4 held", || gate.held().frames == 4);
    assert_eq!(gate.discard(), 4);
    assert_eq!(gate.held().frames, 0);
    send(&guest, 16..18);
    until("2 held", || gate.held().frames == 2);
    assert_eq!(gate.pass(false), 0);
    send(&guest, 18..20);
    assert_eq!(numbers(&client, QUIET), vec![18, 19]);
    assert_eq!(gate.counters().discarded, 6);
}

/// When `close` (or `hold`) has returned, not one more frame gets out (or, for close, in), however
/// hard both sides send.
#[test]
fn close_is_final() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    lab.fix_neighbours();
    let gate = lab.gate(Limits {
        held_bytes: 32 << 20,
        held_frames: 100_000,
        ..Limits::default()
    });
    let (guest, client) = (lab.udp("G", GUEST, CLIENT), lab.udp("C", CLIENT, GUEST));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for socket in [&guest, &client] {
            let stop = &stop;
            s.spawn(move || {
                let mut i = 0;
                while !stop.load(Ordering::SeqCst) {
                    let _ = socket.send(&[i; 100]);
                    i = i.wrapping_add(1);
                    if i % 16 == 0 {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
            });
        }
        for round in 0..20 {
            gate.pass(false);
            std::thread::sleep(Duration::from_millis(10));
            let open = gate.counters();
            let held = round % 2 == 0;
            if held {
                gate.hold(STREAM, TERM, EpochNo(1))
            } else {
                gate.close()
            }
            let shut = gate.counters();
            std::thread::sleep(Duration::from_millis(15));
            let later = gate.counters();
            assert!(
                open.out_frames > 0 && open.in_frames > 0,
                "no traffic: nothing is tested"
            );
            assert_eq!(shut.out_frames, later.out_frames, "a frame slipped out");
            if !held {
                assert_eq!(shut.in_frames, later.in_frames, "a frame slipped in");
                assert!(later.closed_dropped > shut.closed_dropped);
            }
        }
        gate.close();
        // Also as seen from outside, past the counters.
        std::thread::sleep(Duration::from_millis(30));
        numbers_all(&client);
        numbers_all(&guest);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!((numbers_all(&client), numbers_all(&guest)), (0, 0));
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(gate.state(), State::Closed);
}

fn numbers_all(s: &std::net::UdpSocket) -> usize {
    s.set_nonblocking(true).expect("non-blocking");
    let mut buf = [0u8; 256];
    let mut n = 0;
    while s.recv(&mut buf).is_ok() {
        n += 1;
    }
    s.set_nonblocking(false).expect("blocking");
    n
}

/// A guest that sends without end while nothing is acked costs bounded memory, is reported in
/// time, and what was held comes out whole and in order.
#[test]
fn the_queue_is_bounded() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    lab.fix_neighbours();
    let gate = lab.gate(Limits {
        held_frames: 100,
        ..Limits::default()
    });
    let (guest, client) = (lab.udp("G", GUEST, CLIENT), lab.udp("C", CLIENT, GUEST));
    gate.hold(STREAM, TERM, EpochNo(1));
    send(&guest, 0..70);
    until("70 held", || gate.held().frames == 70);
    assert!(!gate.is_full());
    send(&guest, 70..80);
    until("full", || gate.is_full());
    send(&guest, 80..300);
    until("100 held", || gate.held().frames == 100);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(gate.held().frames, 100);
    gate.barrier(EpochNo(1));
    assert_eq!(gate.release(ack(TERM, STREAM, 1)), 100);
    // What waited in the kernel belongs to the next epoch, and comes after it.
    until("the next 100 held", || gate.held().frames == 100);
    gate.barrier(EpochNo(2));
    assert_eq!(gate.release(ack(TERM, STREAM, 2)), 100);
    assert_eq!(numbers(&client, QUIET), (0..200).collect::<Vec<_>>());
    gate.pass(true);
    assert_eq!(numbers(&client, QUIET), (200..300).collect::<Vec<_>>());
    // The kernel's buffer has its end too.
    gate.hold(STREAM, TERM, EpochNo(3));
    for i in 0..40_000u32 {
        let _ = guest.send(&i.to_le_bytes());
    }
    assert!(gate.counters().overflowed > 0);
    let dropped = gate.discard();
    assert!(
        dropped > 100,
        "what waits in the kernel is discarded too: {dropped}"
    );
    assert!(!gate.is_full());
}

/// Both directions of a TCP stream arrive to the byte, with segmentation and checksums left to the
/// other side: passing, and while every byte waits for an ack.
#[test]
fn tcp_is_whole_and_offloads_survive() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    let gate = lab.gate(Limits::default());
    gate.pass(true);
    transfer(&lab, 48 << 20);
    let c = gate.counters();
    let mean = c.out_bytes / c.out_frames.max(1);
    assert!(
        mean > 3000,
        "frames of {mean} bytes: segmentation offload was lost"
    );
    assert_eq!((c.unusable, c.out_failed), (0, 0));

    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| pace(&gate, &stop));
        transfer(&lab, 16 << 20);
        stop.store(true, Ordering::SeqCst);
    });
    assert!(gate.counters().released_frames > 100);
}

fn pace(gate: &Gate, stop: &AtomicBool) {
    gate.hold(STREAM, TERM, EpochNo(1));
    let mut n = 1;
    while !stop.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
        gate.barrier(EpochNo(n));
        gate.release(ack(TERM, STREAM, n));
        n += 1;
    }
    gate.pass(true);
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed;
    let mut v = Vec::with_capacity(len + 8);
    while v.len() < len {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        v.extend((x ^ (x >> 29)).to_le_bytes());
    }
    v.truncate(len);
    v
}

/// Sends a pattern each way at once, and compares.
fn transfer(lab: &Lab, len: usize) {
    let listener = lab.within("C", || TcpListener::bind((CLIENT, 0)).expect("listen"));
    let port = listener.local_addr().expect("an address").port();
    let near = lab.within("G", || TcpStream::connect((CLIENT, port)).expect("connect"));
    let (far, _) = listener.accept().expect("accept");
    std::thread::scope(|s| {
        for (stream, send_seed, get_seed) in [(&near, 1, 2), (&far, 2, 1)] {
            let limit = Some(Duration::from_secs(20));
            stream.set_read_timeout(limit).expect("a timeout");
            stream.set_write_timeout(limit).expect("a timeout");
            s.spawn(move || {
                let mut stream = stream;
                stream.write_all(&pattern(send_seed, len)).expect("send");
            });
            s.spawn(move || {
                let mut stream = stream;
                let mut got = vec![0; len];
                stream.read_exact(&mut got).expect("receive");
                assert!(got == pattern(get_seed, len), "bytes differ");
            });
        }
    });
}

/// A VLAN tag of the guest's stays on its frames, both ways. (With raw sockets: not every kernel
/// has VLAN devices.)
#[test]
fn vlan_tags_survive() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    let gate = lab.gate(Limits::default());
    gate.pass(true);
    let guest = lab.within("G", || Raw::open("eth0"));
    let client = lab.within("C", || Raw::open("eth0"));
    for (from, to) in [(&guest, &client), (&client, &guest)] {
        let mut frame = vec![0xff; 6];
        frame.extend([
            0x52, 0x54, 0, 0x66, 9, 9, 0x81, 0x00, 0x20, 0x05, 0x88, 0xb5,
        ]);
        frame.extend([0x5a; 50]);
        from.send(&frame);
        assert_eq!(to.tag_of(0x88b5, Duration::from_secs(2)), Some(0x2005));
    }
}

/// The host itself does not answer at the guest's tap, whatever the gate's state: an answer would
/// be output (and input) that no epoch covers.
#[test]
fn the_host_is_silent_at_the_guests_tap() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    let gate = lab.gate(Limits::default());
    gate.close();
    assert!(
        !lab.reaches("G", HOST),
        "the host answered past a closed gate"
    );
    gate.pass(true);
    until("the host answers by way of the bridge", || {
        lab.reaches("G", HOST)
    });
}

/// Nor does anything get out when someone puts the guest's tap into the bridge.
#[test]
fn a_guest_tap_in_the_bridge_is_no_way_out() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    lab.fix_neighbours();
    let gate = lab.gate(Limits::default());
    let (guest, client) = (lab.udp("G", GUEST, CLIENT), lab.udp("C", CLIENT, GUEST));
    lab.ip("H", "link set hvg0 master br0");
    gate.hold(STREAM, TERM, EpochNo(1));
    send(&guest, 0..10);
    assert!(
        numbers(&client, QUIET).is_empty(),
        "frames went around the gate"
    );
    assert_eq!(gate.held().frames, 10);
}

/// Both ways of input do the same: inside the kernel, and by the thread.
#[test]
fn input_with_and_without_the_short_cut() {
    if !usable() {
        return;
    }
    for shortcut in [true, false] {
        let lab = Lab::new();
        lab.fix_neighbours();
        let gate = lab.gate(Limits {
            shortcut,
            ..Limits::default()
        });
        let (guest, client) = (lab.udp("G", GUEST, CLIENT), lab.udp("C", CLIENT, GUEST));
        send(&client, 0..5);
        assert!(
            numbers(&guest, QUIET).is_empty(),
            "a closed gate let input through"
        );
        gate.hold(STREAM, TERM, EpochNo(1));
        send(&client, 5..105);
        assert_eq!(numbers(&guest, QUIET), (5..105).collect::<Vec<_>>());
        let c = gate.counters();
        assert!(
            c.in_dropped >= 5 && c.in_frames >= 100 && c.in_bytes > 100 * 200,
            "{c:?}"
        );
        gate.close();
        send(&client, 105..110);
        assert!(numbers(&guest, QUIET).is_empty());
    }
}

/// The guest's tap outlives the gate and is taken over by the next; the bridge's goes with it.
#[test]
fn devices_come_and_go() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    let spec = havm_gate::NicSpec {
        guest_tap: "hvg7".into(),
        ..lab.spec()
    };
    let open = || lab.within("H", || Gate::open(&spec, Limits::default()));
    let has = |dev: &str| {
        output(&format!("ip -n {} link show {dev}", lab.ns("H")))
            .status
            .success()
    };
    let gate = open().expect("a gate");
    assert!(gate.has_offloads());
    assert!(has("hvg7") && has("hvb0"));
    assert!(lab.ip("H", "link show hvb0").contains("master br0"));
    assert!(
        matches!(open(), Err(GateError::Busy(_))),
        "two gates of one NIC"
    );
    drop(gate);
    assert!(has("hvg7") && !has("hvb0"));
    let again = open().expect("the tap is taken over");
    drop(again);
    lab.within("H", || remove_guest_tap("hvg7"))
        .expect("removed");
    lab.within("H", || remove_guest_tap("hvg7"))
        .expect("nothing to remove is fine");
    assert!(!has("hvg7"));
    let nowhere = havm_gate::NicSpec {
        bridge: "br9".into(),
        ..lab.spec()
    };
    let e = lab
        .within("H", || Gate::open(&nowhere, Limits::default()))
        .err();
    assert!(matches!(e, Some(GateError::NoBridge(_))), "{e:?}");
}

/// A killed process leaves the gate closed: its bridge tap is gone at once.
#[test]
fn a_killed_process_leaves_the_gate_closed() {
    if !usable() {
        return;
    }
    let lab = Lab::new();
    let mut child = Command::new("ip")
        .args(["netns", "exec", &lab.ns("H")])
        .arg(std::env::current_exe().expect("this test"))
        .args([
            "--exact",
            "helper_that_holds_a_gate",
            "--ignored",
            "--nocapture",
        ])
        .env("HAVM_GATE_HELPER", "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    assert!(lines.any(|l| l.is_ok_and(|l| l.contains("gate is open"))));
    until("the client answers", || lab.reaches("G", CLIENT));
    child.kill().expect("killed"); // `ip netns exec` has become the helper
    child.wait().expect("gone");
    let t = Instant::now();
    until("hvb0 is gone", || {
        !output(&format!("ip -n {} link show hvb0", lab.ns("H")))
            .status
            .success()
    });
    assert!(t.elapsed() < Duration::from_secs(1));
    assert!(
        !lab.reaches("G", CLIENT),
        "the guest reaches the client without a gate"
    );
}

#[test]
#[ignore = "started by a_killed_process_leaves_the_gate_closed"]
fn helper_that_holds_a_gate() {
    if std::env::var_os("HAVM_GATE_HELPER").is_none() {
        return;
    }
    let spec = havm_gate::NicSpec {
        guest_tap: "hvg0".into(),
        bridge_tap: "hvb0".into(),
        bridge: "br0".into(),
        mac: [0x52, 0x54, 0, 0x66, 0, 1],
        owner_uid: None,
        mtu: 1500,
    };
    let gate = Gate::open(&spec, Limits::default()).expect("a gate");
    gate.pass(true);
    println!("gate is open");
    std::thread::sleep(Duration::from_secs(30));
}
