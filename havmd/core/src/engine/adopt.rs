//! Start: the record, and whatever outlived the last daemon (rule 11).

use super::*;
use crate::event::{Found, Started};
use crate::order::{Mode, PromoteAs};

impl Engine {
    pub(super) fn on_started(&mut self, s: Started) {
        self.started = true;
        self.rep = if s.replica.is_some() {
            Rep::Up
        } else {
            Rep::Down
        };
        self.replica = s.replica;
        self.qemu = if s.life.is_some() {
            Qemu::Up
        } else {
            Qemu::None
        };
        self.life = s.life;
        self.waiting = s.waiting;
        match s.record {
            Found::Absent => {}
            Found::Unusable { term, why } => self.adopt_unusable(term, why),
            Found::Loaded(rec) if rec.owner != self.id.me || rec.guest != self.id.guest => {
                let why = format!(
                    "it was written by node {} for guest {}",
                    rec.owner, rec.guest
                );
                self.adopt_unusable(rec.term, why);
            }
            Found::Loaded(rec) => {
                self.seen_term = rec.term;
                self.rec = Some(rec);
                self.adopt(s.ended_on_purpose);
                self.say_hello();
            }
        }
    }

    /// No claim; the copy is kept, silent, until a primary's Hello replaces it.
    fn adopt_unusable(&mut self, term: Term, why: String) {
        self.seen_term = term;
        self.order(Order::Freeze { term });
        let text = format!(
            "the guest's record here cannot be used: {why}. This node makes no claim and can only join the peer's primary; if the peer is gone for good, see `havm force-promote`"
        );
        self.unusable = Some(why);
        self.notice(NoticeKind::RecordFault, Severity::Alarm, text);
        self.say_hello();
    }

    fn mode(&self) -> Option<Mode> {
        let r = self.replica.as_ref()?;
        (r.life.is_some() && r.life == self.life).then_some(r.mode)
    }

    fn adopt(&mut self, ended_on_purpose: bool) {
        let Some(rec) = self.rec.clone() else { return };
        let primary = matches!(rec.role, Role::Solo | Role::Protected);
        if let Some(r) = &self.replica {
            self.stream = if r.stream_alive {
                Stream::Alive
            } else {
                Stream::Silent
            };
        }
        if let Some(mode) = self.mode() {
            self.attach = Attach::Done;
            // Promoted before this daemon started.
            let waits = matches!(
                mode,
                Mode::Waiting | Mode::Receiving | Mode::Eligible | Mode::Sealed
            );
            self.waiting &= waits || mode == Mode::Idle;
        } else if primary && self.life.is_some() {
            // Taken for promoted; were it not, it could not be attached as a primary.
            self.waiting = false;
        }
        if primary && self.life.is_none() && ended_on_purpose && rec.intent == Intent::Run {
            self.change(|r| r.intent = Intent::Stopped);
        }
        // Nothing of the last daemon's is left: perhaps the host was booted, and what was in its
        // page cache is gone.
        let bare = self.life.is_none() && self.replica.is_none();
        if primary && bare && !rec.cold && rec.valid {
            self.disk_suspect = true;
            self.notice(
                NoticeKind::StartFailed,
                Severity::Alarm,
                "this node failed in the moment between a failover and the flush of its disk, which may lack acknowledged writes: the guest is not started from it unless `havm start` says so here; `havm force-promote` at the peer goes on with the peer's copy instead",
            );
        }
        match (rec.role, rec.status) {
            (Role::Solo, _) => self.adopt_solo(rec.term),
            (Role::Protected, RoleStatus::Active) => self.adopt_protected(&rec),
            (Role::Protected, RoleStatus::Handing) => self.adopt_handing(),
            (Role::Eligible, RoleStatus::Active) => self.adopt_eligible(&rec),
            (Role::Ineligible, RoleStatus::Active) => self.adopt_ineligible(),
            (_, _) => self.timers.set(Timer::Resend, self.now),
        }
    }

    fn adopt_solo(&mut self, term: Term) {
        match self.mode() {
            Some(Mode::Solo | Mode::Syncing) => {
                self.running = self.replica.as_ref().is_some_and(|r| r.running);
                // The gate is opened (again); of a stream the other end is not known any more.
                self.link = Link::Broken;
            }
            Some(Mode::Protected) => {
                self.running = self.replica.as_ref().is_some_and(|r| r.running);
                self.link = Link::Broken;
            }
            Some(Mode::Frozen | Mode::Handed) => {
                self.order(Order::Resume { term });
                self.gate_open = true;
                self.running = true;
            }
            Some(Mode::Eligible | Mode::Sealed) if self.waiting => {
                self.promote_due = Some(PromoteAs::Solo);
            }
            Some(Mode::Attached) => {}
            Some(_) => self.drop_copy(),
            // Without a replicator the guest's process is attached again; nothing lives: a start
            // from the disk, after a moment in which a higher term may be heard of.
            None if self.life.is_some() => {
                if self.rep == Rep::Up {
                    self.attach = Attach::No;
                }
            }
            None => self
                .timers
                .set(Timer::SoloStart, self.now + self.set.solo_start_wait),
        }
    }

    fn adopt_protected(&mut self, rec: &Record) {
        if !self.warm() {
            self.drop_copy();
            if self.mutated(Mutation::RestartProtected) {
                return self.pretend(|r| r.role = Role::Solo);
            }
            self.recover();
            return;
        }
        let term = rec.basis;
        let (running, acked) = self
            .replica
            .as_ref()
            .map_or((false, 0), |r| (r.running, r.acked.0));
        self.running = running;
        match self.mode() {
            Some(Mode::Protected) => {
                self.link = if acked > 0 {
                    Link::Protected
                } else {
                    Link::Armed(self.now)
                };
                self.confirming = acked == 0;
                self.timers.set(Timer::Resend, self.now);
            }
            Some(Mode::Syncing) => {
                self.order(Order::CloseGate { term });
                self.order(Order::Arm { term });
                self.link = Link::Armed(self.now);
                self.timers.set(Timer::Resend, self.now);
            }
            Some(Mode::Handed) => {
                let n = self.replica.as_ref().map(|r| (r.acked, r.ports.clone()));
                self.hand = Hand::Ordered;
                if let Some((n, ports)) = n {
                    self.on_handed_over(term, n, ports);
                }
            }
            Some(Mode::Frozen) => {
                self.frozen = true;
                self.ask_yield(false);
            }
            // A handover's taker that was not promoted yet: the repeated Hand names the ports.
            Some(Mode::Eligible | Mode::Sealed) if self.waiting => {}
            _ => {
                self.order(Order::CloseGate { term });
                self.link = Link::Broken;
                self.stream = Stream::None;
                self.ask_yield(false);
            }
        }
    }

    fn adopt_handing(&mut self) {
        if !self.warm() {
            self.drop_copy();
            self.recover();
            return;
        }
        if let (Some(Mode::Handed), Some(r)) = (self.mode(), &self.replica) {
            let (n, ports) = (r.acked, r.ports.clone());
            self.send_hand(n, ports);
        } else {
            self.timers
                .set(Timer::Hand, self.now + self.set.hand_timeout);
        }
    }

    fn adopt_eligible(&mut self, rec: &Record) {
        let mode = self.mode().filter(|_| self.warm());
        let (Some(mode), Some(lives)) = (mode, rec.lives) else {
            return self.standby_lost();
        };
        match (mode, self.waiting) {
            (Mode::Handed, _) => {
                self.order(Order::BecomeStandby {
                    term: rec.term,
                    my_life: lives.mine,
                    peer_life: lives.peer,
                });
                self.moving = Move::Holding;
                self.timers
                    .set(Timer::Hand, self.now + super::hand::MOVE_PATIENCE);
            }
            (Mode::Receiving, true) => self.order(Order::ConfirmEligible { term: rec.term }),
            (Mode::Eligible, true) => {}
            (Mode::Sealed, true) => {
                self.sealed = true;
                self.sealed_at = self.replica.as_ref().map(|r| r.acked);
                // Why it was sealed is not known any more: a request may be open (rule 7).
                self.open = true;
            }
            _ => self.standby_lost(),
        }
    }

    fn adopt_ineligible(&mut self) {
        let ready = self.mode() == Some(Mode::Receiving) && self.waiting;
        let same = self.replica.as_ref().filter(|r| r.term == self.basis());
        match same.map(|r| r.ports.clone()) {
            Some(ports) if ready && !ports.is_empty() => {
                self.receive_asked = true;
                self.ports = Some(ports);
            }
            _ => self.standby_lost(),
        }
    }
}
