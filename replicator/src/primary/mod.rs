//! The guest's thread on a primary: it alone speaks to QEMU, from attach to detach.
//!
//! ```text
//!   idle (no stream) ──Stream(base unknown)──> bulk ──(little left)──> settling ──(acked)──> live
//!        ^               Stream(base equal) ────────────────────────────────────────────────> live
//!        └──────────── EndStream, or the stream broke ───────────────────────────────────────┘
//!   live ──Arm──> live, epochs eligible ──HandOver──> vCPUs stand, last epoch acked: HandedOver
//! ```
//!
//! Acks do not pass through here: the stream's own thread gives them to the gate at once
//! (`crate::acks`). This thread only has to know how many epochs are in flight.

mod epoch;
mod session;
mod sync;
mod verify;

pub use session::{Begin, Session};
pub(crate) use verify::hash as page_hash;

use crate::disks::Disks;
use crate::input::Input;
use crate::nics::Nics;
use crate::pacing::{Pacing, Situation};
use crate::stats::Stats;
use havm_capture::{Capture, PageSet};
use havm_core::ids::{EpochNo, StreamId};
use havm_core::order::GuestEnd;
use havm_links::link::run_sooner;
use havm_qmp::{EventKind, Qmp};
use havm_wire::back::Back;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the thread sleeps at most: events of the monitor are looked at this often.
const TICK: Duration = Duration::from_millis(10);
/// How long a QEMU that is being killed may take until its monitor closes.
const DYING: Duration = Duration::from_secs(1);
/// How the text of an error begins that came from the guest's memory or monitor.
const CAPTURE_FAILED: &str = "capture";
/// How long a handover waits for the ack of the last epoch.
const HANDOVER_DEADLINE: Duration = Duration::from_secs(3);

/// What the machine asks of the guest's thread.
pub enum Cmd {
    /// Look again: output waits, or an ack came.
    Wake,
    /// Let the vCPUs run.
    Run,
    /// Begin this stream.
    Stream(Box<Session>),
    /// From the next epoch on the standby may become eligible.
    Arm,
    /// Forget this stream.
    EndStream(StreamId),
    /// Stop, have a last epoch acked.
    HandOver,
    /// Stop the vCPUs and keep them so.
    Freeze,
    /// A message of the standby that this thread must answer.
    Back(StreamId, Back),
    /// Compare both sides at an epoch.
    Verify(u64),
}

/// What the guest's thread tells.
#[derive(Debug)]
pub enum GuestEvent {
    /// The standby has all but the last small epoch.
    Synced(StreamId),
    /// Sync goes on.
    Progress {
        /// Bytes dealt with.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// The stream cannot go on.
    Broken(StreamId, String),
    /// vCPUs stand, this epoch is acked.
    HandedOver(EpochNo),
    /// They run again.
    HandOverFailed(String),
    /// QEMU or the guest ended.
    Ended(GuestEnd),
    /// The vCPUs stand because output waits.
    OutputFull,
    /// A comparison could not be made.
    VerifyFailed(u64, String),
}

/// The parts that the thread works with.
pub struct Parts {
    /// The guest's monitor.
    pub qmp: Qmp,
    /// Its memory.
    pub capture: Capture,
    /// Its NICs.
    pub nics: Nics,
    /// Its disks.
    pub disks: Disks,
    /// When barriers are due.
    pub pacing: Pacing,
    /// Where events go.
    pub events: Sender<Input>,
    /// The shared numbers.
    pub stats: Arc<Mutex<Stats>>,
    /// Which guest thread of this process it is, so that a late event is not taken for a new one's.
    pub number: u64,
    /// Its vCPUs stand until [`Cmd::Run`].
    pub stands: bool,
}

/// The handle of the thread.
pub struct Guest {
    cmds: Sender<Cmd>,
    thread: Option<JoinHandle<(Qmp, Capture)>>,
}

impl Guest {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread for us.
    pub fn start(parts: Parts, session: Option<Box<Session>>) -> std::io::Result<Guest> {
        let (cmds, inbox) = channel();
        let thread = std::thread::Builder::new()
            .name("guest".into())
            .spawn(move || {
                run_sooner();
                let mut w = Worker::new(parts, inbox);
                w.session = session;
                w.run();
                (w.parts.qmp, w.parts.capture)
            })?;
        Ok(Guest {
            cmds,
            thread: Some(thread),
        })
    }

    /// Sends a command; a thread that has ended has said why.
    pub fn tell(&self, cmd: Cmd) {
        let _ = self.cmds.send(cmd);
    }

    /// Another way to wake the thread, for the gates and the acks.
    pub fn sender(&self) -> Sender<Cmd> {
        self.cmds.clone()
    }

    /// Ends the thread and takes the monitor and the capture back; `None` if it died. A stream must have
    /// been closed before, else this waits for its window.
    pub fn detach(mut self) -> Option<(Qmp, Capture)> {
        let thread = self.thread.take()?;
        // Other senders live on in wakers, so the end has to be told.
        let _ = self.cmds.send(Cmd::EndStream(StreamId([0; 16])));
        drop(self);
        thread.join().ok()
    }
}

struct Handing {
    last: EpochNo,
    deadline: Instant,
}

struct Worker {
    parts: Parts,
    inbox: Receiver<Cmd>,
    session: Option<Box<Session>>,
    pages: PageSet,
    device_state: Vec<u8>,
    last_barrier: Instant,
    last_cost: Duration,
    /// Stopped by us until output drains.
    output_full: bool,
    /// Stopped by order, or not yet started.
    frozen: bool,
    /// Stopped by somebody else (`virsh suspend`).
    paused_outside: bool,
    handing: Option<Handing>,
    verify: Option<verify::Verify>,
    /// It switched itself off; the monitor said so beside an epoch.
    guest_is_down: bool,
    leave: bool,
}

impl Worker {
    fn new(parts: Parts, inbox: Receiver<Cmd>) -> Worker {
        let pages = PageSet::new();
        let frozen = parts.stands;
        Worker {
            parts,
            inbox,
            session: None,
            pages,
            device_state: Vec::new(),
            last_barrier: Instant::now(),
            last_cost: Duration::ZERO,
            output_full: false,
            frozen,
            paused_outside: false,
            handing: None,
            verify: None,
            guest_is_down: false,
            leave: false,
        }
    }

    fn run(&mut self) {
        while !self.leave {
            match self.inbox.recv_timeout(self.patience()) {
                Ok(cmd) => self.obey(cmd),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while !self.leave
                && let Ok(cmd) = self.inbox.try_recv()
            {
                self.obey(cmd);
            }
            if self.leave || !self.watch_monitor() {
                return;
            }
            self.mind_output();
            self.work();
        }
    }

    /// How long there is nothing to do.
    fn patience(&self) -> Duration {
        match &self.session {
            Some(s) if s.is_bulk() => Duration::ZERO,
            Some(s) if s.in_flight() < 2 => {
                let elapsed = self.last_barrier.elapsed();
                let due = if self.parts.nics.output_waits() {
                    self.parts.pacing.min.max(self.last_cost)
                } else {
                    self.parts.pacing.max
                };
                due.saturating_sub(elapsed).min(TICK)
            }
            _ => TICK,
        }
    }

    fn obey(&mut self, cmd: Cmd) {
        match cmd {
            Cmd::Wake => {}
            Cmd::Run => {
                self.frozen = false;
                self.cont();
            }
            Cmd::Stream(s) => {
                if s.base_unknown() {
                    self.parts.capture.mark_all_dirty();
                }
                self.pages.clear();
                self.session = Some(s);
                // The first epoch is due at once: a new primary's output waits for it.
                let now = Instant::now();
                self.last_barrier = now.checked_sub(self.parts.pacing.max).unwrap_or(now);
            }
            Cmd::Arm => {
                if let Some(s) = &mut self.session {
                    s.arm(&self.parts.nics);
                }
            }
            Cmd::EndStream(id) => {
                if id == StreamId([0; 16]) {
                    self.leave = true;
                }
                if self.session.as_ref().is_some_and(|s| s.id().stream == id) || self.leave {
                    self.end_session();
                }
            }
            Cmd::HandOver => self.hand_over(),
            Cmd::Freeze => {
                self.frozen = true;
                if let Err(e) = self.parts.qmp.stop() {
                    tracing::warn!(error = %e, "stop the vCPUs of a frozen guest");
                }
            }
            Cmd::Back(id, back) => {
                if let Some(s) = self.session.as_mut().filter(|s| s.id().stream == id)
                    && let Err(e) = s.hear(back, &self.parts.disks)
                {
                    self.broken(&e);
                }
            }
            Cmd::Verify(id) => self.begin_verify(id),
        }
    }

    fn work(&mut self) {
        if self.handing.is_some() {
            return self.mind_handover();
        }
        let Some(s) = &self.session else { return };
        let result = if s.is_bulk() {
            self.bulk_slice()
        } else if self.parts.pacing.due(Situation {
            elapsed: self.last_barrier.elapsed(),
            last_cost: self.last_cost,
            output_waits: self.parts.nics.output_waits(),
            disk_presses: self.parts.disks.over_limit(),
            in_flight: s.in_flight(),
        }) {
            self.epoch(!self.stands(), false).map(|_| ())
        } else {
            Ok(())
        };
        if let Err(e) = result {
            self.broken(&e);
        }
    }

    /// The vCPUs stand on purpose: an epoch must not set them running.
    fn stands(&self) -> bool {
        self.frozen || self.output_full || self.paused_outside
    }

    fn cont(&mut self) {
        if self.stands() {
            return;
        }
        if let Err(e) = self.parts.qmp.cont() {
            tracing::error!(error = %e, "let the vCPUs run");
        }
    }

    /// A full gate stops the vCPUs; an emptier one lets them run again.
    fn mind_output(&mut self) {
        let full = self.parts.nics.is_full();
        if full && !self.output_full {
            self.output_full = true;
            if let Err(e) = self.parts.qmp.stop() {
                tracing::warn!(error = %e, "stop the vCPUs: output is full");
            }
            self.parts.qmp.take_events().for_each(drop);
            self.tell(GuestEvent::OutputFull);
        } else if !full && self.output_full {
            self.output_full = false;
            self.cont();
            self.parts.qmp.take_events().for_each(drop);
        }
    }

    /// False when QEMU is gone.
    fn watch_monitor(&mut self) -> bool {
        let polled = self.parts.qmp.poll_events();
        let events: Vec<EventKind> = self.parts.qmp.take_events().map(|e| e.kind).collect();
        for e in events {
            match e {
                EventKind::Shutdown {
                    guest: true,
                    reason,
                } => {
                    tracing::info!(reason, "the guest shut itself down");
                    self.guest_is_down = true;
                }
                EventKind::Stop => self.paused_outside = true,
                EventKind::Resume => self.paused_outside = false,
                EventKind::BlockIoError {
                    device,
                    operation,
                    action,
                    reason,
                    ..
                } => {
                    tracing::error!(device, operation, action, reason, "the guest's disk failed");
                }
                _ => {}
            }
        }
        if self.guest_is_down {
            self.guest_shutdown();
            return false;
        }
        match polled {
            Ok(_) => true,
            Err(e) => {
                tracing::warn!(error = %e, "the guest's monitor closed");
                self.tell(GuestEvent::Ended(GuestEnd::Gone));
                false
            }
        }
    }

    /// The last epoch of a guest that switched itself off: its last writes and frames, and the flag.
    fn guest_shutdown(&mut self) {
        if self.session.as_ref().is_some_and(|s| !s.is_bulk())
            && let Err(e) = self.last_epoch()
        {
            tracing::warn!(error = %e, "the guest's shutdown could not be told to the standby");
        }
        self.tell(GuestEvent::Ended(GuestEnd::Shutdown));
    }

    fn hand_over(&mut self) {
        let ready = self.session.as_ref().is_some_and(|s| s.is_eligible());
        if !ready || self.stands() {
            let why = if ready {
                "the guest's vCPUs stand"
            } else {
                "the guest is not protected"
            };
            return self.tell(GuestEvent::HandOverFailed(why.into()));
        }
        match self.epoch(false, false) {
            Ok(last) => {
                self.frozen = true;
                self.handing = Some(Handing {
                    last,
                    deadline: Instant::now() + HANDOVER_DEADLINE,
                });
                self.mind_handover();
            }
            Err(e) => {
                self.cont();
                self.tell(GuestEvent::HandOverFailed(e.clone()));
                self.broken(&e);
            }
        }
    }

    fn mind_handover(&mut self) {
        let Some(h) = &self.handing else { return };
        let (last, late) = (h.last, Instant::now() >= h.deadline);
        let acked = self.session.as_ref().map(|s| s.acked());
        if acked.is_some_and(|a| a >= last) {
            self.handing = None;
            self.parts.nics.close();
            self.end_session();
            self.tell(GuestEvent::HandedOver(last));
        } else if late || acked.is_none() {
            self.handing = None;
            self.frozen = false;
            self.cont();
            self.tell(GuestEvent::HandOverFailed(
                "the standby did not ack the last epoch".into(),
            ));
        }
    }

    fn broken(&mut self, why: &str) {
        // A dying QEMU loses its memory before its monitor closes. That is the end of the guest, not of
        // the stream: the standby must keep its claim, it is the one that goes on.
        if why.starts_with(CAPTURE_FAILED) && self.qemu_is_ending() {
            tracing::warn!(why, "QEMU ended in the middle of an epoch");
            self.tell(GuestEvent::Ended(GuestEnd::Gone));
            self.leave = true;
            return;
        }
        if let Some(s) = &self.session {
            let id = s.id().stream;
            self.end_session();
            self.tell(GuestEvent::Broken(id, why.to_owned()));
        }
    }

    /// Looks a while whether the monitor closes.
    fn qemu_is_ending(&mut self) -> bool {
        let until = Instant::now() + DYING;
        while Instant::now() < until {
            if self.parts.qmp.poll_events().is_err() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }

    fn end_session(&mut self) {
        if let Some(s) = self.session.take() {
            s.close();
            self.pages.clear();
        }
        if let Some(v) = self.verify.take() {
            self.tell(GuestEvent::VerifyFailed(v.id(), "the stream ended".into()));
        }
    }

    fn tell(&self, e: GuestEvent) {
        // The machine outlives this thread.
        let _ = self.parts.events.send(Input::Guest(self.parts.number, e));
    }

    fn stats<R>(&self, f: impl FnOnce(&mut Stats) -> R) -> R {
        f(&mut self
            .parts
            .stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner))
    }
}
