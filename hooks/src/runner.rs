//! The queue between those who fire events and the hooks that get them.
//!
//! Each guest has a line of its own, and at most one worker serves a line: so a guest's events
//! arrive in order, and a slow hook for one guest holds up no other guest.

use crate::discover::{Skipped, discover};
use crate::process::{Bounds, Ending, Given, Outcome, run};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bounds of a [`Runner`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long a hook may take before its group gets TERM.
    pub deadline: Duration,
    /// How long after that it gets KILL.
    pub grace: Duration,
    /// How much of a hook's output is kept, bytes.
    pub output_bytes: usize,
    /// Events that may wait, of all guests together; more are dropped and counted.
    pub queued_events: usize,
    /// The longest event, bytes of JSON.
    pub event_bytes: usize,
    /// Hooks that run at once (one a guest at most).
    pub workers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            deadline: Duration::from_secs(30),
            grace: Duration::from_secs(2),
            output_bytes: 8192,
            queued_events: 1000,
            event_bytes: 256 * 1024,
            workers: 4,
        }
    }
}

/// What a runner has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Events taken.
    pub fired: u64,
    /// Events dropped: the queue was full, or the event unusable.
    pub dropped: u64,
    /// Hooks run.
    pub run: u64,
    /// Of them, those that did not exit with 0.
    pub failed: u64,
    /// Of those, the ones that ran into their deadline.
    pub timed_out: u64,
    /// Events that wait at the moment.
    pub waiting: u64,
}

struct Job {
    event: String,
    guest: Option<String>,
    json: Vec<u8>,
}

#[derive(Default)]
struct State {
    /// The line of each guest that has one; of the host's own events under none.
    lines: HashMap<Option<String>, VecDeque<Job>>,
    /// Lines with work that no worker serves.
    ready: VecDeque<Option<String>>,
    counters: Counters,
    leaving: bool,
    /// Workers in the middle of an event.
    busy: usize,
    /// What was complained about already.
    complained: HashSet<PathBuf>,
}

type Observer = Box<dyn Fn(&Outcome) + Send + Sync>;

struct Shared {
    dir: PathBuf,
    limits: Limits,
    state: Mutex<State>,
    changed: Condvar,
    leave: EventFd,
    observer: Option<Observer>,
}

/// Gives events to hooks. Dropping it ends running hooks and forgets what waits; see
/// [`Runner::finish`].
pub struct Runner {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Runner {
    /// A runner for the hooks in `dir`.
    ///
    /// # Errors
    /// Where the system gives no thread or descriptor.
    pub fn new(dir: impl Into<PathBuf>, limits: Limits) -> io::Result<Runner> {
        Self::start(dir.into(), limits, None)
    }

    /// The same; `seen` is called after every run, from a worker's thread.
    ///
    /// # Errors
    /// As [`Runner::new`].
    pub fn with_observer(
        dir: impl Into<PathBuf>,
        limits: Limits,
        seen: impl Fn(&Outcome) + Send + Sync + 'static,
    ) -> io::Result<Runner> {
        Self::start(dir.into(), limits, Some(Box::new(seen)))
    }

    fn start(dir: PathBuf, limits: Limits, observer: Option<Observer>) -> io::Result<Runner> {
        let leave = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared {
            dir,
            limits,
            state: Mutex::default(),
            changed: Condvar::new(),
            leave,
            observer,
        });
        let mut runner = Runner {
            shared,
            workers: Vec::new(),
        };
        for i in 0..limits.workers.clamp(1, 64) {
            let shared = runner.shared.clone();
            let worker = thread::Builder::new()
                .name(format!("hooks-{i}"))
                .stack_size(256 << 10)
                .spawn(move || work(&shared))?;
            runner.workers.push(worker);
        }
        Ok(runner)
    }

    /// Queues an event for all hooks and returns at once; false where it was dropped.
    pub fn fire(&self, event: &str, guest: Option<&str>, json: &serde_json::Value) -> bool {
        let json = json.to_string().into_bytes();
        let name_ok = (1..=64).contains(&event.len())
            && event
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let guest_ok = guest.is_none_or(|g| g.len() <= 255 && !g.contains('\0'));
        let mut state = self.shared.lock();
        let full = state.counters.waiting >= self.shared.limits.queued_events as u64;
        let too_long = json.len() > self.shared.limits.event_bytes;
        if !name_ok || !guest_ok || too_long || full || state.leaving {
            state.counters.dropped += 1;
            let dropped = state.counters.dropped;
            drop(state);
            // Once for a burst, not for every one of it.
            if dropped.is_power_of_two() {
                tracing::warn!(
                    event,
                    full,
                    too_long,
                    dropped,
                    "an event was not given to hooks"
                );
            }
            return false;
        }
        state.counters.fired += 1;
        state.counters.waiting += 1;
        let key = guest.map(str::to_owned);
        let job = Job {
            event: event.to_owned(),
            guest: key.clone(),
            json,
        };
        match state.lines.get_mut(&key) {
            // Somebody serves this line or is about to.
            Some(line) => line.push_back(job),
            None => {
                state.lines.insert(key.clone(), VecDeque::from([job]));
                state.ready.push_back(key);
                self.shared.changed.notify_all();
            }
        }
        true
    }

    /// What it has done.
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters
    }

    /// Waits until all that was fired has been dealt with, `within` at most; says whether it has.
    pub fn finish(&self, within: Duration) -> bool {
        let end = Instant::now() + within;
        let mut state = self.shared.lock();
        while state.counters.waiting > 0 || state.busy > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let changed = self.shared.changed.wait_timeout(state, left);
            state = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.shared.lock().leaving = true;
        self.shared.changed.notify_all();
        let _ = self.shared.leave.write(1);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says once (until it changes) why a file is no hook.
    fn complain(&self, skipped: &[Skipped]) {
        let mut state = self.lock();
        state
            .complained
            .retain(|p| skipped.iter().any(|s| s.path == *p));
        for s in skipped {
            if state.complained.insert(s.path.clone()) {
                tracing::warn!(file = %s.path.display(), "not run as a hook: {}", s.why);
            }
        }
    }

    /// All hooks for one event, one after the other.
    fn serve(&self, job: &Job) {
        let found = match discover(&self.dir) {
            Ok(found) => found,
            Err(e) => {
                tracing::warn!(dir = %self.dir.display(), %e, "the folder of hooks cannot be read");
                return;
            }
        };
        self.complain(&found.skipped);
        let bounds = Bounds {
            deadline: self.limits.deadline,
            grace: self.limits.grace,
            output_bytes: self.limits.output_bytes,
            leave: self.leave.as_fd(),
        };
        let given = Given {
            event: &job.event,
            guest: job.guest.as_deref(),
            json: &job.json,
        };
        for hook in &found.hooks {
            if self.lock().leaving {
                return;
            }
            let outcome = run(hook, &given, &bounds);
            self.count(&outcome);
            log(&outcome);
            if let Some(seen) = &self.observer {
                seen(&outcome);
            }
        }
    }

    fn count(&self, outcome: &Outcome) {
        let c = &mut self.lock().counters;
        c.run += 1;
        c.failed += u64::from(outcome.ending != Ending::Exit(0));
        c.timed_out += u64::from(outcome.ending == Ending::TimedOut);
    }
}

fn work(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if state.leaving {
            return;
        }
        let Some(key) = state.ready.pop_front() else {
            state = shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        if let Some(job) = state.lines.get_mut(&key).and_then(VecDeque::pop_front) {
            state.counters.waiting -= 1;
            state.busy += 1;
            drop(state);
            shared.serve(&job);
            state = shared.lock();
            state.busy -= 1;
        }
        if state.lines.get(&key).is_some_and(|line| !line.is_empty()) {
            state.ready.push_back(key); // behind the other guests
        } else {
            state.lines.remove(&key);
        }
        shared.changed.notify_all();
    }
}

fn log(o: &Outcome) {
    let hook = o.hook.display();
    let guest = o.guest.as_deref().unwrap_or("-");
    let took_ms = o.took.as_millis() as u64;
    if o.ending == Ending::Exit(0) {
        tracing::info!(%hook, event = %o.event, guest, took_ms, output = %o.output, "hook ran");
    } else {
        tracing::warn!(%hook, event = %o.event, guest, took_ms, output = %o.output, "hook failed: {:?}", o.ending);
    }
}
