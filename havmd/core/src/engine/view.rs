//! The engine's state in plain words.

use super::*;
use crate::failback::Outlook;
use crate::status::{GuestStatus, PeerView};

impl Engine {
    /// Everything that `havm status` shows of this guest.
    pub fn status(&self) -> GuestStatus {
        let rec = self.rec.as_ref();
        let (safety, why, what_to_do) = self.judge();
        let outlook = self
            .failback
            .outlook(&self.set.failback)
            .filter(|_| !self.id.at_home);
        let (failback_at, probation) = match outlook {
            Some(Outlook::At(at)) => (Some(at), false),
            Some(Outlook::Probation(at)) => (Some(at), true),
            _ => (None, false),
        };
        GuestStatus {
            guest: self.id.guest.clone(),
            at_home: self.id.at_home,
            safety,
            safety_since_ms: millis(self.safety.1),
            why,
            what_to_do: what_to_do.map(str::to_owned),
            runs_here: self.running && !self.frozen,
            term: self.term(),
            basis: self.basis(),
            role: rec.map(|r| r.role),
            role_status: rec.map(|r| r.status),
            arbiter: rec.map(|r| r.arbiter),
            generation: rec.map(|r| r.generation),
            intent: rec.map(|r| r.intent),
            life: self.life,
            peer: match self.peer {
                Peer::Alive => PeerView::Alive,
                Peer::Suspect => PeerView::Suspect,
                Peer::Lost => PeerView::Lost,
            },
            stream_alive: self.stream == Stream::Alive,
            witness: self.witness,
            moving: self.hand != Hand::No || self.take_over.is_some() || self.promoting,
            failback_at_ms: failback_at.map(millis),
            probation,
            replica: self.replica.clone(),
        }
    }

    pub(super) fn note_safety(&mut self) {
        let safety = self.judge().0;
        if safety != self.safety.0 {
            self.safety = (safety, self.now);
        }
    }

    /// How safe, why, and what to do.
    fn judge(&self) -> (Safety, String, Option<&'static str>) {
        let say = |s, why: &str, todo| (s, why.to_owned(), todo);
        if let Some(c) = &self.conflict {
            return (
                Safety::Conflict,
                c.clone(),
                Some("decide whose data is good, then run `havm discard` on the other node"),
            );
        }
        if self.fault.is_some() {
            return say(
                Safety::Gated,
                "the guest's record cannot be written: its gate is closed",
                Some("make room on, or mend, the state directory"),
            );
        }
        let Some(rec) = &self.rec else {
            return match &self.unusable {
                Some(why) => (
                    Safety::Down,
                    format!("the guest's record here cannot be used: {why}"),
                    Some("let the peer's primary take this node in, or see `havm force-promote`"),
                ),
                None => say(Safety::Absent, "nothing is known of this guest here", None),
            };
        };
        if self.rejoin.is_some() {
            return say(
                Safety::Changing,
                "the old copy here is being given up for the peer's",
                None,
            );
        }
        match (rec.role, rec.status) {
            (_, RoleStatus::Yielded) => say(
                Safety::Changing,
                "this side gave its claim up and waits for the peer to go on",
                None,
            ),
            (Role::Protected, RoleStatus::Handing) => say(
                Safety::Changing,
                "the guest is being handed over to the peer",
                None,
            ),
            (Role::Solo, _) => self.judge_solo(),
            (Role::Protected, _) => self.judge_protected(),
            (Role::Eligible, _) if self.warm() && self.unreachable => say(
                Safety::Gated,
                "the primary is silent and no arbiter answers: nobody is promoted",
                Some("mend a link or the witness"),
            ),
            (Role::Eligible, _) if self.warm() && self.moving != Move::No => {
                say(Safety::Safe, "the image moves into a waiting QEMU", None)
            }
            (Role::Eligible, _) if self.warm() => {
                say(Safety::Safe, "this node is a complete standby", None)
            }
            (Role::Eligible, _) => say(
                Safety::Changing,
                "the standby's image was lost; the primary is asked to make it anew",
                None,
            ),
            (Role::Ineligible, _) if rec.intent == Intent::Stopped => say(
                Safety::Stopped,
                "the guest is stopped; the peer is its primary",
                Some("`havm start` at the peer runs it"),
            ),
            (Role::Ineligible, _) if self.ports.is_some() => say(
                Safety::Syncing,
                "this standby is being brought up to date",
                None,
            ),
            (Role::Ineligible, _) => {
                say(Safety::Changing, "this standby waits for the primary", None)
            }
        }
    }

    fn judge_solo(&self) -> (Safety, String, Option<&'static str>) {
        let say = |s, why: &str, todo| (s, why.to_owned(), todo);
        if self.disk_suspect && self.life.is_none() {
            return say(
                Safety::Down,
                "this node failed between a failover and the flush of its disk, which may lack acknowledged writes",
                Some(
                    "`havm start` here goes on with this disk; `havm force-promote` at the peer with the peer's copy",
                ),
            );
        }
        if self.intent() == Intent::Stopped {
            return say(
                Safety::Stopped,
                "the guest was stopped on purpose",
                Some("`havm start` runs it again"),
            );
        }
        if !self.running {
            let why = if self.promoting || self.promote_due.is_some() {
                "the guest is being promoted here"
            } else {
                "the guest is being started here"
            };
            let safety = if self.crashes > 2 {
                Safety::Down
            } else {
                Safety::Changing
            };
            return say(
                safety,
                why,
                (self.crashes > 2)
                    .then_some("it failed several times: see `havm events` and the log"),
            );
        }
        match self.link {
            Link::Syncing(_) => say(
                Safety::Syncing,
                "the guest runs here while a standby is brought up to date",
                None,
            ),
            Link::Synced(_) => say(
                Safety::Syncing,
                "the standby is up to date, the witness does not answer: protection begins when it does",
                Some("mend the witness"),
            ),
            _ if self.unprotecting => say(Safety::Exposed, "protection was ended as asked", None),
            _ if self.peer == Peer::Lost => say(
                Safety::Exposed,
                "the guest runs here alone: the peer's host is silent on every link",
                Some("bring the peer back; it joins by itself"),
            ),
            _ => say(
                Safety::Exposed,
                "the guest runs here alone: no standby has joined yet",
                None,
            ),
        }
    }

    fn judge_protected(&self) -> (Safety, String, Option<&'static str>) {
        let say = |s, why: &str, todo| (s, why.to_owned(), todo);
        if self.intent() == Intent::Stopped {
            return say(
                Safety::Stopped,
                "the guest was stopped on purpose",
                Some("`havm start` runs it again"),
            );
        }
        if self.frozen {
            return say(
                Safety::Down,
                "the arbiter gave the next term to the peer: the guest stands still here until the peer is heard",
                Some("bring the peer back; if it is gone for good, see `havm force-promote`"),
            );
        }
        if self.life.is_none() {
            return say(
                Safety::Changing,
                "the guest was lost here; the peer or the arbiter decides who goes on",
                None,
            );
        }
        if self.unreachable || (self.open && self.stream != Stream::Alive) {
            return say(
                Safety::Gated,
                "the peer is silent and no arbiter answers: the guest's output is held",
                Some(
                    "mend a link or the witness; if the peer is gone for good, see `havm force-promote`",
                ),
            );
        }
        match self.link {
            Link::Protected if self.stream == Stream::Alive && self.ask.is_none() => say(
                Safety::Safe,
                "the guest runs here; its standby is complete",
                None,
            ),
            Link::Armed(_) => say(
                Safety::Changing,
                "the first protected epoch is on its way",
                None,
            ),
            _ => say(
                Safety::Changing,
                "the standby has a fault: it is asked to give way, then it is made anew",
                None,
            ),
        }
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
