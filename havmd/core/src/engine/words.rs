//! What the two engines of a guest say to each other (rules 1, 8, 9, 10).

use super::*;
use crate::message::{Body, Envelope, Side};
use crate::permit::Permit;
use crate::record::Generation;

impl Engine {
    pub(super) fn send(&mut self, to_life: Option<LifeId>, body: Body) {
        self.out.push(Command::Send(Envelope {
            guest: self.id.guest.clone(),
            term: self.term(),
            from: self.id.me,
            from_life: self.life,
            to_life,
            body,
        }));
    }

    /// Primary in force: it runs the guest, or would, were the guest meant to run.
    pub(super) fn active(&self) -> bool {
        let here = self.running && !self.frozen && self.conflict.is_none();
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            Some((Role::Solo, _)) => {
                here || (self.intent() == Intent::Stopped
                    && self.rec.as_ref().is_some_and(|r| r.valid))
            }
            // Its process lives, also while a new replicator takes hold of it.
            Some((Role::Protected, RoleStatus::Active)) => {
                let lives = self.life.is_some() && !self.waiting && self.qemu == Qemu::Up;
                lives && !self.frozen && self.conflict.is_none() && self.hand == Hand::No
            }
            _ => false,
        }
    }

    pub(super) fn say_hello(&mut self) {
        self.last_hello = Some(self.now);
        self.timers
            .set(Timer::Hello, self.now + self.set.hello_interval);
        let zero = crate::ids::GenId([0; 16]);
        let none = Generation {
            current: zero,
            parent: zero,
        };
        let body = Body::Hello {
            basis: self.basis(),
            role: self.rec.as_ref().map_or(Role::Ineligible, |r| r.role),
            active: self.active(),
            intent: self.intent(),
            generation: self.rec.as_ref().map_or(none, |r| r.generation).current,
            parent: self.rec.as_ref().map_or(none, |r| r.generation).parent,
        };
        self.send(None, body);
    }

    /// An answer to a Hello, bounded so that two nodes do not greet each other without end.
    pub(super) fn hello_back(&mut self) {
        let due = self
            .last_hello
            .is_none_or(|t| t + self.set.resend_interval <= self.now);
        if due {
            self.say_hello();
        }
    }

    /// Somebody has to hear from this node.
    fn wants_hello(&self) -> bool {
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            None => self.unusable.is_some(),
            Some((Role::Solo, _)) => {
                matches!(self.link, Link::Idle | Link::Broken) && !self.unprotecting
            }
            Some((Role::Protected, RoleStatus::Active | RoleStatus::Handing)) => {
                self.life.is_none()
            }
            Some((Role::Eligible | Role::Ineligible, RoleStatus::Active)) => self.life.is_none(),
            _ => false,
        }
    }

    pub(super) fn on_hello_timer(&mut self) {
        if self.wants_hello() {
            self.say_hello();
        }
    }

    pub(super) fn resend_soon(&mut self) {
        self.timers
            .set(Timer::Resend, self.now + self.set.resend_interval);
    }

    /// Repeats whatever still waits for its effect.
    pub(super) fn on_resend_timer(&mut self) {
        let Some(rec) = self.rec.clone() else { return };
        if rec.status == RoleStatus::Yielded {
            self.send_yield();
            self.timers
                .set(Timer::Resend, self.now + self.set.hello_interval);
            return;
        }
        let mut again = false;
        if rec.role == Role::Protected {
            let peer = self.peer_life();
            if let Hand::Sent(body) = self.hand.clone() {
                self.send(peer, body);
                again = true;
            }
            if self.confirming {
                self.send(peer, Body::Conf);
                again = true;
            }
            if matches!(self.link, Link::Armed(_)) {
                self.send(
                    peer,
                    Body::Protect {
                        arbiter: rec.arbiter,
                    },
                );
                again = true;
            }
            if self.ask.is_some() {
                self.send(None, Body::YieldAsk { basis: rec.basis });
                again = true;
            }
        }
        if again {
            self.resend_soon();
        }
    }

    pub(super) fn on_message(&mut self, env: Envelope) {
        if env.guest != self.id.guest || env.from != self.id.peer {
            return;
        }
        let named = matches!(
            env.body,
            Body::Join { .. } | Body::Hand { .. } | Body::Conf | Body::Protect { .. }
        );
        // Rule 1: not for my present life.
        if named && (env.to_life.is_none() || env.to_life != self.life) {
            return;
        }
        self.seen_term = self.seen_term.max(env.term);
        match env.body.clone() {
            Body::Hello {
                basis,
                role,
                active,
                intent,
                generation,
                parent,
            } => {
                let generation = Generation {
                    current: generation,
                    parent,
                };
                self.peer_word = Some(PeerWord {
                    basis,
                    role,
                    active,
                    life: env.from_life,
                });
                let target = Target {
                    term: basis,
                    generation,
                    intent,
                    life: env.from_life,
                };
                self.on_hello(env.term, role, active, target);
            }
            Body::Join { ports } => self.on_join(&env, ports),
            Body::Protect { arbiter } => self.on_protect(&env, arbiter),
            Body::Hand { n, ports } => self.on_hand(&env, n, ports),
            Body::Conf => self.on_conf(&env),
            Body::YieldAsk { basis } => self.on_yield_ask(env.term, basis),
            Body::Yield { basis, side } => self.on_yield(env.term, basis, side),
        }
    }

    fn on_hello(&mut self, term: Term, role: Role, active: bool, t: Target) {
        let primary = active && matches!(role, Role::Solo | Role::Protected);
        let Some(rec) = self.rec.clone() else {
            if primary && t.term >= self.seen_term {
                self.start_rejoin(t);
            } else if self.unusable.is_some() {
                self.hello_back();
            }
            return;
        };
        if !primary {
            return self.on_other_hello(&rec, role, t, term);
        }
        let waiting_for_conf = self.is(Role::Protected, RoleStatus::Handing)
            && self.warm()
            && matches!(self.hand, Hand::Sent(_))
            && role == Role::Protected;
        if t.term > rec.term {
            self.newer_primary(&rec, t);
        } else if t.term == rec.term && rec.status != RoleStatus::Active {
            // Rule 10. A taker of my own handover confirms it soon: then nothing is copied.
            if !waiting_for_conf {
                self.newer_primary(&rec, t);
            }
        } else if t.term == rec.basis {
            self.same_term_primary(&rec, role, t);
        } else if rec.status == RoleStatus::Yielded {
            self.send_yield();
        } else {
            self.hello_back();
        }
    }

    /// Rule 10, unless the data does not descend from what this node served (rule 16).
    fn newer_primary(&mut self, rec: &Record, t: Target) {
        let mine = rec.generation.current;
        let related = t.generation.current == mine || t.generation.parent == mine;
        let served = matches!(rec.role, Role::Solo | Role::Protected) && rec.valid;
        if served && !related {
            return self.on_conflict(format!(
                "the peer is primary in term {} with data (generation {}, from {}) that does not descend from the data served here in term {} (generation {mine})",
                t.term, t.generation.current, t.generation.parent, rec.basis
            ));
        }
        self.start_rejoin(t);
    }

    fn same_term_primary(&mut self, rec: &Record, role: Role, t: Target) {
        match (rec.role, rec.status) {
            (Role::Solo | Role::Protected, _) => self.on_conflict(format!(
                "the peer says that it is primary in term {} too",
                rec.basis
            )),
            (Role::Ineligible, RoleStatus::Active) if role == Role::Solo => self.join_primary(t),
            (Role::Ineligible, RoleStatus::Active) if self.life.is_none() => self.hello_back(),
            (Role::Eligible, RoleStatus::Active) if !self.warm() => self.hello_back(),
            _ => {}
        }
    }

    /// A Hello of a node that runs nothing.
    fn on_other_hello(&mut self, rec: &Record, role: Role, t: Target, term: Term) {
        let standby = matches!(role, Role::Eligible | Role::Ineligible) && t.term <= rec.basis;
        match (rec.role, rec.status) {
            (Role::Solo, RoleStatus::Active) if self.active() => self.hello_back(),
            (Role::Protected, RoleStatus::Active | RoleStatus::Handing) => {
                if self.life.is_none() {
                    self.peer_of_lost_primary(rec, role, t, term);
                } else if standby && t.life != self.peer_life() {
                    self.standby_says_lost();
                } else if role == Role::Protected && self.stranded(rec, t, term) {
                    self.drop_copy();
                    self.yield_primary();
                } else if role == Role::Protected {
                    // One of us handed over, and one lost its copy: it has to hear how I stand.
                    self.hello_back();
                }
            }
            (Role::Eligible, RoleStatus::Active) => self.hello_back(),
            (Role::Ineligible, RoleStatus::Active) if role == Role::Protected => self.hello_back(),
            (_, RoleStatus::Yielded) => self.send_yield(),
            _ => {}
        }
    }

    /// The standby's daemon says that its copy is another one. While the stream lives this may be
    /// an old message; said again after a while, it is true.
    fn standby_says_lost(&mut self) {
        let patience = self.set.yield_patience;
        match self.doubt {
            _ if self.stream != Stream::Alive => self.ask_yield(false),
            Some(t) if self.now > t + patience * 3 => self.doubt = Some(self.now),
            Some(t) if self.now > t + patience => self.ask_yield(false),
            Some(_) => {}
            None => self.doubt = Some(self.now),
        }
    }

    /// The image waits, and nothing was ordered to be done with it.
    fn unpromoted(&self) -> bool {
        self.waiting && !self.promoting && self.promote_due.is_none()
    }

    /// A taker that was not promoted yet, and the old primary that would name the ports has lost
    /// its copy meanwhile.
    fn stranded(&self, rec: &Record, t: Target, term: Term) -> bool {
        let handed = t.term < rec.basis && term == rec.basis && t.life != self.peer_life();
        self.unpromoted() && handed && rec.status == RoleStatus::Active
    }

    /// Rule 11: a protected primary without its guest gives way to a warm standby; any other
    /// standby has to give its claim up, and the guest starts here again.
    fn peer_of_lost_primary(&mut self, rec: &Record, role: Role, t: Target, term: Term) {
        let active = rec.status == RoleStatus::Active && rec.intent == Intent::Run;
        if active && role == Role::Protected && t.term < rec.basis && term == rec.basis {
            // It handed over to me, and nothing was released since: it goes on with its own copy.
            return self.yield_primary();
        }
        let warm = role == Role::Eligible
            && t.term == rec.basis
            && t.life.is_some()
            && t.life == self.peer_life();
        if warm && active {
            self.yield_primary();
        } else if matches!(role, Role::Eligible | Role::Ineligible) && t.term <= rec.basis {
            self.ask_yield(false);
        }
    }

    pub(super) fn on_conflict(&mut self, text: String) {
        if self.conflict.is_some() {
            return;
        }
        let term = self.term();
        self.order(Order::Freeze { term });
        self.gate_open = false;
        self.running = false;
        self.notice(
            NoticeKind::Conflict,
            Severity::Alarm,
            format!("{text}: the guest is stopped on this side; decide whose data is good, then `havm discard` on the other side"),
        );
        self.conflict = Some(text);
    }

    // ---- yields (rule 8) ----

    pub(super) fn ask_yield(&mut self, silence: bool) {
        if !self.is(Role::Protected, RoleStatus::Active)
            && !self.is(Role::Protected, RoleStatus::Handing)
        {
            return;
        }
        match &mut self.ask {
            Some(ask) => ask.silence &= silence,
            None => {
                self.ask = Some(Ask {
                    since: self.now,
                    silence,
                });
                let basis = self.basis();
                self.send(None, Body::YieldAsk { basis });
                self.resend_soon();
                self.timers
                    .set_once(Timer::Arbiter, self.now + self.set.yield_patience);
            }
        }
    }

    fn side(&self) -> Side {
        match self.rec.as_ref().map(|r| r.role) {
            Some(Role::Solo | Role::Protected) => Side::Primary,
            _ => Side::Standby,
        }
    }

    pub(super) fn send_yield(&mut self) {
        let (basis, side) = (self.basis(), self.side());
        self.send(None, Body::Yield { basis, side });
    }

    /// Gives up the claim of this side for good: durable first, then said.
    fn yield_at(&mut self, term: Term, text: &str) {
        let term = if self.mutated(Mutation::YieldAtSameTerm) {
            self.term()
        } else {
            term
        };
        if term > self.term() {
            self.change_unless(Mutation::ReclaimAfterYield, |r| {
                r.term = term;
                r.status = RoleStatus::Yielded;
            });
            self.notice(NoticeKind::Yielded, Severity::Info, text);
        }
        self.open = false;
        self.ask = None;
        self.take_over = None;
        self.send_yield();
        self.timers
            .set(Timer::Resend, self.now + self.set.hello_interval);
    }

    pub(super) fn yield_primary(&mut self) {
        let term = self.term().next();
        self.yield_at(term, "the guest was lost here; the standby goes on with it");
    }

    pub(super) fn yield_standby(&mut self, above: Term) {
        let term = self.term().max(above).next();
        if self.is(Role::Eligible, RoleStatus::Active) {
            // No ack after this.
            self.order(Order::Seal { term });
            self.sealed = true;
        }
        self.yield_at(
            term,
            "this standby gave its claim up; the primary goes on alone and syncs again",
        );
    }

    fn on_yield_ask(&mut self, asker: Term, basis: Term) {
        let Some(rec) = self.rec.clone() else { return };
        if self.rejoin.is_some() {
            return;
        }
        match (rec.role, rec.status) {
            (Role::Eligible | Role::Ineligible, _) if rec.basis <= basis => {
                if rec.status == RoleStatus::Yielded && rec.term > asker {
                    self.send_yield();
                } else {
                    self.yield_standby(asker);
                }
            }
            _ if rec.status == RoleStatus::Yielded => self.send_yield(),
            // The old primary of my handover wants it back, and can not name the ports any more.
            (Role::Protected, RoleStatus::Active)
                if self.unpromoted() && basis < rec.basis && asker == rec.basis =>
            {
                self.drop_copy();
                self.yield_primary();
            }
            (Role::Solo | Role::Protected, _) if self.active() => self.hello_back(),
            _ => {}
        }
    }

    fn on_yield(&mut self, term: Term, basis: Term, side: Side) {
        let Some(rec) = self.rec.clone() else { return };
        if self.rejoin.is_some() {
            return;
        }
        let able = !matches!(rec.role, Role::Eligible) || self.warm() || rec.cold;
        let permit = Permit::from_yield(&rec, term, basis, side).filter(|_| able);
        match permit {
            Some(permit) => self.take(permit),
            // "If both yielded, the standby's side yields again above the other's term."
            None if side == Side::Primary
                && matches!(rec.role, Role::Eligible | Role::Ineligible)
                && rec.basis <= basis =>
            {
                if rec.status == RoleStatus::Yielded && rec.term > term {
                    self.send_yield();
                } else {
                    self.yield_standby(term);
                }
            }
            None => {}
        }
    }
}
