//! The gate's cost: TCP throughput and round trips through it, beside a plain bridge between the
//! same kind of ends, in one run.

use crate::gate_lab::{CLIENT, GUEST, Lab, PLAIN, run};
use crate::report::Found;
use crate::stats::{median, round, spread};
use anyhow::{Context, Result, bail, ensure};
use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId, Term};
use havm_gate::{Gate, Limits};
use havm_wire::acked::{AckLedger, AckOutcome, AckedEpoch};
use havm_wire::back::Back;
use serde_json::{Value, json};
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Round trips of a run, after some that warm up.
const PINGS: usize = 3000;
const WARM_UP: usize = 500;
/// Length of a run of iperf3, seconds.
const SECONDS: u32 = 3;
/// Runs of each path, in turns.
const ROUNDS: usize = 5;

/// See the module.
///
/// # Errors
/// No iperf3, or a namespace could not be made.
pub fn measure() -> Result<Found> {
    let lab = Lab::new();
    let gate = lab.gate(Limits::default());
    gate.pass(true);
    // In turns, so that what else the machine does falls on both.
    let (mut plain, mut gated) = (Runs::default(), Runs::default());
    for _ in 0..ROUNDS {
        plain.measure(&lab, "P", PLAIN)?;
        gated.measure(&lab, "G", GUEST)?;
    }
    let counters = gate.counters();
    let held = paced(&lab, &gate)?;
    drop(gate);
    let gate = lab.gate(Limits {
        shortcut: false,
        ..Limits::default()
    });
    gate.pass(true);
    let mut threads = Runs::default();
    threads.measure(&lab, "G", GUEST)?;
    let ratio = |row: fn(&Runs) -> &Vec<f64>| {
        let pairs = row(&gated).iter().zip(row(&plain));
        median(pairs.map(|(g, p)| g / p)).context("no run was made")
    };
    let bridge = median(plain.out.clone()).context("no run was made")?;
    let mut found = Found::default();
    found.seen("gate_throughput_ratio", ratio(|r| &r.out)?, bridge);
    found.detail = json!({
        "plain": plain.json(),
        "gate": gated.json(),
        "gate_without_shortcut": threads.json(),
        "gate_holding_10ms": held,
        "in_ratio": ratio(|r| &r.inn)?,
        "mean_out_frame_bytes": counters.out_bytes / counters.out_frames.max(1),
        "frames_lost": counters.overflowed + counters.out_failed + counters.unusable,
        "rounds": ROUNDS, "seconds": SECONDS,
    });
    Ok(found)
}

/// What one kind of path gave, run by run.
#[derive(Default)]
struct Runs {
    out: Vec<f64>,
    inn: Vec<f64>,
    rtt_p50: Vec<f64>,
    rtt_p99: Vec<f64>,
}

impl Runs {
    fn measure(&mut self, lab: &Lab, ns: &str, ip: &str) -> Result<()> {
        self.out.push(iperf(lab, ns, false)?);
        self.inn.push(iperf(lab, ns, true)?);
        let rtt = spread(rtt(lab, ns, ip)?).context("no datagram came back")?;
        self.rtt_p50.push(rtt.p50);
        self.rtt_p99.push(rtt.p99);
        Ok(())
    }

    fn json(&self) -> Value {
        json!({
            "out_gbps": spread(self.out.clone()), "in_gbps": spread(self.inn.clone()),
            "rtt_us_p50": median(self.rtt_p50.clone()), "rtt_us_p99": median(self.rtt_p99.clone()),
        })
    }
}

/// TCP from the namespace to the client, or the other way; Gbit/s received.
fn iperf(lab: &Lab, ns: &str, reverse: bool) -> Result<f64> {
    let (c, n) = (lab.ns("C"), lab.ns(ns));
    let mut server = Command::new("ip")
        .args(["netns", "exec", &c, "iperf3", "-s", "-1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start iperf3")?;
    std::thread::sleep(Duration::from_millis(300));
    let extra = if reverse { "-R" } else { "" };
    let bound = SECONDS + 15;
    let text = run(&format!(
        "timeout {bound} ip netns exec {n} iperf3 -J -t {SECONDS} -c {CLIENT} {extra}"
    ));
    // It serves one run and ends; where it did not, it is ours to end.
    let _ = server.kill();
    let _ = server.wait();
    let v: Value = serde_json::from_str(&text).context("what iperf3 says")?;
    let bits = v["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(round(bits.context("iperf3 tells no throughput")? / 1e9))
}

/// UDP ping-pong of 64 bytes: microseconds.
fn rtt(lab: &Lab, ns: &str, ip: &str) -> Result<Vec<f64>> {
    let ping = lab.udp(ns, ip, CLIENT);
    let pong = lab.udp("C", CLIENT, ip);
    for s in [&ping, &pong] {
        s.set_read_timeout(Some(Duration::from_millis(500)))?;
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| echo(&pong, &stop));
        let mut times = Vec::with_capacity(PINGS);
        let mut buf = [7u8; 64];
        for i in 0..PINGS + WARM_UP {
            let t = Instant::now();
            // What is lost has no round trip.
            if ping.send(&buf).is_ok() && ping.recv(&mut buf).is_ok() && i >= WARM_UP {
                times.push(t.elapsed().as_nanos() as f64 / 1000.0);
            }
        }
        stop.store(true, Ordering::SeqCst);
        Ok(times)
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

/// Acks as a standby's, in the order in which the epochs are closed.
struct Acks {
    ledger: AckLedger,
    life: LifeId,
}

impl Acks {
    /// Closes the next epoch.
    fn close(&mut self) -> Result<EpochNo> {
        let mut e = self.ledger.open(false)?;
        e.begin()?;
        e.device_state(&[0])?;
        let n = e.n();
        self.ledger.close(e, true, false)?;
        Ok(n)
    }

    fn ack(&mut self, n: EpochNo) -> Result<AckedEpoch> {
        let epoch: EpochId = self.ledger.id(n);
        match self.ledger.on_back(&Back::Ack {
            epoch,
            life: self.life,
        })? {
            AckOutcome::Proof(p) => Ok(p),
            other => bail!("an ack of epoch {n} proves nothing: {other:?}"),
        }
    }
}

/// Throughput and barriers while the gate holds, with an epoch every 10 ms that is acked 2 ms later.
fn paced(lab: &Lab, gate: &Gate) -> Result<Value> {
    let (stream, term, life) = (StreamId([1; 16]), Term(1), LifeId([2; 16]));
    let mut acks = Acks {
        ledger: AckLedger::new(term, stream, life),
        life,
    };
    gate.hold(stream, term, EpochNo(1));
    let stop = AtomicBool::new(false);
    let (out, barriers) = std::thread::scope(|s| {
        let pacer = s.spawn(|| -> Result<Vec<f64>> {
            let mut times = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(8));
                let n = acks.close()?;
                let t = Instant::now();
                gate.barrier(n);
                times.push(t.elapsed().as_nanos() as f64 / 1000.0);
                std::thread::sleep(Duration::from_millis(2));
                gate.release(acks.ack(n)?);
            }
            Ok(times)
        });
        let out = iperf(lab, "G", false);
        stop.store(true, Ordering::SeqCst);
        (out, pacer.join())
    });
    let Ok(barriers) = barriers else {
        bail!("the thread that paces panicked")
    };
    let barriers = barriers?;
    ensure!(!barriers.is_empty(), "no epoch was closed");
    Ok(json!({"out_gbps": out?, "barrier_us": spread(barriers)}))
}
