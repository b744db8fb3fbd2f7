//! A mutex whose busiest user cannot starve the others.
//!
//! The forwarder takes its lock again at once after every batch; an ordinary mutex lets it win
//! again and again while a barrier waits in the guest's pause. Here each user first queues at a
//! second mutex, which a waiter keeps until it has the main one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Default)]
pub(crate) struct FairMutex<T> {
    next: Mutex<()>,
    main: Mutex<T>,
}

impl<T> FairMutex<T> {
    pub fn new(value: T) -> Self {
        FairMutex {
            next: Mutex::new(()),
            main: Mutex::new(value),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        // Poison: a panic left the value as it stood between two statements; all of ours are
        // valid there, and a gate must still be closable.
        let turn = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let guard = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        drop(turn);
        guard
    }

    /// Waits until `ready`, or until `timeout` has passed; says whether it is ready.
    pub fn wait(&self, cv: &Condvar, timeout: Duration, ready: impl Fn(&T) -> bool) -> bool {
        let end = Instant::now() + timeout;
        let mut guard = self.lock();
        loop {
            if ready(&guard) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            guard = cv
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
