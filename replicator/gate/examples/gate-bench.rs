//! The gate's cost: TCP throughput and round trips through it, beside a plain bridge between the
//! same kind of ends, in one run. Prints JSON. Needs root and iperf3.
//!
//! `cargo run --release -p havm-gate --example gate-bench [seconds a run] [rounds]`

#[path = "../tests/common/mod.rs"]
mod common;

use common::{CLIENT, GUEST, Lab, PLAIN};
use havm_core::ids::{EpochId, EpochNo, StreamId, Term};
use havm_gate::{Gate, Limits};
use havm_wire::acked::AckedEpoch;
use serde_json::{Value, json};
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PINGS: usize = 3000;

fn main() {
    let mut args = std::env::args().skip(1);
    let seconds: u32 = args.next().and_then(|s| s.parse().ok()).unwrap_or(2);
    let rounds: usize = args.next().and_then(|s| s.parse().ok()).unwrap_or(5);
    assert!(common::usable(), "needs root");
    let lab = Lab::new();
    let gate = lab.gate(Limits::default());
    gate.pass(true);
    // In turns, so that what else the machine does falls on both.
    let (mut plain, mut gated) = (Runs::default(), Runs::default());
    for _ in 0..rounds {
        plain.measure(&lab, "P", PLAIN, seconds);
        gated.measure(&lab, "G", GUEST, seconds);
    }
    let counters = gate.counters();
    let held = paced(&lab, &gate, seconds.max(3));
    drop(gate);
    let gate = lab.gate(Limits {
        shortcut: false,
        ..Limits::default()
    });
    gate.pass(true);
    let mut threads = Runs::default();
    threads.measure(&lab, "G", GUEST, seconds);
    let ratio = |f: fn(&Runs) -> &Vec<f64>| {
        round(median(
            f(&gated)
                .iter()
                .zip(f(&plain))
                .map(|(g, p)| g / p)
                .collect(),
        ))
    };
    let report = json!({
        "plain": plain.json(),
        "gate": gated.json(),
        "gate_without_shortcut": threads.json(),
        "gate_holding_10ms": held,
        "out_ratio": ratio(|r| &r.out),
        "in_ratio": ratio(|r| &r.inn),
        "rtt_added_us_p50": round(median(gated.rtt.clone()) - median(plain.rtt.clone())),
        "mean_out_frame_bytes": counters.out_bytes / counters.out_frames.max(1),
        "frames_lost": counters.overflowed + counters.out_failed + counters.unusable,
        "rounds": rounds, "seconds": seconds,
    });
    println!(
        "{}",
        serde_json::to_string_pretty(&report).expect("a report")
    );
}

fn num(v: &Value) -> f64 {
    v.as_f64().unwrap_or(f64::NAN)
}

fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What one kind of path gave, run by run.
#[derive(Default)]
struct Runs {
    out: Vec<f64>,
    inn: Vec<f64>,
    rtt: Vec<f64>,
    rtt_p99: Vec<f64>,
}

impl Runs {
    fn measure(&mut self, lab: &Lab, ns: &str, ip: &str, seconds: u32) {
        self.out.push(iperf(lab, ns, seconds, false));
        self.inn.push(iperf(lab, ns, seconds, true));
        let (p50, p99) = rtt(lab, ns, ip);
        self.rtt.push(p50);
        self.rtt_p99.push(p99);
    }

    fn json(&self) -> Value {
        json!({
            "out_gbps": median(self.out.clone()), "in_gbps": median(self.inn.clone()),
            "rtt_us_p50": median(self.rtt.clone()), "rtt_us_p99": median(self.rtt_p99.clone()),
        })
    }
}

/// TCP from the namespace to the client, or the other way; Gbit/s received.
fn iperf(lab: &Lab, ns: &str, seconds: u32, reverse: bool) -> f64 {
    let (c, n) = (lab.ns("C"), lab.ns(ns));
    let mut server = Command::new("ip")
        .args(["netns", "exec", &c, "iperf3", "-s", "-1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("iperf3 starts");
    std::thread::sleep(Duration::from_millis(300));
    let extra = if reverse { "-R" } else { "" };
    let text = common::run(&format!(
        "timeout {} ip netns exec {n} iperf3 -J -t {seconds} -c {CLIENT} {extra}",
        seconds + 15
    ));
    let _ = server.kill();
    let _ = server.wait();
    let v: Value = serde_json::from_str(&text).expect("JSON of iperf3");
    round(num(&v["end"]["sum_received"]["bits_per_second"]) / 1e9)
}

/// UDP ping-pong of 64 bytes: microseconds, median and 99th percentile.
fn rtt(lab: &Lab, ns: &str, ip: &str) -> (f64, f64) {
    let ping = lab.udp(ns, ip, CLIENT);
    let pong = lab.udp("C", CLIENT, ip);
    for s in [&ping, &pong] {
        s.set_read_timeout(Some(Duration::from_millis(500)))
            .expect("a timeout");
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| echo(&pong, &stop));
        let mut times: Vec<f64> = Vec::with_capacity(PINGS);
        let mut buf = [7u8; 64];
        for i in 0..PINGS + 500 {
            let t = Instant::now();
            ping.send(&buf).expect("send");
            if ping.recv(&mut buf).is_ok() && i >= 500 {
                times.push(t.elapsed().as_nanos() as f64 / 1000.0);
            }
        }
        stop.store(true, Ordering::SeqCst);
        times.sort_by(f64::total_cmp);
        (
            round(times[times.len() / 2]),
            round(times[times.len() * 99 / 100]),
        )
    })
}

fn echo(s: &UdpSocket, stop: &AtomicBool) {
    let mut buf = [0u8; 64];
    while !stop.load(Ordering::SeqCst) {
        if s.recv(&mut buf).is_ok() {
            let _ = s.send(&buf);
        }
    }
}

/// Throughput and barriers while the gate holds, with an epoch every 10 ms that is acked 2 ms later.
fn paced(lab: &Lab, gate: &Gate, seconds: u32) -> Value {
    let (stream, term) = (StreamId([1; 16]), Term(1));
    gate.hold(stream, term, EpochNo(1));
    let stop = AtomicBool::new(false);
    let mut barriers: Vec<f64> = Vec::new();
    let out = std::thread::scope(|s| {
        let pacer = s.spawn(|| {
            let mut times = Vec::new();
            let mut n = EpochNo(1);
            while !stop.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(8));
                let t = Instant::now();
                gate.barrier(n);
                times.push(t.elapsed().as_nanos() as f64 / 1000.0);
                std::thread::sleep(Duration::from_millis(2));
                gate.release(AckedEpoch::for_tests(EpochId { term, stream, n }));
                n = n.next();
            }
            times
        });
        let out = iperf(lab, "G", seconds, false);
        stop.store(true, Ordering::SeqCst);
        barriers = pacer.join().expect("no panic");
        out
    });
    barriers.sort_by(f64::total_cmp);
    let at = |q: f64| round(barriers[((barriers.len() - 1) as f64 * q) as usize]);
    json!({"out_gbps": out, "barrier_us_p50": at(0.5), "barrier_us_p99": at(0.99), "barrier_us_max": at(1.0)})
}
