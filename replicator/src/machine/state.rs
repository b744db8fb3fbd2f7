//! What the process says of itself.

use super::{Machine, Role};
use havm_core::ids::EpochNo;
use havm_core::order::{CONTROL_VERSION, Counters, Mode, ReplicaState, Report};
use havm_links::link::LinkCounters;
use havm_wire::back::Back;
use std::sync::PoisonError;

impl Machine {
    pub(super) fn state(&self) -> ReplicaState {
        let mut s = ReplicaState {
            version: CONTROL_VERSION,
            mode: Mode::Idle,
            term: self.term,
            life: None,
            stream: None,
            acked: EpochNo(0),
            closed: EpochNo(0),
            running: false,
            stream_alive: false,
            ports: Vec::new(),
            ram_bytes: 0,
            vcpus: 0,
            disk_bytes: self.env.disks.total_bytes(),
            sync: None,
            counters: self.counters(),
        };
        match &self.role {
            Role::Idle => {}
            Role::Waiting(life, home) => {
                s.mode = Mode::Waiting;
                s.life = Some(*life);
                s.ram_bytes = home.1.total_bytes();
            }
            Role::Primary(p) => {
                s.mode = p.mode;
                s.life = Some(p.life);
                s.running = p.running;
                s.vcpus = p.vcpus;
                s.ram_bytes = p.blocks.iter().map(|b| b.len).sum();
                s.sync = p.sync;
                (s.acked, s.closed) = (p.last, p.last);
                if let Some(r) = &p.receiver {
                    s.ports = r.ports().to_vec();
                }
                if let Some(t) = &p.stream {
                    s.stream = Some(t.id.stream);
                    s.stream_alive = t.alive;
                    let l = t.ledger.lock().unwrap_or_else(PoisonError::into_inner);
                    (s.acked, s.closed) = (l.acked(), l.closed());
                }
            }
            Role::Standby(c) => {
                s.life = Some(c.life);
                s.ports = c.standby.ports().to_vec();
                s.stream_alive = c.alive;
                s.mode = match () {
                    () if c.standby.is_sealed() => Mode::Sealed,
                    () if c.standby.is_confirmed() => Mode::Eligible,
                    () => Mode::Receiving,
                };
                let seen = c.standby.seen();
                (s.stream, s.acked, s.closed) = (seen.stream, seen.committed, seen.complete);
            }
        }
        s
    }

    fn counters(&self) -> Counters {
        let mut c = self
            .stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .snapshot();
        self.env.nics.count(&mut c);
        self.env.disks.count(&mut c);
        match &self.role {
            Role::Primary(p) => {
                if let Some(s) = &p.stream {
                    count_links(&mut c, &s.acks.out().counters());
                }
            }
            Role::Standby(s) => {
                let seen = s.standby.seen();
                c.epochs = seen.committed.0;
                count_links(&mut c, &s.standby.link_counters());
            }
            Role::Idle | Role::Waiting(..) => {}
        }
        c
    }
}

fn count_links(c: &mut Counters, links: &[LinkCounters]) {
    c.links_up = links.iter().filter(|l| l.up).count() as u32;
    c.link_failures = links
        .iter()
        .map(|l| l.connects.saturating_sub(u64::from(l.up)))
        .sum();
}

/// The standby's answer as a report.
pub(super) fn verified(b: Back) -> Option<Report> {
    match b {
        Back::Verified {
            id,
            ram_different,
            ram_pages,
            disk_different,
            disk_blocks,
            error,
        } => Some(Report::Verified {
            id,
            ram_different,
            ram_pages,
            disk_different,
            disk_blocks,
            error,
        }),
        _ => None,
    }
}
