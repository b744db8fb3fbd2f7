//! A few threads that help the caller through one short piece of work, and sleep otherwise.
//!
//! The caller always works too, so a helper that wakes late costs nothing but its help.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The work: called once by each worker with its number; the workers share it out themselves.
type Work = dyn Fn(usize) + Sync;

#[derive(Default)]
struct State {
    /// Grows with each piece of work.
    generation: u64,
    /// Valid while `open`; lifetime erased, see [`Pool::run`].
    work: Option<WorkPtr>,
    /// Helpers that may join this piece of work.
    wanted: usize,
    /// Helpers at work.
    busy: usize,
    panicked: bool,
    end: bool,
}

#[derive(Clone, Copy)]
struct WorkPtr(*const Work);
// SAFETY: it points to a `Sync` closure that `run` keeps alive while any helper may use it.
unsafe impl Send for WorkPtr {}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    start: Condvar,
    done: Condvar,
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Helper threads. Dropping it ends them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `workers` in all: the caller and `workers - 1` helpers.
    pub(crate) fn new(workers: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared::default());
        let mut pool = Pool {
            shared: shared.clone(),
            helpers: Vec::new(),
        };
        for n in 1..workers {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(format!("havm-scan-{n}"));
            pool.helpers.push(thread.spawn(move || help(&shared, n))?);
        }
        Ok(pool)
    }

    /// The most workers there are.
    pub(crate) fn workers(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `work(n)` in up to `workers` threads at once, the caller's among them as number 0, and
    /// returns when all have returned. Helpers that did not wake in time are not waited for.
    pub(crate) fn run(&self, workers: usize, work: &(dyn Fn(usize) + Sync)) {
        if workers <= 1 || self.helpers.is_empty() {
            return work(0);
        }
        // SAFETY: only the lifetime is erased. `CloseOnDrop` below waits until no helper is inside
        // `work` and withdraws it, before `run` returns or unwinds.
        let erased = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const Work>(std::ptr::from_ref(
                work,
            ))
        };
        {
            let mut state = lock(&self.shared);
            state.generation += 1;
            state.work = Some(WorkPtr(erased));
            state.wanted = workers - 1;
            state.panicked = false;
        }
        self.shared.start.notify_all();
        let close = CloseOnDrop(&self.shared);
        work(0);
        drop(close);
        assert!(!lock(&self.shared).panicked, "a capture helper panicked");
    }
}

/// Ends a piece of work: nobody else may join, those inside are waited for.
struct CloseOnDrop<'a>(&'a Shared);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        let mut state = lock(self.0);
        state.work = None;
        while state.busy > 0 {
            state = self
                .0
                .done
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared).end = true;
        self.shared.start.notify_all();
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

fn help(shared: &Shared, n: usize) {
    let mut seen = 0;
    let mut state = lock(shared);
    loop {
        if state.end {
            return;
        }
        let fresh = state.generation != seen && state.wanted > 0;
        let Some(work) = state.work.filter(|_| fresh) else {
            state = shared
                .start
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        seen = state.generation;
        state.wanted -= 1;
        state.busy += 1;
        drop(state);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // SAFETY: `busy` was raised under the lock while `work` was set, so `run` has not
            // returned and will not before we lower it.
            (unsafe { &*work.0 })(n);
        }));
        state = lock(shared);
        state.busy -= 1;
        state.panicked |= outcome.is_err();
        shared.done.notify_all();
    }
}

/// The longest that a latecomer waits.
const HOLD_MS: u8 = 20;

/// Keeps the last worker back while QEMU saves its devices: where every processor has a worker, that one
/// would take QEMU's, and the save would begin when the scan is over.
pub(crate) struct Latecomer<'a> {
    /// Readable when QEMU is done.
    reply: Option<BorrowedFd<'a>>,
    /// Readable when the others are.
    over: &'a EventFd,
}

impl<'a> Latecomer<'a> {
    /// `reply`: what the last worker waits for; `None` if nobody waits.
    pub(crate) fn new(reply: Option<BorrowedFd<'a>>, over: &'a EventFd) -> Latecomer<'a> {
        // Left over from the last time; fails if there is nothing.
        let _ = over.read();
        Latecomer { reply, over }
    }

    /// The descriptor for `over`.
    pub(crate) fn event() -> nix::Result<EventFd> {
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
    }

    /// Waits in worker `n` of `workers` if it is the last one and not the caller.
    pub(crate) fn hold(&self, n: usize, workers: usize) {
        let Some(reply) = self.reply.filter(|_| n > 0 && n + 1 == workers) else {
            return;
        };
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [read(reply), read(self.over.as_fd())];
        // Bounded, so that a caller who fails cannot leave it waiting; a save takes 1 ms.
        while let Err(Errno::EINTR) = poll(&mut fds, PollTimeout::from(HOLD_MS)) {}
    }

    /// The caller (worker 0) found nothing more to do.
    pub(crate) fn release(&self, n: usize) {
        if n == 0 && self.reply.is_some() {
            let _ = self.over.write(1);
        }
    }
}

/// Hands out the numbers 0..n, each to one worker.
pub(crate) struct Tickets {
    next: AtomicUsize,
    end: usize,
}

impl Tickets {
    pub(crate) fn new(end: usize) -> Tickets {
        Tickets {
            next: AtomicUsize::new(0),
            end,
        }
    }

    pub(crate) fn take(&self) -> Option<usize> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        (n < self.end).then_some(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    /// Protects against a piece of work that is done twice, not at all, or after `run` returned.
    #[test]
    fn every_ticket_is_done_once_before_run_returns() {
        let pool = Pool::new(3).expect("threads");
        for round in 0..2000 {
            let tickets = Tickets::new(round % 7);
            let done: Vec<AtomicU64> = (0..round % 7).map(|_| AtomicU64::new(0)).collect();
            pool.run(1 + round % 4, &|_| {
                while let Some(i) = tickets.take() {
                    done[i].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
        }
    }
}
