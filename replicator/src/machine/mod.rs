//! The machine: one thread that takes orders and events one at a time and changes the role.
//!
//! ```text
//!   idle ──AttachPrimary──> primary(attached ─OpenGate─> solo ─StartStream─> syncing ─Arm─> protected)
//!    ^                         │  HandOver: handed ─Resume─> solo        │ Freeze: frozen ─Resume─> solo
//!    │                         └─ handed ─BecomeStandby─┐
//!    ├──AttachStandby──> waiting ─Receive─> standby(receiving ─ConfirmEligible─> eligible) ─Promote─> primary
//!    └── Detach from anywhere
//! ```
//!
//! An order of a term below the highest seen is refused: a daemon that was overtaken cannot undo what its
//! successor did.

mod env;
mod primary;
mod promote;
mod standby;
mod state;

use crate::acks::StreamEvent;
use crate::control::Reports;
use crate::input::Input;
use crate::standing::Standing;
use crate::stats::Stats;
use anyhow::Result;
pub use env::Env;
use havm_core::ids::{LifeId, StreamId, Term};
use havm_core::order::{Order, Report};
use havm_image::RamImage;
use primary::Primary;
use standby::{Copy, Waiting};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often the state is told without being asked for.
const TELL_STATE: Duration = Duration::from_secs(1);

/// What this process is to the guest.
enum Role {
    Idle,
    Primary(Box<Primary>),
    /// A waiting QEMU is attached, and nothing is received yet.
    Waiting(LifeId, Box<(Waiting, RamImage)>),
    Standby(Box<Copy>),
}

/// See the module.
pub struct Machine {
    env: Env,
    reports: Reports,
    standing: Standing,
    inbox: Receiver<Input>,
    inputs: Sender<Input>,
    stats: Arc<Mutex<Stats>>,
    role: Role,
    term: Term,
    /// Numbers guest threads and copies, so that a late event is recognised.
    number: u64,
    /// What was committed before a promotion is not durable in place yet.
    flushing: bool,
    /// The standby is up to date, but the flush is still under way.
    synced_waits: bool,
    leave: bool,
}

impl Machine {
    /// A machine without a role.
    pub fn new(
        env: Env,
        reports: Reports,
        inputs: Sender<Input>,
        inbox: Receiver<Input>,
    ) -> Machine {
        Machine {
            env,
            reports,
            standing: Standing::default(),
            inbox,
            inputs,
            stats: Arc::default(),
            role: Role::Idle,
            term: Term(0),
            number: 0,
            flushing: false,
            synced_waits: false,
            leave: false,
        }
    }

    /// Runs until it is told to leave. An error ends the process on purpose: a copy that is spoilt has no
    /// life left (decision 0001).
    ///
    /// # Errors
    /// The copy is spoilt.
    pub fn run(mut self) -> Result<()> {
        let mut told = Instant::now();
        while !self.leave {
            let wait = TELL_STATE.saturating_sub(told.elapsed());
            match self.inbox.recv_timeout(wait) {
                Ok(Input::Order(o)) => self.obey(o),
                Ok(Input::Guest(n, e)) => self.hear_guest(n, e),
                Ok(Input::Stream(id, e)) => self.hear_stream(id, e),
                Ok(Input::Standby(n, e)) => self.hear_standby(n, e)?,
                Ok(Input::Flushed(term)) => self.flushed(term),
                Err(RecvTimeoutError::Timeout) => {
                    told = Instant::now();
                    self.reports.send(&Report::State(self.state()));
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.env.nics.close();
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        let name = order.name();
        if let Some(term) = order.term() {
            if term < self.term {
                let why = format!("its term {term} is over, {} is the present one", self.term);
                return self.refuse(name, why);
            }
            self.term = term;
        }
        tracing::debug!(order = name, term = %self.term, "order");
        let result = match order {
            Order::Status => {
                self.reports.send(&Report::State(self.state()));
                self.standing
                    .all()
                    .iter()
                    .for_each(|r| self.reports.send(r));
                Ok(())
            }
            Order::AttachPrimary { life } => self.attach_primary(life),
            Order::AttachStandby { life } => self.attach_standby(life),
            Order::Run { .. } => self.run_guest(),
            Order::OpenGate { .. } => self.open_gate(),
            Order::CloseGate { .. } => self.close_gate(),
            Order::StartStream {
                my_life,
                peer_life,
                ports,
                base,
                ..
            } => self.start_stream(my_life, peer_life, &ports, base, false),
            Order::StopStream { .. } => self.stop_stream(),
            Order::Arm { .. } => self.arm(),
            Order::Receive {
                my_life, peer_life, ..
            } => self.receive(my_life, peer_life),
            Order::ConfirmEligible { .. } => self.confirm_eligible(),
            Order::Seal { .. } => self.seal(),
            Order::Promote { term, expect, then } => self.promote(term, expect, then),
            Order::HandOver { .. } => self.hand_over(),
            Order::Resume { .. } => self.resume(),
            Order::BecomeStandby {
                my_life, peer_life, ..
            } => self.become_standby(my_life, peer_life),
            Order::Freeze { .. } => self.freeze(),
            Order::Detach => {
                self.detach();
                self.reports.send(&Report::Detached);
                Ok(())
            }
            Order::Verify { id } => self.verify(id),
            Order::Quit => {
                self.quit();
                Ok(())
            }
        };
        if let Err(why) = result {
            self.refuse(name, why);
        }
    }

    fn flushed(&mut self, term: Term) {
        self.flushing = false;
        self.report(Report::DiskFlushed { term });
        if std::mem::take(&mut self.synced_waits) {
            let term = self.term;
            self.report(Report::Synced { term });
        }
    }

    fn refuse(&self, order: &str, why: String) {
        tracing::warn!(order, why, "order refused");
        self.reports.send(&Report::Refused {
            order: order.into(),
            why,
        });
    }

    /// Tells the daemon something for a person, now and when it connects.
    pub fn warn(&mut self, r: Report) {
        self.report(r);
    }

    fn report(&mut self, r: Report) {
        self.standing.note(&r);
        self.reports.send(&r);
    }

    fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn hear_stream(&mut self, id: StreamId, e: StreamEvent) {
        let term = self.term;
        let Role::Primary(p) = &mut self.role else {
            return;
        };
        if !p.hears(id) {
            return;
        }
        let report = match e {
            StreamEvent::Protected(n) => Report::Protected {
                term,
                stream: id,
                n,
            },
            StreamEvent::Silent => {
                p.set_alive(false);
                Report::StreamSilent { term }
            }
            StreamEvent::Alive => {
                p.set_alive(true);
                Report::StreamAlive { term }
            }
            StreamEvent::Broken(why) => Report::StreamBroken { term, why },
            StreamEvent::Verified(b) => match state::verified(b) {
                Some(r) => r,
                None => return,
            },
        };
        self.report(report);
    }

    /// Lets go of QEMU. An image that is held does not need it: it waits for the next one.
    fn detach(&mut self) {
        match &mut self.role {
            Role::Standby(c) => {
                c.waiting = None;
                c.ready = false;
            }
            _ => self.let_go(),
        }
    }

    /// Leaves the guest's QEMU alone, whatever the role was; nothing passes the gate.
    fn let_go(&mut self) {
        self.env.nics.close();
        match std::mem::replace(&mut self.role, Role::Idle) {
            Role::Idle => {}
            Role::Primary(p) => {
                drop(p.release());
                if let Err(e) = self.env.disks.end_tracking() {
                    tracing::debug!(error = %e, "end of tracking");
                }
            }
            Role::Waiting(_, home) => drop(home),
            Role::Standby(c) => drop(c),
        }
        self.env.nics.discard();
        self.standing.clear();
    }

    fn quit(&mut self) {
        self.let_go();
        for d in self.env.disks.iter() {
            if let Err(e) = d.close() {
                tracing::warn!(error = %e, "closing a disk");
            }
        }
        self.env.remove_devices();
        self.leave = true;
    }
}

/// Why an order was not obeyed, for a person.
type Obeyed = std::result::Result<(), String>;

fn text(e: impl std::fmt::Display) -> String {
    format!("{e:#}")
}
