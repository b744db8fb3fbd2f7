//! From standby to primary.

use super::{Machine, Obeyed, Role, text};
use crate::input::Input;
use havm_core::ids::{EpochNo, Term};
use havm_core::order::{Mode, Order, PromoteAs, Report, StreamBase};
use havm_image::promote;
use std::time::Instant;

impl Machine {
    /// Goes on from the last epoch. Waits for the waiting QEMU where it is still being started.
    pub(super) fn promote(
        &mut self,
        term: Term,
        expect: Option<EpochNo>,
        then: PromoteAs,
    ) -> Obeyed {
        let started = Instant::now();
        let Role::Standby(c) = &mut self.role else {
            return Err("this replicator is not a standby".into());
        };
        if !c.ready {
            tracing::info!("the promotion waits for a QEMU");
            c.promote = Some(Order::Promote { term, expect, then });
            return Ok(());
        }
        match self.try_promote(term, expect, then) {
            Ok(n) => {
                let took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                tracing::info!(%term, epoch = %n, took_us, "promoted");
                self.report(Report::Promoted { term, n, took_us });
            }
            Err(why) => {
                tracing::error!(%term, why, "promotion failed");
                self.report(Report::PromoteFailed { term, why });
            }
        }
        Ok(())
    }

    fn try_promote(
        &mut self,
        term: Term,
        expect: Option<EpochNo>,
        then: PromoteAs,
    ) -> Result<EpochNo, String> {
        let Role::Standby(mut c) = std::mem::replace(&mut self.role, Role::Idle) else {
            return Err("not a standby".into());
        };
        self.standing.clear();
        let held = c.standby.finish();
        let n = held.last.ok_or("the copy is not eligible")?;
        if held.spoilt {
            return Err("the copy is spoilt".into());
        }
        if held.guest_shut_down {
            return Err("the guest had shut itself down: start it anew".into());
        }
        if expect.is_some_and(|e| e != n) {
            return Err(format!(
                "epoch {n} is the last one here, {expect:?} was expected"
            ));
        }
        let image = held.image.ok_or("there is no image")?;
        let mut waiting = c.waiting.take().ok_or("no QEMU waits")?;
        self.env.disks.go_solo().map_err(text)?;
        let machine = self.env.spec.machine.clone();
        let t =
            promote::load(&mut waiting.qmp, &machine, &image, &held.device_state).map_err(text)?;
        tracing::info!(?t, "loaded");
        drop(image);
        self.start_guest(c.life, waiting.qmp, waiting.capture, true, None)?;
        match then {
            PromoteAs::Solo => {
                self.env.nics.discard();
                self.env.nics.pass(false);
                if let Role::Primary(p) = &mut self.role {
                    p.mode = Mode::Solo;
                }
            }
            PromoteAs::Protected {
                my_life,
                peer_life,
                ports,
            } => {
                self.env.nics.discard();
                self.start_stream(my_life, peer_life, &ports, StreamBase::Equal, true)?;
                if let Role::Primary(p) = &self.role
                    && let Some(s) = &p.stream
                {
                    self.env.nics.hold(s.id.stream, s.id.term, EpochNo(1));
                }
            }
        }
        self.run_guest()?;
        self.env.nics.announce();
        self.flush_later(term);
        Ok(n)
    }

    /// Makes the disk durable behind the running guest, and says so.
    fn flush_later(&mut self, term: Term) {
        self.flushing = true;
        self.synced_waits = false;
        let disks = self.env.disks.clone();
        let inputs = self.inputs.clone();
        let flush = move || {
            let done = disks.iter().try_for_each(|d| d.flush_after_promotion());
            match done {
                Ok(()) => {
                    let _ = inputs.send(Input::Flushed(term));
                }
                Err(e) => tracing::error!(error = %e, "flush after the promotion"),
            }
        };
        if let Err(e) = std::thread::Builder::new()
            .name("flush".into())
            .spawn(flush)
        {
            tracing::error!(error = %e, "no thread to flush the disk");
        }
    }
}
