//! Moves on purpose: the protected role goes from one node to the other (rule 9), by an operator
//! or by itself, home.
//!
//! ```text
//!   old: HandOver -> HandedOver -> persist handing -> Hand … Conf -> persist eligible -> BecomeStandby
//!        -> ImageHeld -> kill the old QEMU, start a waiting one -> Ready
//!   new: Hand -> Seal -> Sealed(n) -> persist protected -> Promote -> Promoted -> Conf … first ack
//!   no Conf: the old one seeks a permit for the term after, and resumes
//! ```

use super::*;
use crate::ids::EpochNo;
use crate::message::{Body, Envelope};
use crate::order::PromoteAs;
use std::net::SocketAddr;

/// How long the image of an old primary may take into a waiting QEMU. QEMU's start is its bulk
/// (0.35 s measured, more on a busy host); until then the standby cannot be promoted.
pub(super) const MOVE_PATIENCE: Duration = Duration::from_secs(30);

impl Engine {
    /// Whether the guest could be moved now; the text says why not.
    pub(super) fn may_move(&self) -> Result<(), &'static str> {
        if !self.is(Role::Protected, RoleStatus::Active) || !self.warm() {
            return Err("the guest is not protected by this node now");
        }
        if self.link != Link::Protected || self.stream != Stream::Alive || self.ask.is_some() {
            return Err("the standby is not complete at the moment");
        }
        if self.hand != Hand::No {
            return Err("a move is under way");
        }
        if self.open || self.in_flight.is_some() {
            return Err("the arbiter was asked and has not answered yet");
        }
        Ok(())
    }

    pub(super) fn begin_move(&mut self, text: &str) {
        let term = self.basis();
        self.hand = Hand::Ordered;
        self.notice(NoticeKind::SwitchoverStarted, Severity::Info, text);
        self.order(Order::HandOver { term });
    }

    pub(super) fn on_failback_timer(&mut self) {
        if self.may_move().is_err() || self.peer != Peer::Alive || self.id.at_home {
            return;
        }
        let rest = self.failback.moved(self.now, &self.set.failback);
        self.automatic_move = true;
        self.begin_move("the guest moves home");
        if rest {
            self.notice(NoticeKind::Probation, Severity::Warning, "the guest has moved home too often lately: the next automatic move waits; `havm failback` moves it at once");
        }
    }

    pub(super) fn on_handed_over(&mut self, term: Term, n: EpochNo, ports: Vec<SocketAddr>) {
        let mine =
            self.is(Role::Protected, RoleStatus::Active) && self.warm() && term == self.basis();
        if self.hand != Hand::Ordered || !mine {
            return;
        }
        self.running = false;
        self.change(|r| {
            r.term = term.next();
            r.status = RoleStatus::Handing;
        });
        self.send_hand(n, ports);
        if self.mutated(Mutation::HandedOverEligibleAtOnce)
            && let Some(lives) = self.rec.as_ref().and_then(|r| r.lives)
        {
            self.on_conf(&Envelope {
                guest: self.id.guest.clone(),
                term: self.term(),
                from: self.id.peer,
                from_life: Some(lives.peer),
                to_life: Some(lives.mine),
                body: Body::Conf,
            });
        }
    }

    pub(super) fn send_hand(&mut self, n: EpochNo, ports: Vec<SocketAddr>) {
        let body = Body::Hand { n, ports };
        self.hand = Hand::Sent(body.clone());
        let peer = self.peer_life();
        self.send(peer, body);
        self.resend_soon();
        self.timers
            .set(Timer::Hand, self.now + self.set.hand_timeout);
    }

    pub(super) fn on_hand_over_failed(&mut self, why: &str) {
        if self.hand == Hand::Ordered {
            self.hand = Hand::No;
            self.failback.failed(self.now, &self.set.failback);
            self.notice(
                NoticeKind::SwitchoverFailed,
                Severity::Warning,
                format!("the move did not happen ({why}); the guest runs on here"),
            );
        }
    }

    /// No Conf: words first, and the arbiter, for the term after the one that was handed over.
    pub(super) fn on_hand_timer(&mut self) {
        if self.moving != Move::No {
            return self.copy_failed("the image did not get into a waiting QEMU in time");
        }
        if !self.is(Role::Protected, RoleStatus::Handing) || !self.warm() {
            return;
        }
        self.hand_due = true;
        self.failback.failed(self.now, &self.set.failback);
        self.notice(
            NoticeKind::SwitchoverFailed,
            Severity::Warning,
            "the peer did not confirm the move: this node asks to go on with the guest",
        );
        self.ask_yield(false);
        self.ask_arbiter();
    }

    /// (new primary) The old one's vCPUs stand at epoch n.
    pub(super) fn on_hand(&mut self, env: &Envelope, n: EpochNo, ports: Vec<SocketAddr>) {
        let named = env.from_life.is_some() && env.from_life == self.peer_life();
        if !named || !self.warm() || self.rejoin.is_some() {
            return;
        }
        if self.is(Role::Protected, RoleStatus::Active) && env.term == self.basis() {
            if !self.waiting {
                self.send(env.from_life, Body::Conf);
            } else if !self.promoting && self.promote_due.is_none() {
                // The daemon was restarted between the record and the promotion.
                self.sealed_at = Some(n);
                self.promote_due = self.as_protected(ports);
            }
            return;
        }
        if !self.is(Role::Eligible, RoleStatus::Active) || env.term != self.term().next() {
            return;
        }
        self.take_over = Some(TakeOver {
            term: env.term,
            n,
            ports,
        });
        if self.sealed {
            self.try_take_over();
        } else {
            self.sealed = true;
            self.order(Order::Seal { term: env.term });
        }
    }

    fn as_protected(&self, ports: Vec<SocketAddr>) -> Option<PromoteAs> {
        let lives = self.rec.as_ref()?.lives?;
        if self.mutated(Mutation::HandoverToSolo) {
            return Some(PromoteAs::Solo);
        }
        Some(PromoteAs::Protected {
            my_life: lives.mine,
            peer_life: lives.peer,
            ports,
        })
    }

    pub(super) fn on_sealed(&mut self, n: Option<EpochNo>) {
        self.sealed_at = n;
        self.try_take_over();
    }

    fn try_take_over(&mut self) {
        let Some(t) = self.take_over.clone() else {
            return;
        };
        let eligible = self.is(Role::Eligible, RoleStatus::Active) && self.warm();
        if !eligible || self.sealed_at.is_none() || t.term != self.term().next() {
            return;
        }
        self.take_over = None;
        if self.sealed_at != Some(t.n) {
            self.notice(NoticeKind::SwitchoverFailed, Severity::Warning, format!("the primary handed over at epoch {}, but this standby holds another one: the move is refused", t.n));
            return;
        }
        self.change(|r| {
            r.term = t.term;
            r.basis = t.term;
            r.role = Role::Protected;
            r.cold = false;
        });
        self.forget_term();
        self.stream = Stream::None;
        self.promote_due = self.as_protected(t.ports);
    }

    pub(super) fn on_promoted(&mut self, term: Term, n: EpochNo, took_us: u64) {
        if !self.promoting {
            return;
        }
        self.promoting = false;
        self.waiting = false;
        self.sealed = false;
        self.sealed_at = None;
        self.running = true;
        self.attach = Attach::Done;
        let ms = took_us / 1000;
        match self.rec.as_ref().map(|r| (r.role, r.status, r.basis)) {
            Some((Role::Solo, _, basis)) if basis == term => {
                self.gate_open = true;
                self.link = Link::Idle;
                self.notice(
                    NoticeKind::Failover,
                    Severity::Warning,
                    format!("the guest goes on here from epoch {n} ({ms} ms after the order)"),
                );
                self.say_hello();
            }
            // A permit came while the promotion as protected was under way.
            Some((Role::Solo, _, basis)) => self.go_on(basis, false),
            Some((Role::Protected, RoleStatus::Active, _)) => {
                self.link = Link::Armed(self.now);
                self.confirming = true;
                let peer = self.peer_life();
                self.send(peer, Body::Conf);
                self.resend_soon();
                self.notice(
                    NoticeKind::SwitchoverDone,
                    Severity::Info,
                    format!("the guest goes on here from epoch {n} ({ms} ms after the order)"),
                );
            }
            _ => {}
        }
    }

    /// (old primary) The new one runs: be its standby, with the paused RAM as the image.
    pub(super) fn on_conf(&mut self, env: &Envelope) {
        let handing = self.is(Role::Protected, RoleStatus::Handing) && env.term == self.term();
        let Some(lives) = self.rec.as_ref().and_then(|r| r.lives) else {
            return;
        };
        if !handing || !self.warm() || env.from_life != Some(lives.peer) || self.rejoin.is_some() {
            return;
        }
        if self.in_flight.is_some() {
            return; // the answer decides; Conf is repeated
        }
        let held = matches!(self.hand, Hand::Sent(_))
            && self.rep == Rep::Up
            && self.attach == Attach::Done;
        if !held || self.open {
            // The image is not held any more, or a request is open (rule 7): join from the beginning.
            let Some(rec) = self.rec.as_ref() else { return };
            let t = Target {
                term: env.term,
                generation: rec.generation,
                intent: rec.intent,
                life: env.from_life,
            };
            self.start_rejoin(t);
            return;
        }
        let term = env.term;
        self.change(|r| {
            r.basis = term;
            r.role = Role::Eligible;
            r.status = RoleStatus::Active;
            r.cold = false;
        });
        self.forget_term();
        self.link = Link::Idle;
        self.gate_open = false;
        self.running = false;
        self.sealed = false;
        self.stream = Stream::None;
        self.moving = Move::Holding;
        self.timers.set(Timer::Hand, self.now + MOVE_PATIENCE);
        self.failback.succeeded();
        self.order(Order::BecomeStandby {
            term,
            my_life: lives.mine,
            peer_life: lives.peer,
        });
        self.notice(
            NoticeKind::SwitchoverDone,
            Severity::Info,
            "the guest runs at the peer now; this node is its standby",
        );
    }

    /// The old QEMU may go; a waiting one takes the image. The life goes on.
    pub(super) fn on_image_held(&mut self) {
        if self.moving == Move::Holding && self.qemu == Qemu::Up {
            self.moving = Move::Swapping;
            self.attach = Attach::No;
            self.order(Order::Detach);
            self.out.push(Command::KillGuest);
            self.qemu = Qemu::Killing;
        }
    }
}
