//! A lock that lends its waiter's priority to its holder.
//!
//! The beat thread runs before all normal threads, but it shares each connection with a normal
//! one. With a plain lock it would wait behind every busy thread of the host for a holder that
//! does not get the processor: load would look like death. This lock (a POSIX mutex with
//! `PTHREAD_PRIO_INHERIT`) runs the holder at the waiter's priority until it lets go.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

/// Of `<pthread.h>`, the same in glibc and musl; the libc crate does not name it for Linux.
const PTHREAD_PRIO_INHERIT: libc::c_int = 1;

unsafe extern "C" {
    fn pthread_mutexattr_setprotocol(
        attr: *mut libc::pthread_mutexattr_t,
        protocol: libc::c_int,
    ) -> libc::c_int;
}

/// See the module.
pub(crate) struct PiMutex<T> {
    /// In a box: a POSIX mutex must not move.
    raw: Box<UnsafeCell<libc::pthread_mutex_t>>,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, and one guard exists at a time; the mutex
// itself may be used from any thread.
unsafe impl<T: Send> Send for PiMutex<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for PiMutex<T> {}

/// Holds the lock. It stays with the thread that took it.
pub(crate) struct PiGuard<'a, T> {
    of: &'a PiMutex<T>,
    /// A POSIX mutex is unlocked by the thread that locked it.
    not_send: PhantomData<*const ()>,
}

impl<T> PiMutex<T> {
    /// An unlocked one; without priority inheritance where the system has none.
    pub fn new(value: T) -> io::Result<Self> {
        let ok = |code: libc::c_int| match code {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        };
        let raw = Box::new(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));
        let mut attr = MaybeUninit::uninit();
        // SAFETY: `attr` is initialised by the first call before the others use it, and destroyed
        // once; `raw` is at its final address and nobody else has it yet.
        unsafe {
            ok(libc::pthread_mutexattr_init(attr.as_mut_ptr()))?;
            if let Err(e) = ok(pthread_mutexattr_setprotocol(
                attr.as_mut_ptr(),
                PTHREAD_PRIO_INHERIT,
            )) {
                tracing::debug!("locks of links do not inherit priority: {e}");
            }
            let made = ok(libc::pthread_mutex_init(raw.get(), attr.as_ptr()));
            libc::pthread_mutexattr_destroy(attr.as_mut_ptr());
            made?;
        }
        Ok(PiMutex {
            raw,
            value: UnsafeCell::new(value),
        })
    }

    /// Waits for the lock. A thread that holds it already must not ask again.
    pub fn lock(&self) -> PiGuard<'_, T> {
        // SAFETY: the mutex was initialised by `new` and lives as long as `self`.
        let code = unsafe { libc::pthread_mutex_lock(self.raw.get()) };
        // Only a use against the rules of this module can fail.
        assert_eq!(
            code,
            0,
            "a link's lock failed: {}",
            io::Error::from_raw_os_error(code)
        );
        PiGuard {
            of: self,
            not_send: PhantomData,
        }
    }

    /// The lock, if it is free.
    pub fn try_lock(&self) -> Option<PiGuard<'_, T>> {
        // SAFETY: as in `lock`.
        let code = unsafe { libc::pthread_mutex_trylock(self.raw.get()) };
        (code == 0).then_some(PiGuard {
            of: self,
            not_send: PhantomData,
        })
    }
}

impl<T> Drop for PiMutex<T> {
    fn drop(&mut self) {
        // SAFETY: nobody holds it, as a guard borrows `self`; it is not used after this.
        unsafe { libc::pthread_mutex_destroy(self.raw.get()) };
    }
}

impl<T> Deref for PiGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock, so no other reference to the value exists.
        unsafe { &*self.of.value.get() }
    }
}

impl<T> DerefMut for PiGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and the guard is borrowed exclusively.
        unsafe { &mut *self.of.value.get() }
    }
}

impl<T> Drop for PiGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this thread locked it (a guard is not Send), and unlocks it once.
        unsafe { libc::pthread_mutex_unlock(self.of.raw.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_holds_it_at_a_time() {
        let m = PiMutex::new(0u64).unwrap();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (0..20_000).for_each(|_| *m.lock() += 1));
            }
        });
        assert_eq!(*m.lock(), 80_000);
        let held = m.lock();
        assert!(std::thread::scope(|s| s
            .spawn(|| m.try_lock().is_none())
            .join()
            .unwrap()));
        drop(held);
        assert!(m.try_lock().is_some());
    }
}
