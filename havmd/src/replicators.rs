//! One `havm-replicator` process a guest, which outlives this daemon.
//!
//! ```text
//!   StartReplicator ─> living by its pid file? ──no──> spawn detached ─┐
//!                              │ yes (adoption)                        │ socket appears
//!                              └──────────> connect, Status <──────────┘
//!                                             │ first State
//!                                        ReplicatorUp ─> Report… ─> (pidfd) ReplicatorLost
//! ```
//! One task a process reads the reports and watches the pidfd, so that nothing is reported of a
//! process after its loss. Orders are written by the daemon's loop itself, without waiting.

use crate::detach;
use crate::process::{Process, read_pid_file};
use havm_core::event::Event;
use havm_core::order::{CONTROL_VERSION, MAX_LINE_BYTES, Order, ReplicaState, Report};
use havm_core::spec::Spec;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::sync::Notify;

/// How long a replicator may take from its start until it answers.
const START_TIMEOUT: Duration = Duration::from_secs(15);
/// Unwritten orders at which a replicator counts as hung and is killed.
const MAX_BACKLOG_BYTES: usize = 1024 * 1024;
/// How long it has for `Quit` before it is killed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Where events of this guest go.
pub type Post = Arc<dyn Fn(Event) + Send + Sync>;

/// What is needed to find or start a guest's replicator.
#[derive(Debug, Clone)]
pub struct Place {
    /// The program.
    pub program: PathBuf,
    /// `RUN_DIR/g/GUEST`.
    pub run_dir: PathBuf,
    /// The scope's name under systemd.
    pub unit: String,
}

#[derive(Default)]
struct Wire {
    stream: Option<Arc<UnixStream>>,
    backlog: Vec<u8>,
}

/// A guest's replicator.
#[derive(Clone)]
pub struct Replicator {
    place: Place,
    wire: Arc<Mutex<Wire>>,
    more: Arc<Notify>,
    process: Arc<Mutex<Option<Process>>>,
    task: Arc<Mutex<Option<tokio::task::JoinHandle<()>>>>,
}

impl Replicator {
    /// A handle to a replicator that may or may not run.
    pub fn new(place: Place) -> Self {
        Replicator {
            place,
            wire: Arc::default(),
            more: Arc::default(),
            process: Arc::default(),
            task: Arc::default(),
        }
    }

    /// Finds the one that outlived the last daemon and asks for its state; its reports are posted
    /// from now on, behind the events that the caller posts before it returns.
    pub async fn adopt(&self, post: &Post) -> Option<ReplicaState> {
        let process = living(&self.place.run_dir)?;
        match self.connect_once().await {
            Ok((state, reader)) => {
                self.serve(process, None, reader, post.clone());
                Some(state)
            }
            Err(e) => {
                // Of no use to this daemon, and it holds the disk: it must go.
                tracing::warn!(pid = process.id.pid, error = %e,
                    "the running replicator does not answer as it should; it is killed");
                process.kill();
                let _ = tokio::time::timeout(Duration::from_secs(5), process.gone()).await;
                None
            }
        }
    }

    /// Starts one, or connects to the living one; posts `ReplicatorUp`, or `ReplicatorLost` where
    /// that fails.
    pub fn start(&self, post: Post) {
        let me = self.clone();
        tokio::spawn(async move {
            match me.bring_up().await {
                Ok((process, child, state, reader)) => {
                    me.serve_after(process, child, reader, post, state);
                }
                Err(e) => {
                    tracing::error!(error = %e, log = %Spec::log_file(&me.place.run_dir).display(),
                        "the replicator does not start; see its log");
                    post(Event::ReplicatorLost);
                }
            }
        });
    }

    /// `Quit`, then a kill where that is not enough. `ReplicatorLost` comes from its watcher.
    pub fn stop(&self, post: &Post) {
        let process = lock(&self.process).as_ref().and_then(|p| p.again().ok());
        let Some(process) = process else {
            post(Event::ReplicatorLost);
            return;
        };
        self.order(&Order::Quit);
        tokio::spawn(async move {
            let Ok(watch) = process.again() else {
                return process.kill();
            };
            if tokio::time::timeout(QUIT_TIMEOUT, watch.gone())
                .await
                .is_err()
            {
                process.kill();
            }
        });
    }

    /// Writes an order; false where there is no replicator to write it to.
    pub fn order(&self, order: &Order) -> bool {
        let mut line = match serde_json::to_vec(order) {
            Ok(l) if l.len() < MAX_LINE_BYTES => l,
            Ok(_) => {
                tracing::error!("an order over the bound was not sent");
                return false;
            }
            Err(e) => {
                tracing::error!(error = %e, "an order could not be written");
                return false;
            }
        };
        line.push(b'\n');
        let mut wire = lock(&self.wire);
        let Some(stream) = wire.stream.clone() else {
            return false;
        };
        if wire.backlog.len() + line.len() > MAX_BACKLOG_BYTES {
            tracing::error!("the replicator takes no orders any more; it is killed");
            if let Some(p) = lock(&self.process).as_ref() {
                p.kill();
            }
            return false;
        }
        let written = if wire.backlog.is_empty() {
            stream.try_write(&line).unwrap_or(0)
        } else {
            0
        };
        if written < line.len() {
            wire.backlog.extend_from_slice(&line[written..]);
            self.more.notify_one();
        }
        true
    }

    /// Lets go of it: no more orders or reports through this handle. What a daemon's end does.
    pub fn hang_up(&self) {
        if let Some(t) = lock(&self.task).take() {
            t.abort();
        }
        *lock(&self.wire) = Wire::default();
    }

    /// Its process id, for status.
    pub fn pid(&self) -> Option<i32> {
        lock(&self.process).as_ref().map(|p| p.id.pid)
    }

    async fn bring_up(
        &self,
    ) -> io::Result<(Process, Option<std::process::Child>, ReplicaState, Reader)> {
        if let Some(process) = living(&self.place.run_dir) {
            let (state, reader) = self.connect_once().await?;
            return Ok((process, None, state, reader));
        }
        // A socket of a dead one would only refuse connections.
        let _ = std::fs::remove_file(Spec::control_socket(&self.place.run_dir));
        let spec = Spec::path(&self.place.run_dir);
        let mut child = detach::spawn(
            &self.place.program,
            &["--spec", &spec.to_string_lossy()],
            &self.place.unit,
            &Spec::log_file(&self.place.run_dir),
        )
        .map_err(|e| {
            io::Error::other(format!(
                "cannot start {}: {e}",
                self.place.program.display()
            ))
        })?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(io::Error::other(format!("it ended at once: {status}")));
            }
            if let Some(process) = living(&self.place.run_dir)
                && let Ok((state, reader)) = self.connect_once().await
            {
                return Ok((process, Some(child), state, reader));
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(io::Error::other(format!(
                    "it did not answer within {} s",
                    START_TIMEOUT.as_secs()
                )));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Connects and asks for the state; makes this connection the one that orders go to.
    async fn connect_once(&self) -> io::Result<(ReplicaState, Reader)> {
        let path = Spec::control_socket(&self.place.run_dir);
        let work = async {
            let stream = Arc::new(UnixStream::connect(&path).await?);
            let mut line = serde_json::to_vec(&Order::Status).map_err(io::Error::other)?;
            line.push(b'\n');
            // A new connection's buffer takes a short line whole.
            stream.writable().await?;
            if stream.try_write(&line)? != line.len() {
                return Err(io::Error::other("its control socket is full"));
            }
            let mut reader = Reader::new(stream.clone());
            loop {
                match reader.next().await? {
                    Report::State(s) if s.version == CONTROL_VERSION => {
                        let mut wire = lock(&self.wire);
                        wire.stream = Some(stream);
                        wire.backlog.clear();
                        return Ok((s, reader));
                    }
                    Report::State(s) => {
                        return Err(io::Error::other(format!(
                            "it speaks control version {}, this daemon {CONTROL_VERSION}",
                            s.version
                        )));
                    }
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(5), work)
            .await
            .map_err(|_| io::Error::other("no answer to Status within 5 s"))?
    }

    fn serve_after(
        &self,
        process: Process,
        child: Option<std::process::Child>,
        reader: Reader,
        post: Post,
        state: ReplicaState,
    ) {
        post(Event::ReplicatorUp(Box::new(state)));
        self.serve(process, child, reader, post);
    }

    /// Reads its reports until the process is gone.
    fn serve(
        &self,
        process: Process,
        child: Option<std::process::Child>,
        reader: Reader,
        post: Post,
    ) {
        *lock(&self.process) = process.again().ok();
        let me = self.clone();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = me.read_until_gone(process, reader, &post) => {}
                () = flush(me.wire.clone(), me.more.clone()) => {}
            }
            *lock(&me.wire) = Wire::default();
            *lock(&me.process) = None;
            if let Some(mut c) = child {
                // Dead already: this only takes its exit status, so that no zombie stays.
                let _ = c.wait();
            }
            post(Event::ReplicatorLost);
        });
        *lock(&self.task) = Some(task);
    }

    async fn read_until_gone(&self, process: Process, reader: Reader, post: &Post) {
        let mut gone = Box::pin(process.gone());
        let mut reader = Some(reader);
        loop {
            let Some(r) = reader.as_mut() else {
                // The connection broke and the process lives: connect again.
                tokio::select! {
                    biased;
                    _ = &mut gone => return,
                    () = tokio::time::sleep(Duration::from_millis(50)) => {}
                }
                if let Ok((state, r)) = self.connect_once().await {
                    post(Event::ReplicatorUp(Box::new(state)));
                    reader = Some(r);
                }
                continue;
            };
            tokio::select! {
                // What it said before it died is heard first.
                biased;
                report = r.next() => match report {
                    Ok(report) => post(Event::Report(report)),
                    Err(e) => {
                        tracing::debug!(error = %e, "control connection to the replicator ended");
                        lock(&self.wire).stream = None;
                        reader = None;
                    }
                },
                _ = &mut gone => return,
            }
        }
    }
}

/// The replicator of the pid file, where it lives.
fn living(run_dir: &Path) -> Option<Process> {
    Process::same(read_pid_file(&Spec::pid_file(run_dir))?)
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Writes what did not fit at once.
async fn flush(wire: Arc<Mutex<Wire>>, more: Arc<Notify>) {
    loop {
        more.notified().await;
        loop {
            let Some(stream) = lock(&wire).stream.clone() else {
                break;
            };
            if stream.writable().await.is_err() {
                break;
            }
            let mut w = lock(&wire);
            match stream.try_write(&w.backlog) {
                Ok(n) => drop(w.backlog.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
            if w.backlog.is_empty() {
                break;
            }
        }
    }
}

/// Reads reports, one JSON value a line, none over the bound.
struct Reader {
    stream: Arc<UnixStream>,
    buf: Vec<u8>,
    scanned: usize,
}

impl Reader {
    fn new(stream: Arc<UnixStream>) -> Self {
        Reader {
            stream,
            buf: Vec::new(),
            scanned: 0,
        }
    }

    /// The next report. Cancel-safe: what was read stays in the buffer.
    async fn next(&mut self) -> io::Result<Report> {
        loop {
            if let Some(i) = self.buf[self.scanned..].iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buf.drain(..=self.scanned + i).collect();
                self.scanned = 0;
                match serde_json::from_slice(&line) {
                    Ok(report) => return Ok(report),
                    // A newer replicator may say more than this daemon knows.
                    Err(e) => tracing::warn!(error = %e, "a report that this daemon does not know"),
                }
                continue;
            }
            self.scanned = self.buf.len();
            if self.buf.len() >= MAX_LINE_BYTES {
                return Err(io::Error::other("a report over the bound"));
            }
            self.stream.readable().await?;
            let mut chunk = [0u8; 16 * 1024];
            match self.stream.try_read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.buf.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
}
