//! Evidence, requests for a permit, and the take (rules 5 to 7).

use super::*;
use crate::claim::{Claim, claim};
use crate::command::FenceRequest;
use crate::event::{FenceOutcome, WitnessReply};
use crate::evidence::{Verdict, verdict};
use crate::failback::Outlook;
use crate::order::PromoteAs;
use crate::permit::{Permit, Source};
use crate::settings::ArbiterKind;

impl Engine {
    pub(super) fn on_peer(&mut self, p: Peer) {
        let back = self.peer != Peer::Alive && p == Peer::Alive;
        self.peer = p;
        if back && self.rec.is_some() && !self.is_settled() {
            self.hello_back();
        }
    }

    /// Nothing is to be said when the peer comes back: the stream speaks for itself.
    fn is_settled(&self) -> bool {
        let streaming = self.stream == Stream::Alive;
        streaming && (self.link == Link::Protected || self.is(Role::Eligible, RoleStatus::Active))
    }

    pub(super) fn on_witness_seen(&mut self, seen: Option<Incarnation>) {
        self.witness = seen;
        // Rule 12: the arbiter of a term changes only through a yield and a new term.
        let named = self.rec.as_ref().map(|r| r.arbiter);
        let stale = match (named, seen, self.set.arbiter) {
            (Some(Arbiter::Witness(old)), Some(new), ArbiterKind::Witness) => old != new,
            (Some(Arbiter::None | Arbiter::Fence), Some(_), ArbiterKind::Witness) => true,
            _ => false,
        };
        if stale && self.link == Link::Protected && self.hand == Hand::No {
            self.ask_yield(false);
        }
    }

    /// What the evidence asks for now. Called after every event.
    pub(super) fn consider(&mut self) {
        self.protect();
        let v = verdict(self.peer, self.stream);
        let settled = self.is(Role::Protected, RoleStatus::Active)
            && self.link == Link::Protected
            && v == Verdict::Fine;
        self.failback
            .protected(self.now, settled && self.ask.is_none());
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            Some((Role::Protected, RoleStatus::Active)) if self.warm() => {
                self.consider_protected(v)
            }
            Some((Role::Eligible, RoleStatus::Active)) if self.warm() => self.consider_eligible(v),
            _ => {}
        }
    }

    fn consider_protected(&mut self, v: Verdict) {
        if self.frozen {
            return;
        }
        match v {
            Verdict::Gone => {
                self.gone("the standby's host and its stream are silent");
                if self.mutated(Mutation::OpenWithoutPermit) {
                    let term = self.term();
                    self.order(Order::OpenGate { term });
                }
                // A primary asks first; standbys wait a moment.
                if self.in_flight.is_none() && !self.unreachable && !self.refused {
                    self.ask_arbiter();
                }
            }
            Verdict::GuestTrouble => {
                let at = self.now + self.set.stream_grace;
                self.timers.set_once(Timer::StreamGrace, at);
            }
            Verdict::Fine => {
                self.back();
                match self.armed_deadline() {
                    Some(at) if self.ask.is_none() => self.timers.set(Timer::StreamGrace, at),
                    _ => self.timers.stop(Timer::StreamGrace),
                }
                if self.ask.is_some_and(|a| a.silence) && self.link == Link::Protected {
                    self.ask = None;
                }
                self.consider_failback();
            }
        }
    }

    fn consider_eligible(&mut self, v: Verdict) {
        if v == Verdict::Gone {
            self.gone("the primary's host and its stream are silent");
            if !self.refused && self.in_flight.is_none() && self.intent() == Intent::Run {
                self.timers
                    .set_once(Timer::Arbiter, self.now + self.set.standby_delay);
            }
            return;
        }
        self.back();
        if self.open && self.peer == Peer::Alive && self.in_flight.is_none() {
            // Rule 7: an open request is resolved before acking again; the peer is there to take.
            let above = self.seen_term;
            self.yield_standby(above);
        } else if !self.open {
            self.timers.stop(Timer::Arbiter);
        }
    }

    fn gone(&mut self, text: &str) {
        if self.said != Some(NoticeKind::PeerLost)
            && !self.unreachable
            && self.in_flight.is_none()
            && !self.open
        {
            self.notice_once(NoticeKind::PeerLost, Severity::Warning, text);
        }
    }

    fn back(&mut self) {
        if self.unreachable || self.said == Some(NoticeKind::PeerLost) {
            self.unreachable = false;
            self.notice_once(
                NoticeKind::PeerBack,
                Severity::Info,
                "the peer is heard again",
            );
        }
    }

    pub(super) fn on_stream_grace(&mut self) {
        let trouble = verdict(self.peer, self.stream) == Verdict::GuestTrouble;
        if self.is(Role::Protected, RoleStatus::Active) && (trouble || self.armed_too_long()) {
            self.ask_yield(trouble);
        }
    }

    fn consider_failback(&mut self) {
        if self.id.at_home || self.peer != Peer::Alive || self.may_move().is_err() {
            return self.timers.stop(Timer::Failback);
        }
        if let Some(Outlook::At(at) | Outlook::Probation(at)) =
            self.failback.outlook(&self.set.failback)
        {
            self.timers.set(Timer::Failback, at);
        }
    }

    /// A protected or handing primary without its guest: words first, the arbiter later.
    pub(super) fn recover(&mut self) {
        self.timers.set(Timer::Cold, self.now + self.set.cold_wait);
        if self.intent() == Intent::Stopped {
            self.ask_yield(false);
        }
        self.say_hello();
    }

    /// Whether a permit is wanted, and by which claim.
    fn wanted(&self) -> Option<Claim> {
        let rec = self.rec.as_ref()?;
        if self.rejoin.is_some() || self.conflict.is_some() || self.frozen {
            return None;
        }
        let have = claim(rec, self.life)?;
        let gone = verdict(self.peer, self.stream) == Verdict::Gone;
        let unanswered = self
            .ask
            .is_some_and(|a| self.now >= a.since + self.set.yield_patience)
            && self.stream != Stream::Alive;
        let wanted = match (have, rec.role, rec.status) {
            (Claim::Warm, Role::Protected, RoleStatus::Active) => gone || unanswered || self.open,
            (Claim::Warm, Role::Protected, RoleStatus::Handing) => self.hand_due,
            (Claim::Warm, ..) => (gone && rec.intent == Intent::Run && !self.refused) || self.open,
            (Claim::Cold, ..) => self.cold_due && rec.intent == Intent::Run && !self.refused,
        };
        wanted.then_some(have)
    }

    /// Asks whoever arbitrates the basis; again later while no answer came.
    pub(super) fn ask_arbiter(&mut self) {
        let (Some(have), Some(rec)) = (self.wanted(), self.rec.clone()) else {
            return;
        };
        self.timers
            .set(Timer::Arbiter, self.now + self.set.arbiter_retry);
        match rec.arbiter {
            Arbiter::Witness(incarnation) if self.in_flight.is_none() => {
                let request = WitnessRequest {
                    basis: rec.basis,
                    term: rec.term.next(),
                    incarnation,
                };
                self.in_flight = Some(request);
                self.out.push(Command::Witness(request));
            }
            Arbiter::Fence if have == Claim::Warm && !self.fence_asked => {
                if let Some(peer_life) = self.peer_life() {
                    // Rule 6: stop streaming in the basis before the peer is fenced.
                    let term = rec.term;
                    match rec.role {
                        Role::Eligible => self.order(Order::Seal { term }),
                        _ => self.order(Order::CloseGate { term }),
                    }
                    self.fence_asked = true;
                    self.open = true;
                    self.out.push(Command::Fence(FenceRequest {
                        basis: rec.basis,
                        peer_life,
                    }));
                }
            }
            Arbiter::None => self.gated("no arbiter was configured for this term"),
            _ => {}
        }
    }

    fn gated(&mut self, why: &str) {
        if !self.unreachable {
            self.unreachable = true;
            let text = format!(
                "the peer is silent and nobody can say who may go on ({why}): the guest's output is held, nobody is promoted; mend a link or the witness, or see `havm force-promote`"
            );
            self.notice(NoticeKind::Gated, Severity::Alarm, text);
        }
    }

    pub(super) fn on_witness(&mut self, reply: WitnessReply) {
        let Some(asked) = self.in_flight.take() else {
            return;
        };
        let Some(rec) = self.rec.clone() else { return };
        let decided = asked.basis != rec.basis || asked.term <= rec.term || self.rejoin.is_some();
        if decided && !self.mutated(Mutation::GrantWithoutClaim) {
            return; // otherwise, meanwhile
        }
        match reply {
            WitnessReply::Granted { .. } => self.on_granted(&rec, &asked, &reply),
            WitnessReply::Refused { .. } => self.on_refused(&rec),
            WitnessReply::NotDelivered => self.gated("the witness cannot be reached"),
            WitnessReply::NoAnswer => {
                self.open = true;
                if rec.role == Role::Eligible && !self.sealed {
                    let term = asked.term;
                    self.sealed = true;
                    self.order(Order::Seal { term });
                }
                self.gated("the witness does not answer");
            }
            WitnessReply::KeyAbsent => {
                self.witness_fault("it does not know this guest: enrol it again")
            }
            WitnessReply::WrongIncarnation { .. } => {
                self.witness_fault("it is not the one that was enrolled, or is older than what was seen of it: enrol it again");
            }
        }
    }

    fn witness_fault(&mut self, why: &str) {
        self.notice_once(
            NoticeKind::WitnessFault,
            Severity::Alarm,
            format!("the witness grants nothing: {why}"),
        );
        self.gated(why);
    }

    fn on_granted(&mut self, rec: &Record, asked: &WitnessRequest, reply: &WitnessReply) {
        self.open = false;
        match Permit::from_witness(rec, self.life, self.id.me, asked, reply) {
            Some(permit) => self.take(permit),
            None if self.mutated(Mutation::GrantWithoutClaim) => {
                if let Some(permit) = Permit::forced(rec, rec.term) {
                    self.take(permit);
                }
            }
            None => self.notice(
                NoticeKind::WitnessFault,
                Severity::Alarm,
                "the witness granted a term to this node that it has no claim to; the grant is void",
            ),
        }
    }

    fn on_refused(&mut self, rec: &Record) {
        self.open = false;
        self.refused = true;
        self.timers.stop(Timer::Arbiter);
        if rec.status == RoleStatus::Handing && self.warm() {
            // It stands still already, and may still be confirmed: it keeps the state of the
            // handover.
            self.hand_due = false;
            self.notice(
                NoticeKind::Frozen,
                Severity::Alarm,
                "the arbiter gave the next term to the peer: the guest stands still here, its copy is kept until the peer is heard",
            );
            return;
        }
        let warm_primary = rec.role == Role::Protected && self.warm();
        if warm_primary && !self.frozen {
            self.frozen = true;
            self.running = false;
            let term = rec.term;
            self.order(Order::Freeze { term });
            self.notice(
                NoticeKind::Frozen,
                Severity::Alarm,
                "the arbiter gave the next term to the peer: the guest stands still here, its copy is kept until the peer is heard",
            );
            self.ask_yield(false);
        } else {
            self.notice(
                NoticeKind::Frozen,
                Severity::Warning,
                "the arbiter refused the next term: this node waits for the peer",
            );
        }
    }

    pub(super) fn on_fence(&mut self, outcome: FenceOutcome) {
        self.fence_asked = false;
        let Some(rec) = self.rec.clone() else { return };
        match Permit::from_fence(&rec, self.life, &outcome) {
            Some(permit) => self.take(permit),
            None if outcome == FenceOutcome::Failed => {
                // Never a storm: the next attempt waits.
                self.timers
                    .set(Timer::Arbiter, self.now + self.set.arbiter_retry * 30);
                self.gated("fencing failed");
            }
            None => {}
        }
    }

    /// Rule 7: the permit is used up; durable first, then the gate or the promotion.
    pub(super) fn take(&mut self, permit: Permit) {
        let Some(old) = self.rec.clone() else { return };
        // A newer primary was heard, and this copy is being given up for it: the claim is gone.
        if permit.term() <= old.term || self.rejoin.is_some() {
            return;
        }
        let (term, source) = (permit.term(), permit.source());
        let standby = matches!(old.role, Role::Eligible | Role::Ineligible);
        let image = old.role == Role::Eligible && old.status == RoleStatus::Active && self.warm();
        if image {
            self.order(Order::Seal { term });
            self.sealed = true;
        }
        let new = Record {
            term,
            basis: term,
            role: Role::Solo,
            status: RoleStatus::Active,
            arbiter: Arbiter::None,
            lives: None,
            generation: crate::record::Generation {
                current: self.ids.generation,
                parent: old.generation.current,
            },
            cold: old.cold && !standby,
            ..old.clone()
        };
        if self.mutated(Mutation::GateOpenedBeforePersist) {
            self.pretend(|r| *r = new);
        } else {
            self.persist(new);
        }
        let resume = self.frozen || self.hand != Hand::No || old.status == RoleStatus::Handing;
        // The taker of a handover whose image does not run yet.
        let unpromoted = old.role == Role::Protected && self.warm_before(&old) && self.waiting;
        self.forget_term();
        if self.moving != Move::No {
            self.timers
                .set(Timer::Hand, self.now + super::hand::MOVE_PATIENCE);
        }
        self.stream = Stream::None;
        self.failback.protected(self.now, false);
        if image || unpromoted {
            self.promote_due = Some(PromoteAs::Solo);
        } else if self.promoting || self.promote_due.is_some() {
            // A higher term while the image is being promoted: its gate opens in that one.
        } else if !standby
            && self.life.is_some()
            && self.attach == Attach::Done
            && self.rep == Rep::Up
        {
            self.go_on(term, resume);
        } else if standby {
            self.drop_copy();
        } else if self.intent() == Intent::Stopped && self.life.is_none() {
            // A stopped guest's primary: no stream is left, and the peer must hear of the term.
            self.link = Link::Idle;
            self.say_hello();
        }
        let why = match source {
            Source::Witness => "by the witness's grant",
            Source::Fence => "after the peer's power was cut",
            Source::Yield => "the peer having given it up",
            Source::Operator => "FORCED by an operator",
        };
        let (kind, severity) = match (source, standby) {
            (Source::Operator, _) => (NoticeKind::Forced, Severity::Alarm),
            (_, true) => (NoticeKind::Failover, Severity::Warning),
            (_, false) => (NoticeKind::Solo, Severity::Warning),
        };
        self.notice(
            kind,
            severity,
            format!("this node goes on alone in term {term}, {why}"),
        );
    }

    fn warm_before(&self, old: &Record) -> bool {
        self.life.is_some() && old.lives.map(|l| l.mine) == self.life
    }

    /// A primary whose guest's process is here: its gate opens, its vCPUs run.
    pub(super) fn go_on(&mut self, term: Term, resume: bool) {
        if resume {
            self.order(Order::Resume { term });
        } else {
            self.order(Order::StopStream { term });
            self.order(Order::OpenGate { term });
            if !self.running {
                self.order(Order::Run { term });
            }
        }
        self.link = Link::Idle;
        self.gate_open = true;
        self.running = true;
        self.say_hello();
    }
}
