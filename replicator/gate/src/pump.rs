//! What the forwarders and the gate's methods share: the locked state, and the moving of frames.

use crate::counters::{Cells, add};
use crate::fair::FairMutex;
use crate::gate::State;
use crate::packet::{Got, Receiver, Sender};
use crate::queue::HeldQueue;
use crate::shortcut::Shortcut;
use crate::tap::Tap;
use havm_core::ids::EpochNo;
use nix::sys::eventfd::EventFd;
use std::sync::{Condvar, OnceLock};
use std::time::Instant;

pub(crate) type Waker = Box<dyn Fn() + Send + Sync>;

/// Output: all of it changes under one lock, which the forwarder holds while it reads and writes.
pub(crate) struct Output {
    pub state: State,
    pub queue: HeldQueue,
    /// The queue was full when the forwarder last looked: it waits for a kick.
    pub paused: bool,
}

/// Input.
pub(crate) struct Input {
    pub shortcut: Option<Shortcut>,
    pub open: bool,
    pub buf: Box<[u8]>,
}

pub(crate) struct Shared {
    pub name: String,
    pub output: FairMutex<Output>,
    pub input: FairMutex<Input>,
    /// Something is held in the open epoch.
    pub waiting: Condvar,
    pub waker: OnceLock<Waker>,
    pub bridge: Tap,
    pub receiver: Receiver,
    pub sender: Sender,
    /// Wakes the output forwarder.
    pub kick: EventFd,
    pub cells: Cells,
    /// Bytes of the virtio-net header on both sides.
    pub hdr_len: usize,
}

impl Input {
    /// Opens or closes the way in.
    pub fn set(&mut self, open: bool) {
        self.open = open;
        if let Some(s) = &self.shortcut {
            s.set(open);
        }
    }

    /// Whether frames may be given to the guest.
    pub fn is_open(&self) -> bool {
        self.open
    }
}

impl Output {
    /// Something is held that no closed epoch will let out.
    pub fn wants_barrier(&self) -> bool {
        match (self.state, self.queue.back()) {
            (State::Holding { open, .. }, Some(newest)) => newest.epoch >= open,
            _ => false,
        }
    }
}

impl Shared {
    /// Wakes the output forwarder.
    pub fn kick(&self) {
        // It can fail only when the counter is at its end, and then the forwarder wakes anyway.
        let _ = self.kick.write(1);
    }

    /// There is room again.
    pub fn unpause(&self, out: &mut Output) {
        if std::mem::take(&mut out.paused) {
            self.kick();
        }
    }

    fn write_out(&self, frame: &[u8]) {
        match self.bridge.write(frame) {
            Ok(()) => {
                add(&self.cells.out_frames, 1);
                add(&self.cells.out_bytes, (frame.len() - self.hdr_len) as u64);
            }
            Err(_) => add(&self.cells.out_failed, 1),
        }
    }

    /// Writes held frames up to epoch `upto` (all where none), about `max_bytes` at most. Says how
    /// many, and whether more are due.
    pub fn let_out(
        &self,
        out: &mut Output,
        upto: Option<EpochNo>,
        max_bytes: usize,
    ) -> (usize, bool) {
        let (mut frames, mut bytes) = (0, 0);
        while let Some((meta, data)) = out.queue.front() {
            if upto.is_some_and(|n| meta.epoch > n) {
                break;
            }
            if bytes >= max_bytes {
                return (frames, true);
            }
            self.write_out(data);
            bytes += data.len();
            frames += 1;
            out.queue.pop();
        }
        add(&self.cells.released_frames, frames as u64);
        (frames, false)
    }

    /// Reads what the guest sent, `max` frames at most, and does with it what the state says.
    /// Returns false where nothing was left to read.
    pub fn pump(&self, out: &mut Output, max: usize) -> bool {
        let now = Instant::now();
        for _ in 0..max {
            let Some(slot) = out.queue.slot() else {
                out.paused = true;
                return false;
            };
            let (start, len) = match self.receiver.receive(slot) {
                Ok(Got::Frame { start, len }) => (start, len),
                Ok(Got::Unusable) => {
                    add(&self.cells.unusable, 1);
                    continue;
                }
                Ok(Got::Nothing) => return false,
                Err(e) => {
                    // The interface went down: it says so once, and works again when it is up.
                    tracing::warn!(gate = %self.name, %e, "reading the guest's tap");
                    return false;
                }
            };
            match out.state {
                State::Closed => add(&self.cells.closed_dropped, 1),
                State::Passing => self.write_out(&slot[start..start + len]),
                State::Holding { open, .. } => {
                    let first = !out.wants_barrier();
                    out.queue.commit(start, len, open, now);
                    add(&self.cells.held_frames, 1);
                    if first {
                        self.waiting.notify_all();
                        if let Some(wake) = self.waker.get() {
                            wake();
                        }
                    }
                }
            }
        }
        true
    }
}
