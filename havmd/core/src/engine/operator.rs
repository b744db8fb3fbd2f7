//! What an operator may ask for.

use super::*;
use crate::event::Operator;
use crate::permit::Permit;
use crate::record::Generation;

impl Engine {
    pub(super) fn on_operator(&mut self, op: Operator) {
        let done = match op {
            Operator::InitPrimary => self.init(Role::Solo),
            Operator::InitStandby => self.init(Role::Ineligible),
            Operator::Switchover => self.operator_move(false),
            Operator::Failback => self.operator_move(true),
            Operator::Start => self.operator_start(),
            Operator::Stop => self.operator_stop(),
            Operator::Unprotect => self.operator_unprotect(),
            Operator::ForcePromote => self.operator_force(),
            Operator::DiscardMine => self.operator_discard(),
            Operator::Verify { id } => self.operator_verify(id),
        };
        if let Err(why) = done {
            self.notice(NoticeKind::RequestRefused, Severity::Warning, why);
        }
    }

    fn init(&mut self, role: Role) -> Result<(), String> {
        if self.rec.is_some() {
            return Err("the guest is protected already".into());
        }
        if self.unusable.is_some() {
            return Err(
                "there is a record of this guest, but it cannot be used; see `havm status`".into(),
            );
        }
        let zero = crate::ids::GenId([0; 16]);
        let primary = role == Role::Solo;
        let current = if primary { self.ids.generation } else { zero };
        let new = Record {
            guest: self.id.guest.clone(),
            owner: self.id.me,
            term: Term(1),
            basis: Term(1),
            role,
            status: RoleStatus::Active,
            arbiter: Arbiter::None,
            lives: None,
            generation: Generation {
                current,
                parent: zero,
            },
            cold: primary,
            valid: primary,
            intent: Intent::Run,
        };
        self.persist(new);
        self.say_hello();
        Ok(())
    }

    fn operator_move(&mut self, home: bool) -> Result<(), String> {
        if home && self.id.at_home {
            return Err("the guest is at home already".into());
        }
        self.may_move()?;
        self.automatic_move = false;
        self.begin_move(if home {
            "the guest moves home, as asked"
        } else {
            "the guest moves to the peer, as asked"
        });
        Ok(())
    }

    fn operator_start(&mut self) -> Result<(), String> {
        if self.disk_suspect && self.is(Role::Solo, RoleStatus::Active) {
            self.disk_suspect = false;
            self.change(|r| r.intent = Intent::Run);
            self.notice(
                NoticeKind::Forced,
                Severity::Alarm,
                "forced: the guest starts from a disk that may lack acknowledged writes",
            );
            return Ok(());
        }
        match self.rec.as_ref().map(|r| r.role) {
            Some(Role::Solo | Role::Protected | Role::Eligible)
                if self.intent() == Intent::Stopped =>
            {
                self.crashes = 0;
                self.timers.stop(Timer::Restart);
                self.change(|r| r.intent = Intent::Run);
                if self.is(Role::Solo, RoleStatus::Active) {
                    self.say_hello();
                } else if self.is(Role::Protected, RoleStatus::Active) && self.life.is_none() {
                    self.recover();
                }
                Ok(())
            }
            Some(Role::Ineligible) => Err("the guest's primary is the peer: start it there".into()),
            Some(_) => Err("the guest is meant to run already".into()),
            None => Err("the guest is not protected here".into()),
        }
    }

    fn operator_stop(&mut self) -> Result<(), String> {
        let primary =
            self.is(Role::Solo, RoleStatus::Active) || self.is(Role::Protected, RoleStatus::Active);
        if !primary {
            return Err("the guest's primary is not this node: stop it at the peer".into());
        }
        if self.hand != Hand::No {
            return Err("a move is under way: try again when it is done".into());
        }
        self.change(|r| r.intent = Intent::Stopped);
        match self.qemu {
            Qemu::Up if self.running => self.out.push(Command::ShutdownGuest),
            _ => {
                self.drop_copy();
                self.stopped();
            }
        }
        Ok(())
    }

    fn operator_unprotect(&mut self) -> Result<(), String> {
        match self.rec.as_ref().map(|r| (r.role, r.status)) {
            Some((Role::Solo, RoleStatus::Active)) => {
                self.unprotecting = true;
                if self.link != Link::Idle {
                    let term = self.term();
                    self.order(Order::StopStream { term });
                    self.link = Link::Idle;
                }
                self.notice(
                    NoticeKind::Unprotected,
                    Severity::Info,
                    "the guest runs here without protection, as asked",
                );
                if self.intent() == Intent::Stopped && self.life.is_none() {
                    self.drop_copy();
                    self.out.push(Command::Forget);
                    self.rec = None;
                }
                Ok(())
            }
            Some((Role::Protected, RoleStatus::Active)) if self.hand == Hand::No => {
                self.unprotecting = true;
                self.ask_yield(false);
                Ok(())
            }
            Some((Role::Ineligible, _)) | Some((_, RoleStatus::Yielded)) => {
                self.rejoin = None;
                self.drop_copy();
                self.out.push(Command::Forget);
                self.rec = None;
                self.join = None;
                Ok(())
            }
            Some(_) => Err(
                "this node may still have to go on with the guest: ask at its primary first".into(),
            ),
            None => Err("the guest is not protected here".into()),
        }
    }

    /// Rule 16: the operator vouches that the peer does not run the guest.
    fn operator_force(&mut self) -> Result<(), String> {
        if self.peer == Peer::Alive {
            return Err("the peer's host is alive: nothing is forced while it is".into());
        }
        if self.is(Role::Solo, RoleStatus::Active) && self.conflict.is_none() {
            return Err("this node is the guest's primary already".into());
        }
        let rec = self
            .rec
            .clone()
            .ok_or("this node has no usable record of the guest, and so no data to go on with")?;
        let permit = Permit::forced(&rec, self.seen_term)
            .ok_or("the copy here is incomplete: going on with it would destroy data")?;
        self.conflict = None;
        self.rejoin = None;
        let before = rec.generation;
        self.take(permit);
        let after = self.rec.as_ref().map_or(before, |r| r.generation);
        self.change(|r| r.intent = Intent::Run);
        self.notice(
            NoticeKind::Forced,
            Severity::Alarm,
            format!(
                "forced: generation {} was made from {} ({:?} here before)",
                after.current, after.parent, rec.role
            ),
        );
        Ok(())
    }

    fn operator_discard(&mut self) -> Result<(), String> {
        if self.conflict.is_none() {
            return Err("there is no conflict about this guest".into());
        }
        self.conflict = None;
        // Not a claim any more: the next Hello of the peer's primary is obeyed whatever its data.
        self.change(|r| r.valid = false);
        self.drop_copy();
        self.say_hello();
        Ok(())
    }

    fn operator_verify(&mut self, id: u64) -> Result<(), String> {
        if self.link != Link::Protected {
            return Err(
                "both sides can be compared only while the guest is protected, at its primary"
                    .into(),
            );
        }
        self.order(Order::Verify { id });
        Ok(())
    }

    pub(super) fn on_verified(
        &mut self,
        id: u64,
        ram: (u64, u64),
        disk: (u64, u64),
        error: Option<String>,
    ) {
        let (severity, text) = match error {
            Some(why) => (
                Severity::Warning,
                format!("comparison {id} could not be done: {why}"),
            ),
            None if ram.0 + disk.0 == 0 => (
                Severity::Info,
                format!(
                    "comparison {id}: {} pages and {} blocks are equal",
                    ram.1, disk.1
                ),
            ),
            None => (
                Severity::Alarm,
                format!(
                    "comparison {id}: {} of {} pages and {} of {} blocks DIFFER; unprotect and protect the guest again, and report this",
                    ram.0, ram.1, disk.0, disk.1
                ),
            ),
        };
        self.notice(NoticeKind::Verified, severity, text);
    }
}
