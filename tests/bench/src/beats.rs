//! Detection under load: two nodes' heartbeats over loopback at the default settings, four busy loops on
//! all cores. False alarms in two minutes first; then nodes die, and the other's verdict is timed.

use crate::report::Found;
use crate::stats::{median, spread};
use anyhow::{Context, Result};
use havm_config::model::Detection;
use havm_core::detector::DetectorSettings;
use havm_core::event::Peer;
use havm_core::ids::NodeId;
use havm_daemon::beats::{BeatEvent, BeatLink, BeatSettings, Beats, monotonic};
use havm_daemon::identity_store::PairKey;
use serde_json::json;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How long no alarm may be raised.
const LOOK: Duration = Duration::from_secs(120);
/// Busy loops: twice the cores of the machine that the target was set on.
const BUSY: usize = 4;
/// Deaths whose detection is timed.
const DEATHS: usize = 30;

/// See the module.
///
/// # Errors
/// No sockets, or a node did not see the other.
pub fn measure() -> Result<Found> {
    let d = Detection::default();
    let settings = DetectorSettings {
        interval: Duration::from_millis(d.beat_ms),
        suspect_after: Duration::from_millis(d.lost_ms / 2),
        lost_after: Duration::from_millis(d.lost_ms),
    };
    let links = ends()?;
    let (a, mut heard) = start(1, &links, settings)?;
    let (b, mut heard_b) = start(2, &links, settings)?;
    wait(&mut heard, Peer::Alive)?;
    wait(&mut heard_b, Peer::Alive)?;
    let busy = Busy::start()?;
    let cpu = cpu_of_beats();
    std::thread::sleep(LOOK);
    let cpu = cpu_of_beats().saturating_sub(cpu);
    let alarm = |e: &BeatEvent| {
        matches!(
            e,
            BeatEvent::Verdict {
                peer: Peer::Lost,
                ..
            }
        )
    };
    let late = |e: &BeatEvent| {
        matches!(
            e,
            BeatEvent::Verdict {
                peer: Peer::Suspect,
                ..
            }
        )
    };
    let events: Vec<BeatEvent> = heard.try_iter().chain(heard_b.try_iter()).collect();
    let alarms = events.iter().filter(|e| alarm(e)).count();
    let shown: Vec<_> = [&a, &b].map(Beats::snapshot).into_iter().collect();

    let mut took = Vec::new();
    let mut b = Some(b);
    for _ in 0..DEATHS {
        let gone = monotonic();
        drop(b.take());
        let at = wait(&mut heard, Peer::Lost)?;
        took.push(at.saturating_sub(gone).as_secs_f64() * 1000.0);
        b = Some(start(2, &links, settings)?.0);
        wait(&mut heard, Peer::Alive)?;
    }
    drop(busy);
    let mut found = Found::default();
    found.seen("false_alarms", alarms as f64, 0.0);
    found.seen(
        "detection",
        median(took.clone()).context("nobody died")?,
        d.lost_ms as f64,
    );
    found.detail = json!({
        "beat_ms": d.beat_ms, "lost_ms": d.lost_ms, "busy_loops": BUSY, "seconds": LOOK.as_secs(),
        "alarms": alarms, "suspicions_that_passed": events.iter().filter(|e| late(e)).count(),
        "detection_ms": spread(took),
        "cpu_ms_of_both_nodes": cpu.as_millis(),
        "latest_send_ms": shown.iter().map(|s| s.latest_send.as_secs_f64() * 1000.0).collect::<Vec<_>>(),
        "scheduling": shown.iter().map(|s| format!("{:?}", s.scheduling)).collect::<Vec<_>>(),
        "beats_lost": shown.iter().flat_map(|s| &s.links).map(|l| l.counters.lost).sum::<u64>(),
    });
    Ok(found)
}

/// Addresses of two links: node 1's, node 2's.
fn ends() -> Result<Vec<(SocketAddr, SocketAddr)>> {
    (0..2u8)
        .map(|i| {
            let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
            let at = |host| ([127, 45, i, host], port).into();
            Ok((at(1), at(2)))
        })
        .collect()
}

fn start(
    me: u8,
    links: &[(SocketAddr, SocketAddr)],
    detector: DetectorSettings,
) -> Result<(Beats, Receiver<BeatEvent>)> {
    let (tx, rx) = channel();
    let links = links.iter().map(|&(one, two)| {
        if me == 1 {
            BeatLink {
                local: one,
                peer: two,
            }
        } else {
            BeatLink {
                local: two,
                peer: one,
            }
        }
    });
    let settings = BeatSettings {
        node: NodeId([me; 16]),
        peer: NodeId([3 - me; 16]),
        key: PairKey([7; 32]),
        links: links.collect(),
        detector,
    };
    let beats = Beats::start(settings, move |e| {
        // The bench may have heard enough.
        let _ = tx.send(e);
    });
    Ok((beats.context("heartbeats")?, rx))
}

/// Waits for a verdict; when it was reached.
fn wait(heard: &mut Receiver<BeatEvent>, want: Peer) -> Result<Duration> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let event = heard.recv_timeout(left);
        match event.with_context(|| format!("no verdict {want:?} within 10 s"))? {
            BeatEvent::Verdict { peer, at } if peer == want => return Ok(at),
            _ => {}
        }
    }
}

/// Processes that want all of the processor; they end with this.
struct Busy(Vec<Child>);

impl Busy {
    fn start() -> Result<Busy> {
        let mut busy = Busy(Vec::new());
        for _ in 0..BUSY {
            let mut c = Command::new("/bin/sh");
            c.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
            busy.0.push(c.spawn().context("a busy loop")?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for c in &mut self.0 {
            // Ours, by its handle; it may have been ended from outside.
            let _ = c.kill();
            let _ = c.wait();
        }
    }
}

/// CPU time of the beat threads of this process, from /proc (ticks of 10 ms).
fn cpu_of_beats() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let ticks: u64 = tasks
        .filter_map(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
            let (_, rest) = stat.split_once("(havm-beat-")?;
            let (_, rest) = rest.split_once(") ")?;
            // user and system time, fields 14 and 15 of proc(5)
            let fields = rest.split(' ').skip(11).take(2);
            Some(fields.filter_map(|f| f.parse::<u64>().ok()).sum::<u64>())
        })
        .sum();
    Duration::from_millis(ticks * 10)
}
