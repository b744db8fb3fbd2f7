//! Becoming a standby: rejoin, join, the complete image (rules 3, 10).

use super::*;
use crate::message::{Body, Envelope};

impl Engine {
    /// Rule 10: close the gate, kill QEMU and see it dead; the rest follows in `finish_rejoin`.
    pub(super) fn start_rejoin(&mut self, t: Target) {
        if let Some(old) = self.rejoin {
            if t.term >= old.term {
                self.rejoin = Some(t);
            }
            return;
        }
        let term = self.term();
        self.rejoin = Some(t);
        self.ask = None;
        if matches!(
            self.rec.as_ref().map(|r| r.role),
            Some(Role::Solo | Role::Protected)
        ) {
            self.order(Order::CloseGate { term });
        }
        self.notice(
            NoticeKind::Rejoin,
            Severity::Info,
            format!("the peer is primary in term {}: the copy here is given up and made anew from the peer's", t.term),
        );
        if self.mutated(Mutation::RejoinWithoutKill) {
            self.end_life();
            self.finish_rejoin();
            return;
        }
        self.end_life();
        self.order(Order::Detach);
        self.out.push(Command::KillGuest);
        self.qemu = Qemu::Killing;
    }

    /// The old guest is seen dead: the promise to be a standby of that term is made durable, and
    /// a fresh copy prepared.
    pub(super) fn finish_rejoin(&mut self) {
        let Some(t) = self.rejoin.take() else { return };
        let new = Record {
            guest: self.id.guest.clone(),
            owner: self.id.me,
            term: t.term,
            basis: t.term,
            role: Role::Ineligible,
            status: RoleStatus::Active,
            arbiter: Arbiter::None,
            lives: None,
            generation: t.generation,
            cold: false,
            valid: false,
            intent: t.intent,
        };
        self.persist(new);
        self.disk_suspect = false;
        self.end_life();
        self.forget_term();
        self.join = Some(t);
        if self.rep == Rep::Up && !self.rep_fresh {
            self.out.push(Command::StopReplicator);
            self.rep = Rep::Stopping;
        }
    }

    /// What belonged to the old basis only.
    pub(super) fn forget_term(&mut self) {
        self.ask = None;
        self.open = false;
        self.refused = false;
        self.cold_due = false;
        self.hand_due = false;
        self.frozen = false;
        self.unreachable = false;
        self.doubt = None;
        self.confirming = false;
        self.take_over = None;
        self.hand = Hand::No;
        for t in [
            Timer::Cold,
            Timer::Hand,
            Timer::Arbiter,
            Timer::StreamGrace,
            Timer::Failback,
            Timer::Restart,
            Timer::SoloStart,
        ] {
            self.timers.stop(t);
        }
    }

    /// A solo primary of my own term looks for its standby.
    pub(super) fn join_primary(&mut self, t: Target) {
        // Nothing is written while both are known already.
        self.change(|r| {
            r.intent = t.intent;
            r.generation = t.generation;
        });
        let new_primary = self.join.is_some_and(|old| old.life != t.life);
        self.join = Some(t);
        if new_primary && self.receive_asked {
            // Another process of the primary: whatever was received belongs to none.
            self.standby_lost();
            self.join = Some(t);
            return;
        }
        self.send_join();
    }

    pub(super) fn send_join(&mut self) {
        let (Some(ports), Some(t)) = (self.ports.clone(), self.join) else {
            return;
        };
        if self.attach == Attach::Done && t.life.is_some() {
            self.send(t.life, Body::Join { ports });
        }
    }

    /// The copy here is lost: its life is over, and the primary is told.
    pub(super) fn standby_lost(&mut self) {
        let had = self.life.is_some();
        self.drop_copy();
        if self.is(Role::Eligible, RoleStatus::Active) && had {
            self.notice(
                NoticeKind::Warning,
                Severity::Warning,
                "the standby's image was lost; it is made anew from the primary",
            );
        }
        if had {
            self.say_hello();
        } else {
            self.timers.set_once(Timer::Hello, self.now);
        }
    }

    /// Rule 3, from the primary: it is protected by this life, under this arbiter.
    pub(super) fn on_protect(&mut self, env: &Envelope, arbiter: Arbiter) {
        let mine = self.is(Role::Ineligible, RoleStatus::Active) && env.term == self.basis();
        if let (true, Some(life)) = (mine, env.from_life) {
            self.told = Some((arbiter, life));
            self.try_eligible();
        }
    }

    pub(super) fn on_eligible_image(&mut self, term: Term) {
        if self.is(Role::Eligible, RoleStatus::Active) && term == self.basis() && self.warm() {
            self.order(Order::ConfirmEligible { term });
        } else if self.is(Role::Ineligible, RoleStatus::Active)
            && term == self.basis()
            && self.attach == Attach::Done
            && self.receive_asked
        {
            self.image_ready = true;
            self.stream = Stream::Alive;
            self.try_eligible();
        }
    }

    /// Image complete, and the primary's arbiter and life known: durable, then acks (rule 3).
    fn try_eligible(&mut self) {
        let (true, Some((arbiter, peer)), Some(mine)) = (self.image_ready, self.told, self.life)
        else {
            return;
        };
        if self.attach != Attach::Done || self.rejoin.is_some() {
            return;
        }
        let term = self.basis();
        let wrong = self.mutated(Mutation::ColdClaimWithAckMemory);
        self.change_unless(Mutation::NoPersistBeforeAck, |r| {
            r.role = Role::Eligible;
            r.arbiter = arbiter;
            r.lives = Some(crate::ids::Lives { mine, peer });
            r.valid = true;
            // Acks are in memory only: this disk is not good enough to start from.
            r.cold = wrong;
        });
        self.forget_term();
        self.image_ready = false;
        self.order(Order::ConfirmEligible { term });
        self.notice(
            NoticeKind::StandbyReady,
            Severity::Info,
            "this node is a complete standby",
        );
    }
}
