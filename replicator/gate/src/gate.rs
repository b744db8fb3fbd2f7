//! The gate itself: its state, and what the epochs do to it. The picture is in the crate's docs.

use crate::announce;
use crate::counters::{Cells, Counters, add};
use crate::error::GateError;
use crate::fair::FairMutex;
use crate::forward::Threads;
use crate::iface::{Asker, IfName, has_master, silence};
use crate::packet::{Got, Receiver, Sender, VNET_HDR};
use crate::pump::{Input, Output, Shared};
use crate::queue::{HeldQueue, SLOT};
use crate::shortcut::Shortcut;
use crate::shutter;
use crate::spec::{Limits, NicSpec};
use crate::tap::{self, Tap};
use havm_core::ids::{EpochNo, StreamId, Term};
use havm_wire::acked::AckedEpoch;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::sync::{Arc, Condvar, OnceLock};
use std::time::Duration;

/// What a gate does with the guest's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing passes in either direction; what the guest sends is dropped.
    Closed,
    /// Output is held and tagged with the open epoch; input flows.
    Holding {
        /// The term.
        term: Term,
        /// The capture session.
        stream: StreamId,
        /// The epoch that is open.
        open: EpochNo,
    },
    /// Both directions flow.
    Passing,
}

/// What is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Frames.
    pub frames: usize,
    /// Their bytes, headers included.
    pub bytes: usize,
    /// How long the oldest one waits.
    pub oldest: Option<Duration>,
}

/// How many held bytes a release writes before it lets others have the lock: bounds what a barrier
/// can wait for it.
const RELEASE_CHUNK_BYTES: usize = 256 << 10;
/// How many frames a barrier fetches at most. What is left belongs to the next epoch: safe.
const BARRIER_FRAMES: usize = 512;
/// How many frames waiting in the socket a `discard` drops at most (the socket holds fewer).
const DISCARD_FRAMES: usize = 65536;

/// The gate of one NIC. Every method may be called from any thread; each has taken effect when it
/// returns. Dropping it closes it and removes the bridge's tap; the guest's tap stays.
pub struct Gate {
    shared: Arc<Shared>,
    mac: [u8; 6],
    threads: Option<Threads>,
}

impl Gate {
    /// Makes the devices and threads; the gate is [`State::Closed`]. Works in the calling thread's
    /// network namespace.
    ///
    /// # Errors
    /// A missing bridge, a tap that is in use or in a bridge, or the kernel's refusal.
    pub fn open(spec: &NicSpec, limits: Limits) -> Result<Gate, GateError> {
        let guest = IfName::new(&spec.guest_tap)?;
        let bridge_tap = IfName::new(&spec.bridge_tap)?;
        let bridge = IfName::new(&spec.bridge)?;
        if bridge.index().is_none() {
            return Err(GateError::NoBridge(spec.bridge.clone()));
        }
        let ask = Asker::new()?;
        let made = tap::make_guest_tap(&guest, spec.owner_uid, limits.vnet_hdr)?;
        if has_master(&guest) {
            return Err(GateError::Enslaved(spec.guest_tap.clone()));
        }
        silence(&guest);
        if let Err(e) = shutter::close(&guest) {
            tracing::warn!(dev = guest.as_str(), %e, "no BPF at the guest's tap (Linux 6.6): the host is kept silent by sysctl only");
        }
        let receiver = Receiver::open(&guest, limits.vnet_hdr)?;
        let hdr_len = receiver.hdr_len();
        let sender = Sender::open(&guest, hdr_len == VNET_HDR)?;
        let tap = Tap::bridge_side(&bridge_tap, hdr_len == VNET_HDR)?;
        silence(&bridge_tap);
        // As libvirt does: an address that is higher than a real one, so that a bridge which takes
        // its lowest port's address does not change it.
        let mut mac = spec.mac;
        mac[0] = 0xfe;
        ask.mac(&bridge_tap, mac)?;
        ask.mtu(&bridge_tap, spec.mtu)?;
        ask.bridge_port(&bridge, &bridge_tap)?;
        if made {
            ask.queue_len(&guest, GUEST_QUEUE_FRAMES)?;
        }
        ask.mtu(&guest, spec.mtu)?;
        ask.flags(&guest, libc::IFF_NOARP | libc::IFF_UP, libc::IFF_MULTICAST)?;
        let shortcut =
            (limits.shortcut && hdr_len == VNET_HDR).then(|| Shortcut::new(&bridge_tap, &guest));
        let shortcut = match shortcut.transpose() {
            Ok(s) => s,
            Err(e) => {
                tracing::info!(dev = bridge_tap.as_str(), %e, "no short cut for input (Linux 6.6): a thread carries it");
                None
            }
        };
        ask.flags(&bridge_tap, libc::IFF_UP, 0)?;

        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| sys("make an event", &spec.guest_tap, e.into()))?;
        let queue = HeldQueue::new(limits.held_bytes, limits.held_frames);
        let shared = Arc::new(Shared {
            name: spec.guest_tap.clone(),
            output: FairMutex::new(Output {
                state: State::Closed,
                queue,
                paused: false,
            }),
            input: FairMutex::new(Input {
                shortcut,
                open: false,
                buf: vec![0; SLOT].into_boxed_slice(),
            }),
            waiting: Condvar::new(),
            waker: OnceLock::new(),
            bridge: tap,
            receiver,
            sender,
            kick,
            cells: Cells::default(),
            hdr_len,
        });
        let threads = Threads::start(&shared)
            .map_err(|source| sys("start a thread", &spec.guest_tap, source))?;
        Ok(Gate {
            shared,
            mac: spec.mac,
            threads: Some(threads),
        })
    }

    /// From now on output is held, tagged with the open epoch, at first `first`. Input flows. What is
    /// held already (of an earlier stream) waits for `first` too: its state is part of that epoch.
    pub fn hold(&self, stream: StreamId, term: Term, first: EpochNo) {
        let mut out = self.shared.output.lock();
        out.state = State::Holding {
            term,
            stream,
            open: first,
        };
        out.queue.retag(first);
        self.shared.unpause(&mut out);
        self.shared.input.lock().set(true);
        // What is held already wants a barrier.
        self.shared.waiting.notify_all();
    }

    /// The vCPUs stand: what the guest has sent so far belongs to `closing`, what comes later to
    /// the epoch after it. Call it before the vCPUs run again. Nothing where the gate is not holding.
    pub fn barrier(&self, closing: EpochNo) {
        let mut out = self.shared.output.lock();
        let State::Holding { term, stream, open } = out.state else {
            return;
        };
        if closing < open {
            tracing::warn!(gate = %self.shared.name, %closing, %open, "barrier for an epoch that is closed: ignored");
            return;
        }
        self.shared.pump(&mut out, BARRIER_FRAMES);
        out.state = State::Holding {
            term,
            stream,
            open: closing.next(),
        };
    }

    /// Lets out what the guest sent up to the acked epoch, in order; says how many frames. Does
    /// nothing unless the gate is holding for that very term and stream and the epoch is closed.
    pub fn release(&self, acked: AckedEpoch) -> usize {
        let id = acked.id();
        let mut released = 0;
        loop {
            let mut out = self.shared.output.lock();
            let fits = match out.state {
                State::Holding { term, stream, open } => {
                    term == id.term && stream == id.stream && id.n < open
                }
                _ => false,
            };
            if !fits {
                if released == 0 {
                    add(&self.shared.cells.acks_refused, 1);
                }
                return released;
            }
            let (frames, more) = self
                .shared
                .let_out(&mut out, Some(id.n), RELEASE_CHUNK_BYTES);
            released += frames;
            if !more {
                self.shared.unpause(&mut out);
                return released;
            }
        }
    }

    /// Opens both directions (solo, by a permit). With `keep_held` what is held goes out first, in
    /// order: right for a primary's own output. Without, it is dropped. Says how many went out.
    pub fn pass(&self, keep_held: bool) -> usize {
        let mut out = self.shared.output.lock();
        let mut let_out = 0;
        if keep_held {
            let_out = self.shared.let_out(&mut out, None, usize::MAX).0;
        } else {
            let dropped = out.queue.clear();
            add(&self.shared.cells.discarded, dropped as u64);
        }
        out.state = State::Passing;
        self.shared.unpause(&mut out);
        self.shared.input.lock().set(true);
        let_out
    }

    /// Closes both directions. When it returns, nothing more gets out; a frame on its way to the
    /// guest inside the kernel may still take some microseconds. What is held stays held, until
    /// `hold`, `pass` or `discard` decides.
    pub fn close(&self) {
        let mut out = self.shared.output.lock();
        out.state = State::Closed;
        self.shared.unpause(&mut out);
        self.shared.input.lock().set(false);
    }

    /// Drops all that is held and all that waits to be read; says how many frames. For a copy that
    /// is no longer the guest, and after a detected pause of the host.
    pub fn discard(&self) -> usize {
        let mut out = self.shared.output.lock();
        let mut n = out.queue.clear();
        for _ in 0..DISCARD_FRAMES {
            let Some(slot) = out.queue.slot() else { break };
            match self.shared.receiver.receive(slot) {
                Ok(Got::Frame { .. } | Got::Unusable) => n += 1,
                Ok(Got::Nothing) | Err(_) => break,
            }
        }
        add(&self.shared.cells.discarded, n as u64);
        self.shared.unpause(&mut out);
        n
    }

    /// What is held.
    pub fn held(&self) -> Held {
        let out = self.shared.output.lock();
        Held {
            frames: out.queue.len(),
            bytes: out.queue.bytes(),
            oldest: out.queue.front().map(|(m, _)| m.at.elapsed()),
        }
    }

    /// Three quarters of the bound are used: stop the vCPUs. Beyond the bound up to 8 MiB wait in the
    /// kernel; after that frames are dropped and counted as `overflowed`.
    pub fn is_full(&self) -> bool {
        let out = self.shared.output.lock();
        out.paused || out.queue.is_full()
    }

    /// Waits until something is held in the *open* epoch, which only a barrier and an ack can let
    /// out; false where nothing came in `timeout`.
    pub fn wait_for_output(&self, timeout: Duration) -> bool {
        self.shared
            .output
            .wait(&self.shared.waiting, timeout, Output::wants_barrier)
    }

    /// Has `wake` called, from the forwarder's thread, whenever the first frame is held in an open
    /// epoch: for a guest with several NICs. It must not block nor call this gate. Once only.
    pub fn on_output(&self, wake: impl Fn() + Send + Sync + 'static) {
        if self.shared.waker.set(Box::new(wake)).is_err() {
            tracing::warn!(gate = %self.shared.name, "a second waker: ignored");
        }
    }

    /// Tells the bridge's switches where the guest's MAC now lives (one RARP frame; repeat it a
    /// few times). Not on a closed gate: false.
    pub fn announce(&self) -> bool {
        let out = self.shared.output.lock();
        if out.state == State::Closed {
            return false;
        }
        let mut frame = [0u8; VNET_HDR + announce::LEN];
        frame[VNET_HDR..].copy_from_slice(&announce::frame(self.mac));
        self.shared
            .bridge
            .write(&frame[VNET_HDR - self.shared.hdr_len..])
            .is_ok()
    }

    /// What it does at the moment.
    pub fn state(&self) -> State {
        self.shared.output.lock().state
    }

    /// Whether frames carry virtio-net headers, without which the gate is slow and the guest must
    /// have its offloads off.
    pub fn has_offloads(&self) -> bool {
        self.shared.hdr_len == VNET_HDR
    }

    /// What it has seen.
    pub fn counters(&self) -> Counters {
        add(
            &self.shared.cells.overflowed,
            self.shared.receiver.overflowed(),
        );
        let mut c = self.shared.cells.snapshot();
        if let Some(s) = &self.shared.input.lock().shortcut {
            let (frames, bytes, dropped) = s.counts();
            c.in_frames += frames;
            c.in_bytes += bytes;
            c.in_dropped += dropped;
        }
        c
    }
}

/// How many frames for the guest wait in its tap while QEMU stands still.
const GUEST_QUEUE_FRAMES: i32 = 1000;

fn sys(what: &'static str, dev: &str, source: std::io::Error) -> GateError {
    GateError::Sys {
        what,
        dev: dev.to_owned(),
        source,
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.close();
        drop(self.threads.take());
    }
}
