//! The local processes, one step nearer to what the record asks for.

use super::*;
use crate::order::PromoteAs;

impl Engine {
    pub(super) fn drive(&mut self) {
        if self.rejoin.is_some() || self.timers.get(Timer::Restart).is_some() {
            return;
        }
        if self.moving == Move::Swapping {
            return self.drive_swap();
        }
        if self.promote_due.is_some() {
            return self.drive_promotion();
        }
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            Some((Role::Solo, _)) => self.drive_solo(),
            Some((Role::Protected, RoleStatus::Active | RoleStatus::Handing)) => self.drive_kept(),
            Some((Role::Ineligible, RoleStatus::Active)) => self.drive_standby(),
            _ => {}
        }
    }

    /// True when a replicator is there; starts it otherwise.
    fn replicator(&mut self, fresh: bool) -> bool {
        match self.rep {
            Rep::Down => {
                self.out.push(Command::StartReplicator);
                self.rep = Rep::Starting;
                false
            }
            Rep::Up if fresh && !self.rep_fresh => {
                self.out.push(Command::StopReplicator);
                self.rep = Rep::Stopping;
                false
            }
            Rep::Up => true,
            Rep::Starting | Rep::Stopping => false,
        }
    }

    fn drive_solo(&mut self) {
        let held = self.timers.get(Timer::SoloStart).is_some();
        let discarded = self.rec.as_ref().is_none_or(|r| !r.valid);
        if discarded || (self.disk_suspect && self.life.is_none()) {
            return;
        }
        if self.promoting || (self.life.is_none() && (held || self.intent() == Intent::Stopped)) {
            return;
        }
        let term = self.basis();
        let none = self.qemu == Qemu::None;
        if !self.replicator(none) {
            return;
        }
        match (self.qemu, self.life, self.attach) {
            (Qemu::None, ..) => {
                self.life = Some(self.ids.life);
                self.waiting = false;
                self.qemu = Qemu::Starting;
                self.out.push(Command::StartGuest {
                    life: self.ids.life,
                });
            }
            (Qemu::Up, Some(life), Attach::No) => {
                self.attach = Attach::Asked;
                self.rep_fresh = false;
                self.order(Order::AttachPrimary { life });
            }
            (Qemu::Up, Some(_), Attach::Done) => self.open_and_run(term),
            _ => {}
        }
    }

    fn open_and_run(&mut self, term: Term) {
        if self.gate_open && self.running {
            return;
        }
        if self.link == Link::Broken {
            self.order(Order::StopStream { term });
            self.link = Link::Idle;
        }
        if !self.gate_open {
            self.gate_open = true;
            self.order(Order::OpenGate { term });
        }
        if !self.running {
            self.running = true;
            self.order(Order::Run { term });
        }
        self.notice(
            NoticeKind::Solo,
            Severity::Warning,
            "the guest runs here; it has no standby yet",
        );
        self.say_hello();
    }

    /// A protected or handing primary keeps its guest's process; nothing is started anew.
    fn drive_kept(&mut self) {
        if self.qemu != Qemu::Up || self.waiting {
            return;
        }
        let Some(life) = self.life else { return };
        if self.replicator(false) && self.attach == Attach::No {
            self.attach = Attach::Asked;
            self.rep_fresh = false;
            self.order(Order::AttachPrimary { life });
        }
    }

    fn drive_standby(&mut self) {
        let Some(target) = self.join else { return };
        if target.intent == Intent::Stopped {
            return;
        }
        let none = self.qemu == Qemu::None;
        if !self.replicator(none) {
            return;
        }
        match (self.qemu, self.life, self.attach) {
            (Qemu::None, ..) => self.start_waiting(self.ids.life),
            (Qemu::Up, Some(life), Attach::No) => {
                self.attach = Attach::Asked;
                self.rep_fresh = false;
                self.order(Order::AttachStandby { life });
            }
            (Qemu::Up, Some(my_life), Attach::Done) if !self.receive_asked => {
                self.receive_asked = true;
                let term = self.basis();
                self.order(Order::Receive {
                    term,
                    my_life,
                    peer_life: target.life,
                });
            }
            _ => {}
        }
    }

    fn start_waiting(&mut self, life: LifeId) {
        self.life = Some(life);
        self.waiting = true;
        self.qemu = Qemu::Starting;
        self.out.push(Command::StartStandbyGuest { life });
    }

    /// The image of an old primary moves from its QEMU into a waiting one; the life goes on.
    fn drive_swap(&mut self) {
        match (self.qemu, self.life, self.attach) {
            (Qemu::None, Some(life), _) => {
                self.attach = Attach::No;
                self.start_waiting(life);
            }
            (Qemu::Up, Some(life), Attach::No) if self.waiting => {
                self.attach = Attach::Asked;
                self.order(Order::AttachStandby { life });
            }
            _ => {}
        }
    }

    /// The record is durable and the image is in a waiting QEMU: go.
    fn drive_promotion(&mut self) {
        let there = self.moving == Move::No && self.qemu == Qemu::Up && self.rep == Rep::Up;
        if !there || self.promoting {
            return;
        }
        let Some(then) = self.promote_due.take() else {
            return;
        };
        let expect = match then {
            PromoteAs::Solo => None,
            PromoteAs::Protected { .. } => self.sealed_at,
        };
        self.promoting = true;
        let term = self.term();
        self.order(Order::Promote { term, expect, then });
    }
}
