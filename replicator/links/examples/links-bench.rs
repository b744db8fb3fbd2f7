//! Throughput and round trip of a stream over loopback links, all in this process.
//!
//! `cargo run --release -p havm-links --example links-bench -- [MIB] [LINKS] [CIRCUITS]`
//!
//! Prints one JSON line: MB/s of frames with incompressible content (TLS on both ends in this
//! process, so both ends' CPU counts), and the time from an epoch's last frame to its ack.

use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId, Term};
use havm_links::beat::Timers;
use havm_links::identity::Identity;
use havm_links::incoming::{Expect, In, Incoming, IncomingSpec};
use havm_links::outgoing::{OutEvent, Outgoing, OutgoingSpec};
use havm_wire::back::Back;
use havm_wire::frame::Frame;
use havm_wire::hello::StreamHello;
use havm_wire::raw::GOOD_PAYLOAD_BYTES;
use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

type Failure = Box<dyn Error + Send + Sync>;

const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> Result<(), Failure> {
    let args: Vec<usize> = std::env::args()
        .skip(1)
        .map(|a| a.parse())
        .collect::<Result<_, _>>()?;
    let mib = args.first().copied().unwrap_or(2048);
    let links = args.get(1).copied().unwrap_or(2);
    let rounds = args.get(2).copied().unwrap_or(2000);
    let (a, b) = (Identity::generate()?, Identity::generate()?);
    let hello = StreamHello {
        guest: "bench".parse()?,
        term: Term(1),
        stream: StreamId([1; 16]),
        my_life: LifeId([2; 16]),
        peer_life: LifeId([3; 16]),
    };
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let incoming = Incoming::listen(IncomingSpec {
        identity: b.clone(),
        peer: a.fingerprint(),
        bind: vec![local; links],
        ports: 0..=0,
        expect: Expect {
            guest: hello.guest.clone(),
            term: None,
            my_life: None,
            peer_life: None,
        },
        window_bytes: 64 << 20,
        timers: Timers::default(),
    })?;
    let out = Outgoing::connect(OutgoingSpec {
        identity: a,
        peer: b.fingerprint(),
        links: incoming.ports().iter().map(|p| (None, *p)).collect(),
        hello: hello.clone(),
        window_bytes: 64 << 20,
        timers: Timers::default(),
    })?;
    let standby = std::thread::spawn(move || serve(&incoming));
    while out.links_up() < links {
        std::thread::sleep(Duration::from_millis(5));
    }

    let mut noise = vec![0u8; GOOD_PAYLOAD_BYTES];
    let mut x = 1u64;
    for b in &mut noise {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *b = x as u8;
    }
    let data = Frame::Pages {
        block: 0,
        entries: noise.into(),
    };
    let frames = (mib << 20) / GOOD_PAYLOAD_BYTES;
    let start = Instant::now();
    for _ in 0..frames {
        out.send(data.encode()?, PATIENCE)?;
    }
    round_trip(&out, 1)?;
    let mb_per_s = (frames * GOOD_PAYLOAD_BYTES) as f64 / 1e6 / start.elapsed().as_secs_f64();

    let mut us = Vec::new();
    for n in 0..rounds {
        std::thread::sleep(Duration::from_millis(1));
        us.push(round_trip(&out, n as u64 + 2)?.as_micros() as u64);
    }
    us.sort_unstable();
    let at = |p: usize| us.get(us.len() * p / 100).copied().unwrap_or(0);
    let resent: u64 = out.counters().iter().map(|c| c.resent_frames).sum();
    println!(
        "{{\"links\":{links},\"mib\":{mib},\"mb_per_s\":{mb_per_s:.0},\"rtt_us\":{{\"p50\":{},\"p99\":{},\"max\":{}}},\"resent_frames\":{resent}}}",
        at(50),
        at(99),
        us.last().copied().unwrap_or(0)
    );
    out.close("done", PATIENCE);
    standby
        .join()
        .map_err(|_| "the receiving thread panicked")??;
    Ok(())
}

/// An (empty) epoch's end to its ack.
fn round_trip(out: &Outgoing, n: u64) -> Result<Duration, Failure> {
    let start = Instant::now();
    out.send(Frame::VerifyEnd { id: n }.encode()?, PATIENCE)?;
    loop {
        match out.event(PATIENCE).ok_or("no ack")? {
            OutEvent::Back(Back::Ack { epoch, .. }) if epoch.n.0 == n => return Ok(start.elapsed()),
            OutEvent::Broken(why) => return Err(why.into()),
            OutEvent::LinkDown(i, why) => eprintln!("link {i} down: {why}"),
            OutEvent::Silent => eprintln!("silent"),
            _ => {}
        }
    }
}

/// The standby: takes everything, acks each `VerifyEnd`.
fn serve(incoming: &Incoming) -> Result<(), Failure> {
    loop {
        match incoming.recv(PATIENCE).ok_or("nothing came")? {
            In::NewStream(h) => {
                incoming.accept(h.stream);
            }
            In::Frame(raw) => match Frame::decode(&raw)? {
                Frame::VerifyEnd { id } => {
                    let epoch = EpochId {
                        term: Term(1),
                        stream: StreamId([1; 16]),
                        n: EpochNo(id),
                    };
                    incoming.reply(&Back::Ack {
                        epoch,
                        life: LifeId([3; 16]),
                    })?;
                }
                Frame::Bye { .. } => return Ok(()),
                _ => {}
            },
            In::LinkDown(i, why) => eprintln!("standby: link {i} down: {why}"),
            In::Broken(why) => return Err(why.into()),
            _ => {}
        }
    }
}
