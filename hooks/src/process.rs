//! One run of one hook: its own process group, a deadline, bounded output, and an end that leaves
//! nothing behind.
//!
//! ```text
//!   start ──> runs ── exits ────────────────────────────> kill what is left of the group ──> reap
//!              └── deadline ──> TERM to the group ── grace ──> KILL ─┘
//! ```
//!
//! The event is given as a memory file rather than a pipe, so that a hook which does not read it
//! holds nobody up.

use crate::text::Capture;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// How a hook ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// With this exit code.
    Exit(i32),
    /// By this signal, which we did not send.
    Signal(i32),
    /// It ran into its deadline and was ended.
    TimedOut,
    /// It was ended because we leave.
    Stopped,
    /// It could not be started.
    NotStarted(String),
}

/// What came of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The hook.
    pub hook: PathBuf,
    /// The event's name.
    pub event: String,
    /// The guest, where it is about one.
    pub guest: Option<String>,
    /// How it ended.
    pub ending: Ending,
    /// What it wrote to standard output and error: bounded, made printable.
    pub output: String,
    /// How long it took.
    pub took: Duration,
}

/// Bounds of one run.
pub(crate) struct Bounds<'a> {
    pub deadline: Duration,
    pub grace: Duration,
    pub output_bytes: usize,
    /// Readable when we leave.
    pub leave: BorrowedFd<'a>,
}

/// What a hook is told.
pub(crate) struct Given<'a> {
    pub event: &'a str,
    pub guest: Option<&'a str>,
    pub json: &'a [u8],
}

/// Runs a hook to its end.
pub(crate) fn run(hook: &Path, given: &Given<'_>, bounds: &Bounds<'_>) -> Outcome {
    let began = Instant::now();
    let mut capture = Capture::new(bounds.output_bytes);
    let ending = match start(hook, given) {
        Ok((child, pipe)) => watch(child, pipe, &mut capture, bounds, began),
        Err(e) => Ending::NotStarted(e.to_string()),
    };
    Outcome {
        hook: hook.to_owned(),
        event: given.event.to_owned(),
        guest: given.guest.map(str::to_owned),
        ending,
        output: capture.text(),
        took: began.elapsed(),
    }
}

fn start(hook: &Path, given: &Given<'_>) -> io::Result<(Child, File)> {
    let mut event = File::from(memfd_create(c"havm-event", MFdFlags::MFD_CLOEXEC)?);
    event.write_all(given.json)?;
    event.rewind()?;
    let (ours, theirs) = io::pipe()?;
    let ours = File::from(OwnedFd::from(ours));
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let child = Command::new(hook)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LANG", "C.UTF-8")
        .env("HAVM_EVENT", given.event)
        .env("HAVM_GUEST", given.guest.unwrap_or_default())
        .current_dir("/")
        .stdin(event)
        .stdout(theirs.try_clone()?)
        .stderr(theirs)
        .process_group(0)
        .spawn()?;
    Ok((child, ours))
}

/// Where a run stands.
enum Stage {
    Running,
    Terminating(Ending),
    Killed(Ending),
}

fn watch(
    mut child: Child,
    mut pipe: File,
    capture: &mut Capture,
    bounds: &Bounds<'_>,
    began: Instant,
) -> Ending {
    let group = Pid::from_raw(child.id() as i32);
    let pidfd = pidfd_open(group);
    let mut stage = Stage::Running;
    let mut pipe_open = true;
    let mut until = began + bounds.deadline;
    let mut leaving = false;
    while !exited(group) {
        let now = Instant::now();
        if now >= until {
            stage = match stage {
                Stage::Running => {
                    let _ = killpg(group, Signal::SIGTERM);
                    Stage::Terminating(if leaving {
                        Ending::Stopped
                    } else {
                        Ending::TimedOut
                    })
                }
                Stage::Terminating(e) | Stage::Killed(e) => {
                    let _ = killpg(group, Signal::SIGKILL);
                    Stage::Killed(e)
                }
            };
            until = now + bounds.grace;
        }
        let mut wait = until.saturating_duration_since(now);
        if pidfd.is_none() {
            wait = wait.min(Duration::from_millis(20)); // no descriptor to wait for: look again
        }
        let mut fds = Vec::with_capacity(3);
        if pipe_open {
            fds.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
        }
        if !leaving {
            fds.push(PollFd::new(bounds.leave, PollFlags::POLLIN));
        }
        if let Some(p) = &pidfd {
            fds.push(PollFd::new(p.as_fd(), PollFlags::POLLIN));
        }
        let timeout = PollTimeout::try_from(wait + Duration::from_millis(1));
        if poll(&mut fds, timeout.unwrap_or(PollTimeout::MAX)).is_err_and(|e| e != Errno::EINTR) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let leave_now = !leaving && fds[usize::from(pipe_open)].any().unwrap_or(false);
        drop(fds);
        if leave_now {
            leaving = true;
            if matches!(stage, Stage::Running) {
                until = Instant::now();
            }
        }
        pipe_open = pipe_open && drain(&mut pipe, capture);
    }
    // Its leader is a zombie still, so the group's number cannot have been given to others.
    let _ = killpg(group, Signal::SIGKILL);
    if pipe_open {
        drain(&mut pipe, capture);
    }
    let status = child.wait();
    match (stage, status) {
        (Stage::Terminating(e) | Stage::Killed(e), _) => e,
        (Stage::Running, Ok(s)) => match (s.code(), s.signal()) {
            (Some(code), _) => Ending::Exit(code),
            (None, signal) => Ending::Signal(signal.unwrap_or(0)),
        },
        (Stage::Running, Err(e)) => Ending::NotStarted(format!("its end was lost: {e}")),
    }
}

/// Whether the process has ended; leaves it to be reaped.
fn exited(pid: Pid) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    !matches!(
        waitid(Id::Pid(pid), flags),
        Ok(WaitStatus::StillAlive) | Err(Errno::EINTR)
    )
}

/// Reads what is there, a bounded amount so that a flood cannot hold up the deadline; false at the
/// end of the pipe.
fn drain(pipe: &mut File, capture: &mut Capture) -> bool {
    let mut buf = [0u8; 4096];
    for _ in 0..64 {
        match pipe.read(&mut buf) {
            Ok(0) => return false,
            Ok(n) => capture.add(&buf[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}

fn pidfd_open(pid: Pid) -> Option<OwnedFd> {
    // SAFETY: plain system call; its result is checked before it is owned.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    // SAFETY: a fresh descriptor that nobody else owns.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
