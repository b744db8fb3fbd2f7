//! One run of the client from start to proof.

use super::control::{self, Line};
use super::ledger::{Gap, Ledger};
use super::probe;
use super::proof::prove;
use super::worker::{Pace, Shared, Worker};
use crate::proto::PORT;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The guest.
    pub guest: IpAddr,
    /// Connections whose requests go in turn.
    pub connections: usize,
    /// Between an answer and the next request on them.
    pub think: Duration,
    /// Connections that send every so often.
    pub paced: usize,
    /// How often these send.
    pub every: Duration,
    /// Between two datagrams of the probe; zero for none.
    pub probe: Duration,
    /// How long to try to connect.
    pub connect_time: Duration,
    /// How long to wait at the end for answers that are still open.
    pub drain: Duration,
    /// Where to take lines from; stdin if none.
    pub socket: Option<PathBuf>,
    /// Stop by itself after this long.
    pub time: Option<Duration>,
}

/// What `stats` and `mark` answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Milliseconds since the start; gaps count from there too.
    pub now_ms: f64,
    /// The start by the wall clock, Unix milliseconds.
    pub start_unix_ms: f64,
    /// Answers so far.
    pub answers: u64,
    /// Connections not broken.
    pub connections: u64,
    /// Requests under way.
    pub outstanding: u64,
    /// The largest gap between answers since the mark, an open one included.
    pub max_gap: Gap,
    /// The largest gap between the probe's replies since the mark, an open one included.
    pub probe_max_gap: Gap,
    /// The probe's replies so far.
    pub probe_received: u64,
    /// Broken connections and why.
    pub failures: Vec<String>,
}

/// Runs until `stop`; prints `{"ready":true}` once all connections stand.
pub fn run(plan: &Plan) -> Result<()> {
    // Two runs against one guest must not share connection numbers.
    let run_id = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_micros() as u64)
        << 12;
    let count = plan.connections + plan.paced;
    let streams: Vec<TcpStream> = (0..count).map(|_| connect(plan)).collect::<Result<_>>()?;
    let shared = Shared {
        ledger: Arc::new(Mutex::new(Ledger::new(
            (0..count as u64).map(|i| run_id | (i + 1)),
        ))),
        start: Instant::now(),
        stopping: Arc::new(AtomicBool::new(false)),
    };
    let start_wall = SystemTime::now();
    let lines = control::lines(plan.socket.as_deref())?;
    if !plan.probe.is_zero() {
        probe::start(plan.guest, plan.probe, &shared)?;
    }
    let mut workers = Vec::new();
    for (index, stream) in streams.into_iter().enumerate() {
        let in_turn = index < plan.connections;
        let pace = if in_turn {
            Pace::InTurn(plan.think)
        } else {
            Pace::Every(plan.every)
        };
        let worker = Worker {
            index,
            pace,
            stream,
            shared: shared.clone(),
        };
        let drain = plan.drain;
        workers.push(std::thread::spawn(move || worker.run(drain)));
    }
    println!("{{\"ready\":true}}");
    loop {
        let line = match plan.time {
            None => lines.recv().ok(),
            Some(time) => match lines.recv_timeout(time.saturating_sub(shared.start.elapsed())) {
                Err(RecvTimeoutError::Timeout) => Some(Line::print("stop")),
                line => line.ok(),
            },
        };
        let Some(line) = line else { return Ok(()) };
        match line.text.trim() {
            "" => {}
            "stats" => line.answer(&serde_json::to_string(&stats(&shared, start_wall))?),
            "mark" => {
                shared.book().mark();
                line.answer(&serde_json::to_string(&stats(&shared, start_wall))?);
            }
            "stop" => {
                let end_ms = shared.now_ms();
                shared.stopping.store(true, Ordering::Relaxed);
                for worker in workers {
                    if worker.join().is_err() {
                        anyhow::bail!("a worker of the client failed");
                    }
                }
                let proof = prove(&shared.book(), end_ms, plan.guest);
                line.answer(&serde_json::to_string(&proof)?);
                if let Some(socket) = &plan.socket {
                    std::fs::remove_file(socket).context("removing the socket")?;
                }
                return Ok(());
            }
            other => {
                let text = format!("{other:?} is none of stats, mark, stop");
                line.answer(&serde_json::json!({ "error": text }).to_string());
            }
        }
    }
}

fn connect(plan: &Plan) -> Result<TcpStream> {
    let address = SocketAddr::new(plan.guest, PORT);
    let end = Instant::now() + plan.connect_time;
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(e) if Instant::now() >= end => {
                return Err(e).with_context(|| format!("no testifying guest at {address}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn stats(shared: &Shared, start_wall: SystemTime) -> Stats {
    let now_ms = shared.now_ms();
    let book = shared.book();
    Stats {
        now_ms,
        start_unix_ms: start_wall
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0.0, |d| d.as_secs_f64() * 1000.0),
        answers: book.conns.iter().map(|c| c.answers).sum(),
        connections: book.conns.iter().filter(|c| c.failure.is_none()).count() as u64,
        outstanding: book.outstanding(),
        max_gap: book.gaps.since_mark(now_ms),
        probe_max_gap: book.probe.gaps.since_mark(now_ms),
        probe_received: book.probe.received,
        failures: book.failures(),
    }
}
