//! Runs one system call inside QEMU, by ptrace, and lets it go again.
//!
//! Only `userfaultfd(2)` needs this: the descriptor tracks the memory of the process that made it.
//! One thread is stopped for some 100 microseconds, once in the life of a guest process.
//!
//! ```text
//!   running ──SEIZE, INTERRUPT──> stopped ──registers saved, call set──> one step ──> result
//!      ^                             │ error                                            │
//!      └──────────detach─────────────┴───────────────registers restored <───────────────┘
//! ```
//!
//! - Nothing is written into QEMU's memory: an existing `syscall` instruction is borrowed.
//! - The kernel restarts an interrupted system call by itself, because the saved registers (with
//!   `orig_rax` and the restart code in `rax`) are put back before it decides.
//! - A tracer that dies is detached by the kernel, and QEMU goes on (no PTRACE_O_EXITKILL). The
//!   one moment that would hurt is to be killed between setting and restoring the registers; so
//!   nothing but the one step lies in between.
//! - ptrace belongs to a thread: the work runs in one of its own, whose end detaches in any case.

use crate::error::CaptureError;
use std::io;

/// Makes `pid` call `userfaultfd(flags)` and returns the descriptor's number there.
#[cfg(target_arch = "x86_64")]
pub(crate) fn userfaultfd_in(pid: u32, flags: i32) -> Result<i32, CaptureError> {
    let args = [flags as u64, 0, 0, 0, 0, 0];
    let what = "run userfaultfd(2) in it";
    let done = std::thread::scope(|s| {
        let worker = std::thread::Builder::new()
            .name("havm-inject".into())
            .spawn_scoped(s, || x86_64::call(pid, libc::SYS_userfaultfd as u64, args));
        match worker {
            Ok(handle) => handle.join().unwrap_or_else(|_| {
                Err(CaptureError::Trace {
                    pid,
                    what,
                    source: io::Error::other("the tracing thread died"),
                })
            }),
            Err(source) => Err(CaptureError::System {
                what: "start a thread",
                source,
            }),
        }
    })?;
    match done {
        n if n >= 0 => Ok(n as i32),
        n => match io::Error::from_raw_os_error(n.unsigned_abs() as i32) {
            e if e.raw_os_error() == Some(libc::ENOSYS) => Err(CaptureError::Kernel {
                missing: "userfaultfd (CONFIG_USERFAULTFD)",
            }),
            source => Err(CaptureError::Trace { pid, what, source }),
        },
    }
}

/// Other architectures have no injection.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn userfaultfd_in(_pid: u32, _flags: i32) -> Result<i32, CaptureError> {
    Err(CaptureError::Architecture {
        arch: std::env::consts::ARCH,
    })
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{CaptureError, io};
    use crate::blocks;
    use nix::errno::Errno;
    use nix::sys::ptrace;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;
    use std::os::unix::fs::FileExt;
    use std::time::{Duration, Instant};

    /// How long a thread may take to stop; one in an uninterruptible sleep (dead disk) never does.
    const STOP_WITHIN: Duration = Duration::from_secs(5);
    /// How long a stop is waited for without sleeping.
    const SPIN: Duration = Duration::from_millis(1);
    /// The `syscall` instruction.
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    /// Code segment of 64-bit user code.
    const USER_CS: u64 = 0x33;
    /// Signals set aside at most while the call runs.
    const MAX_SIGNALS: usize = 64;

    /// A traced thread; put back and let go when dropped.
    struct Traced {
        pid: Pid,
        saved: Option<libc::user_regs_struct>,
        stopped: bool,
        /// Signals that came in between, to be sent again.
        signals: Vec<Signal>,
    }

    impl Drop for Traced {
        fn drop(&mut self) {
            if let Some(regs) = self.saved.take() {
                let _ = ptrace::setregs(self.pid, regs);
            }
            // A thread that did not stop cannot be detached; the end of our thread does it.
            if self.stopped {
                let _ = ptrace::detach(self.pid, None);
            }
            for signal in &self.signals {
                let id = self.pid.as_raw();
                // SAFETY: tgkill takes integers only.
                unsafe { libc::syscall(libc::SYS_tgkill, id, id, *signal as i32) };
            }
        }
    }

    fn trace_error(pid: u32, what: &'static str) -> impl Fn(Errno) -> CaptureError {
        move |e| CaptureError::Trace {
            pid,
            what,
            source: io::Error::from(e),
        }
    }

    /// Runs system call `nr` in the main thread of `pid`; returns what the kernel left in `rax`.
    pub(super) fn call(pid: u32, nr: u64, args: [u64; 6]) -> Result<i64, CaptureError> {
        let gadget = find_syscall(pid)?;
        let main = Pid::from_raw(pid as i32);
        ptrace::seize(main, ptrace::Options::empty()).map_err(trace_error(pid, "attach"))?;
        let mut traced = Traced {
            pid: main,
            saved: None,
            stopped: false,
            signals: Vec::new(),
        };
        ptrace::interrupt(main).map_err(trace_error(pid, "stop one thread"))?;
        traced.wait_stopped(pid)?;
        let saved = ptrace::getregs(main).map_err(trace_error(pid, "read registers"))?;
        if saved.cs != USER_CS {
            let source = io::Error::other("it is not a 64-bit process");
            return Err(CaptureError::Trace {
                pid,
                what: "read registers",
                source,
            });
        }
        let mut regs = saved;
        regs.rip = gadget;
        regs.rax = nr;
        // Not in a system call any more: else the kernel would apply restart rules to our values.
        regs.orig_rax = u64::MAX;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        traced.saved = Some(saved);
        ptrace::setregs(main, regs).map_err(trace_error(pid, "set registers"))?;
        traced.step_over(pid, gadget)
        // Dropping `traced` restores the registers and detaches.
    }

    impl Traced {
        /// Waits for the stop that INTERRUPT asked for; passes on signals that come first.
        fn wait_stopped(&mut self, pid: u32) -> Result<(), CaptureError> {
            let what = "stop one thread";
            let end = Instant::now() + STOP_WITHIN;
            loop {
                match self.next_stop(pid, what, end)? {
                    None => return Ok(()),
                    Some(signal) => {
                        self.stopped = false;
                        ptrace::cont(self.pid, signal).map_err(trace_error(pid, what))?;
                        ptrace::interrupt(self.pid).map_err(trace_error(pid, what))?;
                    }
                }
            }
        }

        /// Steps over the borrowed instruction.
        fn step_over(&mut self, pid: u32, gadget: u64) -> Result<i64, CaptureError> {
            let what = "run userfaultfd(2) in it";
            let end = Instant::now() + STOP_WITHIN;
            loop {
                self.stopped = false;
                ptrace::step(self.pid, None).map_err(trace_error(pid, what))?;
                let signal = self.next_stop(pid, what, end)?;
                let regs = ptrace::getregs(self.pid).map_err(trace_error(pid, what))?;
                match signal {
                    Some(Signal::SIGTRAP) | None => {}
                    Some(other) if self.signals.len() < MAX_SIGNALS => self.signals.push(other),
                    Some(_) => {
                        let source = io::Error::other("it is flooded with signals");
                        return Err(CaptureError::Trace { pid, what, source });
                    }
                }
                if regs.rip == gadget + SYSCALL.len() as u64 {
                    return Ok(regs.rax as i64);
                }
                if regs.rip != gadget {
                    let source = io::Error::other(format!("it went astray to {:#x}", regs.rip));
                    return Err(CaptureError::Trace { pid, what, source });
                }
            }
        }

        /// Waits until the thread stops: `None` for a trap of ptrace's own, or the signal that is
        /// about to be delivered.
        fn next_stop(
            &mut self,
            pid: u32,
            what: &'static str,
            end: Instant,
        ) -> Result<Option<Signal>, CaptureError> {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            // The step takes microseconds, and the registers should be wrong no longer than that.
            let spin = Instant::now() + SPIN;
            let gone = || CaptureError::Trace {
                pid,
                what,
                source: Errno::ESRCH.into(),
            };
            loop {
                match waitpid(self.pid, Some(flags)) {
                    Ok(WaitStatus::Stopped(_, signal)) => {
                        self.stopped = true;
                        return Ok(Some(signal));
                    }
                    Ok(WaitStatus::PtraceEvent(..) | WaitStatus::PtraceSyscall(_)) => {
                        self.stopped = true;
                        return Ok(None);
                    }
                    Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return Err(gone()),
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(e) => return Err(trace_error(pid, what)(e)),
                }
                let now = Instant::now();
                if now < spin {
                    std::thread::yield_now();
                    continue;
                }
                if now >= end {
                    let source = io::Error::from(io::ErrorKind::TimedOut);
                    return Err(CaptureError::Trace { pid, what, source });
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// The address of a `syscall` instruction in the process: in the vDSO, else in any code.
    fn find_syscall(pid: u32) -> Result<u64, CaptureError> {
        let what = "find a system call instruction in it";
        let error = |source| CaptureError::Trace { pid, what, source };
        let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(error)?;
        let mem = std::fs::File::open(format!("/proc/{pid}/mem")).map_err(error)?;
        let code = |l: &&str| l.split(' ').nth(1).is_some_and(|p| p.starts_with("r-x"));
        let mut lines: Vec<&str> = text.lines().filter(code).collect();
        lines.sort_by_key(|l| !l.ends_with("[vdso]"));
        let mut buf = vec![0; 1 << 20];
        for entry in lines.into_iter().filter_map(blocks::parse_map_line) {
            let mut at = entry.start;
            while at + 1 < entry.end {
                let want = buf.len().min((entry.end - at) as usize);
                let Ok(got) = mem.read_at(&mut buf[..want], at) else {
                    break;
                };
                if let Some(i) = buf[..got].windows(2).position(|w| w == SYSCALL) {
                    return Ok(at + i as u64);
                }
                if got < 2 {
                    break;
                }
                // One byte again, in case the instruction lies across the border.
                at += got as u64 - 1;
            }
        }
        Err(error(io::Error::from(io::ErrorKind::NotFound)))
    }
}
