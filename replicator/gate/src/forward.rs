//! The two threads of a gate: guest to bridge, and bridge to guest.
//!
//! Each waits for its device or for a kick, then works in small batches under its lock, so that a
//! state change waits for one batch at most and has taken full effect when it returns.

use crate::counters::add;
use crate::pump::Shared;
use crate::sched;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Frames a batch: with 64 KiB frames about 0.2 ms.
const BATCH: usize = 16;

/// The running threads; dropping stops them.
pub(crate) struct Threads {
    stop: Arc<Stop>,
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

struct Stop {
    flag: AtomicBool,
    /// Wakes the input forwarder.
    kick: EventFd,
}

impl Threads {
    pub fn start(shared: &Arc<Shared>) -> io::Result<Threads> {
        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let stop = Arc::new(Stop {
            flag: AtomicBool::new(false),
            kick,
        });
        let mut threads = Threads {
            stop: stop.clone(),
            shared: shared.clone(),
            handles: Vec::new(),
        };
        for (name, job) in [
            ("gate-out", output_loop as fn(&Shared, &Stop)),
            ("gate-in", input_loop),
        ] {
            let (shared, stop) = (shared.clone(), stop.clone());
            let handle = thread::Builder::new()
                .name(name.to_owned())
                .stack_size(256 << 10)
                .spawn(move || {
                    sched::go_first();
                    job(&shared, &stop);
                })?;
            threads.handles.push(handle);
        }
        Ok(threads)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.flag.store(true, SeqCst);
        self.shared.kick();
        let _ = self.stop.kick.write(1);
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

/// Waits for one of `fds`; false where polling itself failed, after a pause that keeps a broken
/// descriptor from making a busy loop.
fn wait(fds: &mut [PollFd<'_>]) -> bool {
    match poll(fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => {
            tracing::error!(%e, "the gate cannot poll");
            thread::sleep(Duration::from_millis(100));
            return false;
        }
    }
    let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    if fds
        .iter()
        .any(|f| f.revents().is_some_and(|r| r.intersects(broken)))
    {
        thread::sleep(Duration::from_millis(1));
    }
    true
}

fn output_loop(shared: &Shared, stop: &Stop) {
    let mut paused = false;
    while !stop.flag.load(SeqCst) {
        let mut fds = [
            PollFd::new(shared.kick.as_fd(), PollFlags::POLLIN),
            PollFd::new(shared.receiver.as_fd(), PollFlags::POLLIN),
        ];
        // A full queue: leave the frames where they are until there is room.
        let n = if paused { 1 } else { 2 };
        if !wait(&mut fds[..n]) {
            continue;
        }
        if fds[0].any().unwrap_or(false) {
            let _ = shared.kick.read();
        }
        let mut out = shared.output.lock();
        shared.pump(&mut out, BATCH);
        paused = out.paused;
    }
}

fn input_loop(shared: &Shared, stop: &Stop) {
    let mut complained = false;
    while !stop.flag.load(SeqCst) {
        let mut fds = [
            PollFd::new(stop.kick.as_fd(), PollFlags::POLLIN),
            PollFd::new(shared.bridge.as_fd(), PollFlags::POLLIN),
        ];
        if !wait(&mut fds) {
            continue;
        }
        let mut input = shared.input.lock();
        let open = input.is_open();
        for _ in 0..BATCH {
            let n = match shared.bridge.read(&mut input.buf) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    // Somebody deleted the interface: nothing passes any more. Say so once, and look
                    // again from time to time, for stopping.
                    if !std::mem::replace(&mut complained, true) {
                        tracing::error!(gate = %shared.name, %e, "the bridge's tap is gone: restart the replicator");
                    }
                    drop(input);
                    thread::sleep(Duration::from_millis(200));
                    break;
                }
            };
            if open && n > shared.hdr_len && shared.sender.send(&input.buf[..n]).is_ok() {
                add(&shared.cells.in_frames, 1);
                add(&shared.cells.in_bytes, (n - shared.hdr_len) as u64);
            } else {
                add(&shared.cells.in_dropped, 1);
            }
        }
    }
}
