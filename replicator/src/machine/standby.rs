//! Orders to a standby.

use super::{Machine, Obeyed, Role, text};
use crate::standby::{Parts, Standby, StandbyEvent};
use anyhow::{Result, bail};
use havm_capture::{Capture, ram_blocks};
use havm_core::ids::LifeId;
use havm_core::order::{Order, Report};
use havm_image::{RamImage, promote};
use havm_links::incoming::{Expect, Incoming};
use havm_qmp::Qmp;
use std::os::unix::fs::FileExt;

/// Staged bytes of one epoch beyond the guest's RAM and disk writes: device state, framing.
const EPOCH_SLACK_BYTES: u64 = 1 << 30;

/// A waiting QEMU.
pub(super) struct Waiting {
    pub qmp: Qmp,
    pub capture: Capture,
}

/// The guest's standby copy.
pub(super) struct Copy {
    pub life: LifeId,
    pub number: u64,
    pub standby: Standby,
    pub waiting: Option<Waiting>,
    /// The image is in the waiting QEMU.
    pub ready: bool,
    pub alive: bool,
    /// A promotion that waits for a QEMU.
    pub promote: Option<Order>,
}

impl Machine {
    /// A fresh copy: nothing is known of what it holds. A waiting QEMU that is attached already is its home;
    /// else one may be attached later.
    pub(super) fn receive(&mut self, my_life: LifeId, peer_life: Option<LifeId>) -> Obeyed {
        let home = self.take_home();
        self.let_go();
        self.env.disks.become_standby().map_err(text)?;
        self.env.disks.serve().map_err(text)?;
        let incoming = self.env.listen(self.term, my_life, peer_life)?;
        let ports = incoming.ports().to_vec();
        let (waiting, image) = home.unzip();
        let ready = waiting.is_some();
        self.start_copy(my_life, incoming, image, false)?;
        if let Role::Standby(c) = &mut self.role {
            c.waiting = waiting;
            c.ready = ready;
        }
        let term = self.term;
        self.report(Report::Listening { term, ports });
        if ready {
            self.report(Report::Ready);
        }
        Ok(())
    }

    /// The waiting QEMU that is attached, with its RAM emptied.
    fn take_home(&mut self) -> Option<(Waiting, RamImage)> {
        match std::mem::replace(&mut self.role, Role::Idle) {
            Role::Waiting(_, home) => Some(*home),
            Role::Standby(mut c) if c.ready => {
                let waiting = c.waiting.take()?;
                let mut image = c.standby.finish().image?;
                image.clear().ok()?;
                Some((waiting, image))
            }
            other => {
                self.role = other;
                None
            }
        }
    }

    fn start_copy(
        &mut self,
        life: LifeId,
        incoming: Incoming,
        image: Option<RamImage>,
        confirmed: bool,
    ) -> Obeyed {
        let number = self.next_number();
        let standby = Standby::start(Parts {
            life,
            incoming,
            disks: self.env.disks.clone(),
            max_epoch_bytes: image.as_ref().map_or(0, RamImage::total_bytes)
                + self.env.disks.total_bytes()
                + EPOCH_SLACK_BYTES,
            image,
            confirmed,
            ack_disk: self.env.ack_disk(),
            events: self.inputs.clone(),
            number,
        })
        .map_err(text)?;
        self.role = Role::Standby(Box::new(Copy {
            life,
            number,
            standby,
            waiting: None,
            ready: false,
            alive: false,
            promote: None,
        }));
        Ok(())
    }

    pub(super) fn attach_standby(&mut self, life: LifeId) -> Obeyed {
        if !matches!(self.role, Role::Standby(_)) {
            self.let_go();
        }
        let attached = self.env.disks.serve().map_err(text).and_then(|()| {
            let mut qmp = self.env.monitor()?;
            promote::prepare(&mut qmp).map_err(text)?;
            let blocks = ram_blocks(&mut qmp).map_err(text)?;
            let fresh = RamImage::map(&qmp, &blocks).map_err(text)?;
            // Ready for the day when it is the primary of a handover: from now on only what QEMU
            // itself writes counts.
            let mut capture = Capture::attach(&mut qmp).map_err(text)?;
            capture.forget_all().map_err(text)?;
            Ok((Waiting { qmp, capture }, fresh))
        });
        match (attached, &mut self.role) {
            (Ok((waiting, fresh)), Role::Standby(c)) => {
                c.life = life;
                c.ready = false;
                c.waiting = Some(waiting);
                c.standby.rehome(fresh);
                self.report(Report::Attached { life });
            }
            (Ok(home), _) => {
                self.role = Role::Waiting(life, Box::new(home));
                self.report(Report::Attached { life });
            }
            (Err(why), _) => {
                tracing::error!(why, "attach the waiting guest");
                self.report(Report::AttachFailed { why });
            }
        }
        Ok(())
    }

    pub(super) fn confirm_eligible(&mut self) -> Obeyed {
        let Role::Standby(c) = &mut self.role else {
            return Err("this replicator is not a standby".into());
        };
        c.standby.confirm();
        Ok(())
    }

    pub(super) fn seal(&mut self) -> Obeyed {
        let n = match &mut self.role {
            Role::Standby(c) => c.standby.seal(),
            _ => None,
        };
        self.report(Report::Sealed { n });
        Ok(())
    }

    /// The old primary of a handover: its paused RAM and its disk are the image.
    pub(super) fn become_standby(&mut self, my_life: LifeId, peer_life: LifeId) -> Obeyed {
        let ready = matches!(&self.role, Role::Primary(p) if p.receiver.is_some());
        if !ready {
            return Err("the guest was not handed over".into());
        }
        let Role::Primary(mut p) = std::mem::replace(&mut self.role, Role::Idle) else {
            return Err("the guest was not handed over".into());
        };
        let Some(incoming) = p.receiver.take() else {
            return Ok(());
        };
        incoming.expect(Expect {
            guest: self.env.guest().clone(),
            term: Some(self.term),
            my_life: Some(my_life),
            peer_life: Some(peer_life),
        });
        let (mut qmp, capture) = p.release().ok_or("the guest's thread died")?;
        drop(capture);
        let blocks = ram_blocks(&mut qmp).map_err(text)?;
        let mut image = RamImage::map(&qmp, &blocks).map_err(text)?;
        let mem = std::fs::File::open(format!("/proc/{}/mem", qmp.peer_pid())).map_err(text)?;
        image
            .read_private(|i, to| {
                let b = &blocks[usize::from(i)];
                let len = to.len().min(b.len as usize);
                mem.read_exact_at(&mut to[..len], b.hva)
            })
            .map_err(|e| format!("read the paused guest's private memory: {e}"))?;
        self.env.disks.become_standby().map_err(text)?;
        self.standing.clear();
        self.start_copy(my_life, incoming, Some(image), true)?;
        self.report(Report::ImageHeld);
        Ok(())
    }

    /// # Errors
    /// The copy is spoilt: the process must end.
    pub(super) fn hear_standby(&mut self, number: u64, e: StandbyEvent) -> Result<()> {
        let term = self.term;
        let Role::Standby(c) = &mut self.role else {
            return Ok(());
        };
        if c.number != number {
            return Ok(());
        }
        let report = match e {
            StandbyEvent::EligibleImage(id) => Report::EligibleImage {
                term: id.term,
                stream: id.stream,
                n: id.n,
            },
            StandbyEvent::Ready => {
                c.ready = c.waiting.is_some();
                if let Some(Order::Promote { term, expect, then }) = c.promote.take() {
                    self.report(Report::Ready);
                    if let Err(why) = self.promote(term, expect, then) {
                        self.report(Report::PromoteFailed { term, why });
                    }
                    return Ok(());
                }
                Report::Ready
            }
            StandbyEvent::Silent => {
                c.alive = false;
                Report::StreamSilent { term }
            }
            StandbyEvent::Alive => {
                c.alive = true;
                Report::StreamAlive { term }
            }
            StandbyEvent::Broken(why) => Report::StreamBroken { term, why },
            StandbyEvent::GuestShutdown => Report::PeerGuestShutdown { term },
            StandbyEvent::Spoilt(why) => bail!("the copy cannot be kept: {why}"),
        };
        self.report(report);
        Ok(())
    }
}
