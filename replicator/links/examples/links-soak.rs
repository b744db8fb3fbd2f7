//! False alarms under load: `cargo run --release -p havm-links --example links-soak -- [SECONDS] [BUSY]`
//!
//! Two links over loopback, an ack 20 times a second, `BUSY` threads that compute without pause.
//! Prints one JSON line: silences and link failures reported by either side (each is a false
//! alarm), and the round trip under that load. Default 120 s, 4 threads, the default timers.

use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId, Term};
use havm_links::beat::Timers;
use havm_links::identity::Identity;
use havm_links::incoming::{Expect, In, Incoming, IncomingSpec};
use havm_links::link::run_sooner;
use havm_links::outgoing::{OutEvent, Outgoing, OutgoingSpec};
use havm_wire::back::Back;
use havm_wire::frame::Frame;
use havm_wire::hello::StreamHello;
use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

type Failure = Box<dyn Error + Send + Sync>;

const PATIENCE: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_millis(50);

static ALARMS: AtomicU64 = AtomicU64::new(0);
static OVER: AtomicBool = AtomicBool::new(false);

fn main() -> Result<(), Failure> {
    let args: Vec<u64> = std::env::args()
        .skip(1)
        .map(|a| a.parse())
        .collect::<Result<_, _>>()?;
    let seconds = args.first().copied().unwrap_or(120);
    let busy = args.get(1).copied().unwrap_or(4);
    let (a, b) = (Identity::generate()?, Identity::generate()?);
    let hello = StreamHello {
        guest: "soak".parse()?,
        term: Term(1),
        stream: StreamId([1; 16]),
        my_life: LifeId([2; 16]),
        peer_life: LifeId([3; 16]),
    };
    let timers = Timers::default();
    let incoming = Incoming::listen(IncomingSpec {
        identity: b.clone(),
        peer: a.fingerprint(),
        bind: vec![IpAddr::V4(Ipv4Addr::LOCALHOST); 2],
        ports: 0..=0,
        expect: Expect {
            guest: hello.guest.clone(),
            term: None,
            my_life: None,
            peer_life: None,
        },
        window_bytes: 1 << 20,
        timers,
    })?;
    let out = Outgoing::connect(OutgoingSpec {
        identity: a,
        peer: b.fingerprint(),
        links: incoming.ports().iter().map(|p| (None, *p)).collect(),
        hello,
        window_bytes: 1 << 20,
        timers,
    })?;
    std::thread::scope(|s| {
        let standby = s.spawn(|| serve(&incoming));
        while out.links_up() < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        for _ in 0..busy {
            s.spawn(|| {
                let mut x = 1u64;
                while !OVER.load(SeqCst) {
                    (0..100_000).for_each(|i| x = std::hint::black_box(x.wrapping_mul(31) + i));
                }
            });
        }
        let done = drive(&out, Duration::from_secs(seconds));
        OVER.store(true, SeqCst);
        standby
            .join()
            .map_err(|_| "the receiving thread panicked")??;
        let mut us = done?;
        us.sort_unstable();
        let at = |p: usize| us.get(us.len() * p / 100).copied().unwrap_or(0);
        println!(
            "{{\"seconds\":{seconds},\"busy\":{busy},\"silent_after_ms\":{},\"false_alarms\":{},\"rtt_us\":{{\"p50\":{},\"p99\":{},\"max\":{}}}}}",
            timers.silent_after.as_millis(),
            ALARMS.load(SeqCst),
            at(50),
            at(99),
            us.last().copied().unwrap_or(0)
        );
        Ok(())
    })
}

fn alarm(what: &str) {
    ALARMS.fetch_add(1, SeqCst);
    eprintln!("false alarm: {what}");
}

fn drive(out: &Outgoing, how_long: Duration) -> Result<Vec<u64>, Failure> {
    run_sooner();
    let start = Instant::now();
    let mut us = Vec::new();
    for n in 1.. {
        if start.elapsed() >= how_long {
            break;
        }
        std::thread::sleep(EVERY);
        let sent = Instant::now();
        out.send(Frame::VerifyEnd { id: n }.encode()?, PATIENCE)?;
        loop {
            match out.event(PATIENCE).ok_or("no ack")? {
                OutEvent::Back(Back::Ack { epoch, .. }) if epoch.n.0 == n => break,
                OutEvent::Silent => alarm("the primary heard nothing"),
                OutEvent::LinkDown(i, why) => alarm(&format!("primary's link {i}: {why}")),
                OutEvent::Broken(why) => return Err(why.into()),
                _ => {}
            }
        }
        us.push(sent.elapsed().as_micros() as u64);
    }
    Ok(us)
}

fn serve(incoming: &Incoming) -> Result<(), Failure> {
    run_sooner();
    while !OVER.load(SeqCst) {
        match incoming.recv(EVERY) {
            Some(In::NewStream(h)) => {
                incoming.accept(h.stream);
            }
            Some(In::Frame(raw)) => {
                if let Frame::VerifyEnd { id } = Frame::decode(&raw)? {
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
            }
            Some(In::Silent) => alarm("the standby heard nothing"),
            Some(In::LinkDown(i, why)) => alarm(&format!("standby's link {i}: {why}")),
            Some(In::Broken(why)) => return Err(why.into()),
            _ => {}
        }
    }
    Ok(())
}
