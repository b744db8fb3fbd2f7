//! Orders to a primary.

use super::env::{WINDOW_BYTES, random_stream};
use super::{Machine, Obeyed, Role, text};
use crate::acks::{Acks, Parts as AckParts};
use crate::pacing::Pacing;
use crate::primary::{Begin, Cmd, Guest, GuestEvent, Parts, Session};
use havm_capture::Capture;
use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId};
use havm_core::order::{GuestEnd, Mode, Report, StreamBase};
use havm_disk::BLOCK_BYTES;
use havm_links::incoming::Incoming;
use havm_links::outgoing::{Outgoing, OutgoingSpec};
use havm_qmp::Qmp;
use havm_wire::acked::AckLedger;
use havm_wire::frame::{DiskShape, RamBlock, StreamStart};
use havm_wire::hello::StreamHello;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A stream that we send.
pub(super) struct Stream {
    pub id: EpochId,
    pub acks: Acks,
    pub ledger: Arc<Mutex<AckLedger>>,
    pub alive: bool,
}

/// The guest's primary.
pub(super) struct Primary {
    pub life: LifeId,
    pub guest: Guest,
    pub number: u64,
    pub mode: Mode,
    pub running: bool,
    pub stream: Option<Stream>,
    /// After a handover: where the new primary's stream will come in.
    pub receiver: Option<Incoming>,
    pub last: EpochNo,
    pub blocks: Vec<RamBlock>,
    pub vcpus: u32,
    pub sync: Option<(u64, u64)>,
}

impl Primary {
    pub(super) fn hears(&self, id: StreamId) -> bool {
        self.stream.as_ref().is_some_and(|s| s.id.stream == id)
    }

    pub(super) fn set_alive(&mut self, alive: bool) {
        if let Some(s) = &mut self.stream {
            s.alive = alive;
        }
    }

    /// Ends the stream and the guest's thread; QEMU goes on as it is.
    pub(super) fn release(mut self) -> Option<(Qmp, Capture)> {
        // First the stream, so that the thread does not wait in it.
        self.stream = None;
        self.guest.detach()
    }
}

/// The primary, or why the order does not fit.
macro_rules! primary {
    ($self:ident) => {
        match &mut $self.role {
            Role::Primary(p) => p,
            _ => return Err("this replicator is not the guest's primary".into()),
        }
    };
}

impl Machine {
    pub(super) fn attach_primary(&mut self, life: LifeId) -> Obeyed {
        if let Role::Primary(p) = &self.role
            && p.life == life
        {
            self.report(Report::Attached { life });
            return Ok(());
        }
        self.let_go();
        let attached = (|| {
            let mut qmp = self.env.monitor()?;
            let capture = Capture::attach(&mut qmp).map_err(text)?;
            let running = qmp.run_state().map_err(text)?.0;
            self.env.disks.go_solo().map_err(text)?;
            self.env.disks.serve().map_err(text)?;
            self.start_guest(life, qmp, capture, !running, None)
        })();
        match attached {
            Ok(()) => self.report(Report::Attached { life }),
            Err(why) => {
                tracing::error!(why, "attach the guest");
                self.report(Report::AttachFailed { why });
            }
        }
        Ok(())
    }

    /// Makes this process the guest's primary, with the gate as it is.
    pub(super) fn start_guest(
        &mut self,
        life: LifeId,
        mut qmp: Qmp,
        capture: Capture,
        stands: bool,
        session: Option<Box<Session>>,
    ) -> Obeyed {
        let vcpus = count_vcpus(&mut qmp);
        qmp.take_events().for_each(drop);
        let blocks = wire_blocks(&capture);
        let number = self.next_number();
        let s = &self.env.spec.settings;
        let parts = Parts {
            qmp,
            capture,
            nics: self.env.nics.clone(),
            disks: self.env.disks.clone(),
            pacing: Pacing {
                max: Duration::from_millis(s.max_interval_ms),
                min: Duration::from_millis(s.min_interval_ms),
            },
            events: self.inputs.clone(),
            stats: self.stats.clone(),
            number,
            stands,
        };
        let guest = Guest::start(parts, session).map_err(text)?;
        *self.env.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest.sender());
        self.role = Role::Primary(Box::new(Primary {
            life,
            guest,
            number,
            mode: Mode::Attached,
            running: !stands,
            stream: None,
            receiver: None,
            last: EpochNo(0),
            blocks,
            vcpus,
            sync: None,
        }));
        Ok(())
    }

    pub(super) fn run_guest(&mut self) -> Obeyed {
        let p = primary!(self);
        p.guest.tell(Cmd::Run);
        p.running = true;
        Ok(())
    }

    pub(super) fn open_gate(&mut self) -> Obeyed {
        let p = primary!(self);
        if p.mode == Mode::Handed {
            return Err("the guest was handed over: Resume takes it back".into());
        }
        // The permit is what counts: what this primary holds goes out first, in order.
        self.env.nics.pass(true);
        p.mode = Mode::Solo;
        self.end_stream();
        Ok(())
    }

    pub(super) fn close_gate(&mut self) -> Obeyed {
        let p = primary!(self);
        match &p.stream {
            Some(s) => {
                let next = s
                    .ledger
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .closed()
                    .next();
                self.env.nics.hold(s.id.stream, s.id.term, next);
            }
            None => self.env.nics.close(),
        }
        Ok(())
    }

    fn end_stream(&mut self) {
        let Role::Primary(p) = &mut self.role else {
            return;
        };
        if let Some(s) = p.stream.take() {
            let id = s.id.stream;
            drop(s);
            p.guest.tell(Cmd::EndStream(id));
            p.sync = None;
            if let Err(e) = self.env.disks.end_tracking() {
                tracing::error!(error = %e, "end of tracking");
            }
        }
    }

    pub(super) fn start_stream(
        &mut self,
        my_life: LifeId,
        peer_life: LifeId,
        ports: &[SocketAddr],
        base: StreamBase,
        eligible: bool,
    ) -> Obeyed {
        primary!(self);
        self.end_stream();
        let (session, stream) = self.make_stream(my_life, peer_life, ports, base, eligible)?;
        let p = primary!(self);
        p.guest.tell(Cmd::Stream(session));
        p.stream = Some(stream);
        p.mode = if eligible {
            Mode::Protected
        } else {
            Mode::Syncing
        };
        Ok(())
    }

    fn make_stream(
        &mut self,
        my_life: LifeId,
        peer_life: LifeId,
        ports: &[SocketAddr],
        base: StreamBase,
        eligible: bool,
    ) -> Result<(Box<Session>, Stream), String> {
        let p = primary!(self);
        let id = EpochId {
            term: self.term,
            stream: random_stream()?,
            n: EpochNo(0),
        };
        let spec = &self.env.spec;
        let hello = StreamHello {
            guest: spec.guest.clone(),
            term: id.term,
            stream: id.stream,
            my_life,
            peer_life,
        };
        let local = |to: &SocketAddr| {
            spec.links
                .iter()
                .find(|l| l.peer == to.ip())
                .map(|l| l.local)
        };
        let out = Outgoing::connect(OutgoingSpec {
            identity: self.env.identity.clone(),
            peer: self.env.peer,
            links: ports.iter().map(|a| (local(a), *a)).collect(),
            hello,
            window_bytes: WINDOW_BYTES,
            timers: self.env.timers(),
        })
        .map_err(text)?;
        let out = Arc::new(out);
        let ledger = Arc::new(Mutex::new(AckLedger::new(id.term, id.stream, peer_life)));
        let start = StreamStart {
            guest: spec.guest.clone(),
            term: id.term,
            stream: id.stream,
            my_life,
            peer_life,
            base,
            blocks: p.blocks.clone(),
            disks: self
                .env
                .disks
                .iter()
                .map(|d| DiskShape {
                    size: d.size(),
                    block_bytes: BLOCK_BYTES as u32,
                })
                .collect(),
            machine: spec.machine.clone(),
        };
        let begin = Begin {
            id,
            start,
            out: out.clone(),
            ledger: ledger.clone(),
            delta_cache_mib: spec.settings.delta_cache_mib as usize,
            eligible,
        };
        let session = Session::new(begin, &self.env.disks);
        let acks = Acks::start(AckParts {
            id,
            out,
            ledger: ledger.clone(),
            nics: self.env.nics.clone(),
            disks: self.env.disks.clone(),
            guest: p.guest.sender(),
            events: self.inputs.clone(),
            protected: false,
        })
        .map_err(text)?;
        self.env
            .disks
            .begin_tracking(id.stream, EpochNo(1))
            .map_err(text)?;
        Ok((
            Box::new(session),
            Stream {
                id,
                acks,
                ledger,
                alive: true,
            },
        ))
    }

    pub(super) fn stop_stream(&mut self) -> Obeyed {
        primary!(self);
        self.end_stream();
        Ok(())
    }

    pub(super) fn arm(&mut self) -> Obeyed {
        let p = primary!(self);
        if p.stream.is_none() {
            return Err("there is no stream to arm".into());
        }
        p.guest.tell(Cmd::Arm);
        p.mode = Mode::Protected;
        p.sync = None;
        Ok(())
    }

    pub(super) fn hand_over(&mut self) -> Obeyed {
        primary!(self).guest.tell(Cmd::HandOver);
        Ok(())
    }

    pub(super) fn freeze(&mut self) -> Obeyed {
        self.env.nics.close();
        self.end_stream();
        let p = primary!(self);
        p.guest.tell(Cmd::Freeze);
        p.mode = Mode::Frozen;
        p.running = false;
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Obeyed {
        let p = primary!(self);
        p.receiver = None;
        self.env.nics.pass(true);
        self.end_stream();
        // A handed guest's stream is gone already, its tracking is not.
        self.env.disks.end_tracking().map_err(text)?;
        let p = primary!(self);
        p.mode = Mode::Solo;
        p.running = true;
        p.guest.tell(Cmd::Run);
        Ok(())
    }

    pub(super) fn verify(&mut self, id: u64) -> Obeyed {
        primary!(self).guest.tell(Cmd::Verify(id));
        Ok(())
    }

    pub(super) fn hear_guest(&mut self, number: u64, e: GuestEvent) {
        let term = self.term;
        let Role::Primary(p) = &mut self.role else {
            return;
        };
        if p.number != number {
            return;
        }
        let report = match e {
            GuestEvent::Synced(id) if p.hears(id) => {
                if self.flushing {
                    // The standby will count as equal and durable: so must this side be first.
                    self.synced_waits = true;
                    return;
                }
                Report::Synced { term }
            }
            GuestEvent::Synced(_) => return,
            GuestEvent::Progress {
                done_bytes,
                total_bytes,
            } => {
                if p.mode != Mode::Syncing {
                    return;
                }
                p.sync = Some((done_bytes, total_bytes));
                Report::SyncProgress {
                    done_bytes,
                    total_bytes,
                }
            }
            GuestEvent::Broken(id, why) if p.hears(id) => Report::StreamBroken { term, why },
            GuestEvent::Broken(..) => return,
            GuestEvent::HandedOver(n) => return self.handed_over(n),
            GuestEvent::HandOverFailed(why) => Report::HandOverFailed { term, why },
            GuestEvent::Ended(how) => {
                p.running = false;
                if how == GuestEnd::Gone {
                    self.env.nics.close();
                }
                Report::GuestEnded { how }
            }
            GuestEvent::OutputFull => Report::OutputFull,
            GuestEvent::VerifyFailed(id, why) => Report::Verified {
                id,
                ram_different: 0,
                ram_pages: 0,
                disk_different: 0,
                disk_blocks: 0,
                error: Some(why),
            },
        };
        self.report(report);
    }

    fn handed_over(&mut self, n: EpochNo) {
        let term = self.term;
        let Role::Primary(p) = &mut self.role else {
            return;
        };
        // The new primary's term is not known to be taken yet; its lives are: ours, and the standby's.
        match self.env.listen(term.next(), p.life, None) {
            Ok(incoming) => {
                let ports = incoming.ports().to_vec();
                p.receiver = Some(incoming);
                p.mode = Mode::Handed;
                p.running = false;
                p.last = n;
                p.stream = None;
                self.report(Report::HandedOver { term, n, ports });
            }
            Err(why) => {
                // Nothing was given away yet, but the stream has ended.
                p.guest.tell(Cmd::Run);
                self.report(Report::HandOverFailed {
                    term,
                    why: why.clone(),
                });
                self.report(Report::StreamBroken { term, why });
            }
        }
    }
}

fn wire_blocks(capture: &Capture) -> Vec<RamBlock> {
    let block = |b: &havm_capture::RamBlock| RamBlock {
        name: b.name.clone(),
        len: b.len,
        guest_addr: b.guest_addr,
        shared: b.shared_file,
    };
    capture.blocks().iter().map(block).collect()
}

fn count_vcpus(qmp: &mut Qmp) -> u32 {
    let cpus = qmp.execute("query-cpus-fast", serde_json::json!({}));
    cpus.ok()
        .and_then(|v| v.as_array().map(|a| a.len() as u32))
        .unwrap_or(0)
}
