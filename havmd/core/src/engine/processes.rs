//! What happens to the processes here: replicator and guest.

use super::*;

impl Engine {
    /// The copy here is given up: guest killed, replicator ended, life over.
    pub(super) fn drop_copy(&mut self) {
        self.end_life();
        if matches!(self.qemu, Qemu::Starting | Qemu::Up) {
            self.order(Order::Detach);
            self.out.push(Command::KillGuest);
            self.qemu = Qemu::Killing;
        }
        if matches!(self.rep, Rep::Up | Rep::Starting) {
            self.out.push(Command::StopReplicator);
            self.rep = Rep::Stopping;
        }
    }

    /// Forgets everything that was true of the copy only.
    pub(super) fn end_life(&mut self) {
        self.life = None;
        self.waiting = false;
        self.attach = Attach::No;
        self.gate_open = false;
        self.running = false;
        self.link = Link::Idle;
        self.stream = Stream::None;
        self.frozen = false;
        self.receive_asked = false;
        self.ports = None;
        self.image_ready = false;
        self.told = None;
        self.sealed = false;
        self.sealed_at = None;
        self.moving = Move::No;
        self.promoting = false;
        self.promote_due = None;
        self.take_over = None;
        self.confirming = false;
        self.hand = Hand::No;
    }

    /// Something here crashed: again at once, and after a growing wait when it goes on crashing.
    pub(super) fn back_off(&mut self) {
        let max = self.set.restart_backoff * 128;
        if self.now.saturating_sub(self.last_crash) > max {
            self.crashes = 0;
        }
        let wait = self.set.restart_backoff * ((1 << self.crashes.min(6)) - 1);
        self.crashes = self.crashes.saturating_add(1);
        self.last_crash = self.now;
        self.timers.set(Timer::Restart, self.now + wait);
    }

    pub(super) fn on_replicator_up(&mut self, state: ReplicaState) {
        if self.rep == Rep::Stopping {
            return;
        }
        self.rep = Rep::Up;
        self.rep_fresh = state.mode == crate::order::Mode::Idle;
        self.replica = Some(state);
    }

    pub(super) fn on_replicator_lost(&mut self) {
        let asked = self.rep == Rep::Stopping;
        self.rep = Rep::Down;
        self.rep_fresh = false;
        self.replica = None;
        self.attach = Attach::No;
        self.stream = Stream::None;
        self.gate_open = false;
        if asked {
            return;
        }
        // The word may be of an older process: whatever runs must not go on unseen, acking for a
        // life that is over.
        self.out.push(Command::StopReplicator);
        self.rep = Rep::Stopping;
        self.notice(
            NoticeKind::ReplicatorCrashed,
            Severity::Warning,
            "the replicator's process ended unexpectedly; it is started again (its last words are in the log)",
        );
        let unpromoted = self.waiting || self.moving != Move::No;
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            Some((Role::Solo, _)) if unpromoted => {
                self.drop_copy();
                self.back_off();
            }
            Some((Role::Solo, _)) => {
                self.running = false;
                self.link = Link::Idle;
                self.back_off();
            }
            Some((Role::Protected, RoleStatus::Active)) if unpromoted => {
                self.drop_copy();
                self.recover();
            }
            Some((Role::Protected, status)) => {
                self.back_off();
                self.running = false;
                self.link = Link::Broken;
                self.hand = Hand::No;
                if status == RoleStatus::Active && self.life.is_some() {
                    self.ask_yield(false);
                }
            }
            Some((Role::Eligible | Role::Ineligible, _)) => {
                self.standby_lost();
                self.back_off();
            }
            None => {}
        }
    }

    pub(super) fn on_guest_started(&mut self, life: LifeId) {
        if self.qemu == Qemu::Starting && self.life == Some(life) {
            self.qemu = Qemu::Up;
        }
    }

    pub(super) fn on_guest_start_failed(&mut self, why: &str) {
        if self.qemu != Qemu::Starting {
            return;
        }
        self.qemu = Qemu::None;
        self.copy_failed(&format!("the guest could not be started: {why}"));
    }

    /// A step on the way to a running or waiting copy failed: from the beginning, later.
    pub(super) fn copy_failed(&mut self, text: &str) {
        self.notice(NoticeKind::StartFailed, Severity::Alarm, text);
        self.back_off();
        match self.rec.as_ref().map(|r| r.role) {
            Some(Role::Eligible | Role::Ineligible) => self.standby_lost(),
            Some(Role::Protected) => {
                self.drop_copy();
                self.recover();
            }
            _ => self.drop_copy(),
        }
    }

    pub(super) fn on_guest_lost(&mut self, intended: bool) {
        if matches!(self.qemu, Qemu::Killing | Qemu::None) {
            return;
        }
        // Killed all the same below: the word may be of an older process than the one that is here.
        // A guest that was told to stop, or said that it shuts down, was not lost.
        let intended = intended || self.intent() == Intent::Stopped;
        let streamed = self.link == Link::Protected && self.stream == Stream::Alive;
        let was_running = self.running;
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            Some((Role::Solo | Role::Protected, RoleStatus::Active | RoleStatus::Handing))
                if intended && was_running =>
            {
                self.drop_copy();
                self.stopped();
            }
            Some((Role::Solo, _)) => {
                self.drop_copy();
                self.notice(
                    NoticeKind::GuestCrashed,
                    Severity::Alarm,
                    "the guest's process ended unexpectedly; it is started again from its disk",
                );
                self.back_off();
            }
            Some((Role::Protected, status)) => {
                self.drop_copy();
                self.notice(
                    NoticeKind::GuestCrashed,
                    Severity::Alarm,
                    "the guest's process ended unexpectedly",
                );
                let standby_there = streamed && self.peer == Peer::Alive;
                if status == RoleStatus::Active && standby_there {
                    self.yield_primary();
                } else {
                    self.recover();
                }
            }
            Some((Role::Eligible | Role::Ineligible, _)) => {
                self.standby_lost();
                self.back_off();
            }
            None => {
                self.qemu = Qemu::None;
                self.end_life();
            }
        }
    }

    /// The guest was ended on purpose: no failover. A standby is asked to give its claim up.
    pub(super) fn stopped(&mut self) {
        if self.intent() == Intent::Run {
            self.change(|r| r.intent = Intent::Stopped);
        }
        self.notice(
            NoticeKind::Stopped,
            Severity::Info,
            "the guest was stopped on purpose; `havm start` runs it again",
        );
        if self.is(Role::Protected, RoleStatus::Active) {
            self.ask_yield(false);
        } else {
            self.say_hello();
        }
    }

    pub(super) fn on_guest_killed(&mut self) {
        self.qemu = Qemu::None;
        if self.rejoin.is_some() {
            self.finish_rejoin();
        }
    }
}
