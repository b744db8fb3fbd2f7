//! A primary and its standby: stream, protection, and the replicator's reports (rules 2, 3).

use super::*;
use crate::message::{Body, Envelope};
use crate::order::{GuestEnd, Report, StreamBase};
use crate::settings::ArbiterKind;

/// How long after arming the first eligible ack may take, in units of `stream_grace`.
const ARMED_PATIENCE: u32 = 12;

impl Engine {
    pub(super) fn on_report(&mut self, r: Report) {
        if self.rep != Rep::Up || self.rejoin.is_some() {
            return; // the last words of a copy that is given up
        }
        // A primary's report of another term belongs to a stream that is over.
        let now_term = |t: Term| self.rec.as_ref().is_some_and(|r| r.basis == t);
        let eligible = self.is(Role::Eligible, RoleStatus::Active);
        match r {
            Report::State(state) => self.on_state(state),
            Report::Attached { life } => self.on_attached(life),
            Report::AttachFailed { why } if self.attach == Attach::Asked => {
                self.copy_failed(&format!(
                    "the replicator could not attach to the guest: {why}"
                ));
            }
            Report::Listening { term, ports } if now_term(term) => {
                self.ports = Some(ports);
                self.send_join();
            }
            Report::Synced { term } if now_term(term) => {
                if let (Link::Syncing(peer), true) =
                    (self.link, self.is(Role::Solo, RoleStatus::Active))
                {
                    self.link = Link::Synced(peer);
                    self.stream = Stream::Alive;
                }
            }
            Report::EligibleImage { term, .. } => self.on_eligible_image(term),
            Report::Protected { term, .. } if now_term(term) => self.on_protected(),
            Report::StreamSilent { term } if now_term(term) => self.stream = Stream::Silent,
            Report::StreamAlive { term } if now_term(term) => self.stream = Stream::Alive,
            Report::StreamBroken { term, why } if now_term(term) => self.on_stream_broken(&why),
            Report::Sealed { n } => self.on_sealed(n),
            Report::Promoted { term, n, took_us } => self.on_promoted(term, n, took_us),
            Report::PromoteFailed { term, why } if now_term(term) => {
                self.copy_failed(&format!("the promotion failed: {why}"));
            }
            Report::DiskFlushed { term } if now_term(term) => self.on_disk_flushed(),
            Report::HandedOver { term, n, ports } => self.on_handed_over(term, n, ports),
            Report::HandOverFailed { term, why } if now_term(term) => {
                self.on_hand_over_failed(&why)
            }
            Report::ImageHeld => self.on_image_held(),
            Report::Ready if self.moving == Move::Swapping => self.moving = Move::No,
            Report::GuestEnded {
                how: GuestEnd::Shutdown,
            } => self.on_guest_shutdown(),
            Report::PeerGuestShutdown { term } if now_term(term) && eligible => {
                self.change(|r| r.intent = Intent::Stopped);
            }
            Report::OutputFull => self.notice_once(
                NoticeKind::OutputFull,
                Severity::Alarm,
                "the guest stands still: its output waits for the standby, and the queue is full",
            ),
            Report::Verified {
                id,
                ram_different,
                ram_pages,
                disk_different,
                disk_blocks,
                error,
            } => {
                self.on_verified(
                    id,
                    (ram_different, ram_pages),
                    (disk_different, disk_blocks),
                    error,
                );
            }
            Report::Refused { order, why } => self.notice(
                NoticeKind::Warning,
                Severity::Warning,
                format!("the replicator did not obey `{order}`: {why}"),
            ),
            Report::Warning { text } => self.notice(NoticeKind::Warning, Severity::Warning, text),
            _ => {}
        }
    }

    fn on_state(&mut self, state: ReplicaState) {
        if state.term == self.basis() && self.stream != Stream::None {
            self.stream = if state.stream_alive {
                Stream::Alive
            } else {
                Stream::Silent
            };
        }
        self.replica = Some(state);
    }

    fn on_attached(&mut self, life: LifeId) {
        if self.attach != Attach::Asked || self.life != Some(life) {
            return;
        }
        self.attach = Attach::Done;
        if self.frozen {
            let term = self.term();
            self.order(Order::Freeze { term });
        }
    }

    fn on_guest_shutdown(&mut self) {
        let primary =
            self.is(Role::Solo, RoleStatus::Active) || self.is(Role::Protected, RoleStatus::Active);
        if primary && self.running && self.intent() == Intent::Run {
            // Its process ends next; that end is meant.
            self.change(|r| r.intent = Intent::Stopped);
        }
    }

    /// A standby listens: bring it up to date.
    pub(super) fn on_join(&mut self, env: &Envelope, ports: Vec<std::net::SocketAddr>) {
        let (Some(my_life), Some(peer_life)) = (self.life, env.from_life) else {
            return;
        };
        if env.term != self.basis() || ports.is_empty() {
            return;
        }
        if self.is(Role::Protected, RoleStatus::Active) {
            if Some(peer_life) != self.peer_life() && self.stream != Stream::Alive {
                self.ask_yield(false);
            }
            return;
        }
        let ready = self.is(Role::Solo, RoleStatus::Active) && self.gate_open && self.running;
        if !ready || self.unprotecting {
            return;
        }
        let term = self.basis();
        match self.link {
            Link::Syncing(l) | Link::Synced(l) if l == peer_life => return,
            Link::Idle => {}
            _ => self.order(Order::StopStream { term }),
        }
        self.link = Link::Syncing(peer_life);
        self.order(Order::StartStream {
            term,
            my_life,
            peer_life,
            ports,
            base: StreamBase::Unknown,
        });
        self.notice(
            NoticeKind::SyncStarted,
            Severity::Info,
            "a standby joined; it is brought up to date",
        );
    }

    /// The arbiter that a term would get now; none where protection has to wait for it.
    fn arbiter_now(&self) -> Option<Arbiter> {
        match self.set.arbiter {
            ArbiterKind::Witness => self.witness.map(Arbiter::Witness),
            ArbiterKind::Fence => Some(Arbiter::Fence),
            ArbiterKind::None => Some(Arbiter::None),
        }
    }

    /// Rule 3: gate closed, `protected` durable, only then the eligible epoch.
    pub(super) fn protect(&mut self) {
        let (Link::Synced(peer), Some(mine)) = (self.link, self.life) else {
            return;
        };
        if self.unprotecting
            || !self.is(Role::Solo, RoleStatus::Active)
            || self.intent() == Intent::Stopped
        {
            return;
        }
        let Some(arbiter) = self.arbiter_now() else {
            self.notice_once(NoticeKind::WitnessFault, Severity::Warning, "the standby is up to date, but the witness does not answer: protection begins when it does");
            return;
        };
        let term = self.basis();
        self.gate_open = false;
        self.order(Order::CloseGate { term });
        self.change_unless(Mutation::NoPersistBeforeProtect, |r| {
            r.role = Role::Protected;
            r.arbiter = arbiter;
            r.lives = Some(crate::ids::Lives { mine, peer });
        });
        self.link = Link::Armed(self.now);
        self.send(Some(peer), Body::Protect { arbiter });
        self.order(Order::Arm { term });
        self.resend_soon();
    }

    fn on_protected(&mut self) {
        if self.is(Role::Protected, RoleStatus::Active) && matches!(self.link, Link::Armed(_)) {
            self.link = Link::Protected;
            self.stream = Stream::Alive;
            self.confirming = false;
            self.notice(
                NoticeKind::Protected,
                Severity::Info,
                "the guest is protected: either host may fail",
            );
        }
    }

    fn on_stream_broken(&mut self, why: &str) {
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            Some((Role::Solo, _)) if self.link != Link::Idle => {
                self.link = Link::Broken;
                self.say_hello();
            }
            Some((Role::Protected, RoleStatus::Active)) => {
                self.link = Link::Broken;
                self.stream = Stream::Silent;
                self.ask_yield(false);
            }
            Some((Role::Ineligible, RoleStatus::Active)) => {
                // What was received is of no use to another stream.
                self.standby_lost();
            }
            _ => return,
        }
        self.notice(
            NoticeKind::StreamBroken,
            Severity::Warning,
            format!("the stream to the peer broke: {why}"),
        );
    }

    pub(super) fn armed_too_long(&self) -> bool {
        matches!(self.link, Link::Armed(since) if self.now >= since + self.set.stream_grace * ARMED_PATIENCE)
    }

    pub(super) fn armed_deadline(&self) -> Option<Duration> {
        match self.link {
            Link::Armed(since) => Some(since + self.set.stream_grace * ARMED_PATIENCE),
            _ => None,
        }
    }

    fn on_disk_flushed(&mut self) {
        if matches!(
            self.rec.as_ref().map(|r| r.role),
            Some(Role::Solo | Role::Protected)
        ) {
            self.change(|r| r.cold = true);
        }
    }
}
