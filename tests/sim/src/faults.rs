//! The faults of a history.

use crate::world::{Ev, MS, Register, World};
use havm_core::event::{Event, Operator};
use havm_core::ids::Incarnation;
use havm_core::order::{GuestEnd, Report};
use havm_core::status::Safety;

/// One kind of fault, or of an operator's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A host loses power and comes back.
    PowerOff,
    /// A host stands still for a while.
    Freeze,
    /// havmd dies and is started again.
    Daemon,
    /// A replicator dies.
    Replicator,
    /// A QEMU dies.
    Guest,
    /// Both links between the nodes are cut, in one direction or both.
    BothLinks,
    /// One link is cut.
    OneLink,
    /// A node, or both, cannot reach the witness.
    Witness,
    /// The witness is lost and set up anew: another incarnation, an empty register.
    WitnessAnew,
    /// The guest shuts itself down, or is destroyed on purpose; later it is started again.
    Stop,
    /// An operator moves the guest.
    Switchover,
    /// The record cannot be written.
    Persist,
    /// A daemon or host dies between two commands.
    MidCommand,
}

const DRAWN: [(Fault, u64); 11] = [
    (Fault::PowerOff, 18),
    (Fault::Freeze, 8),
    (Fault::Daemon, 12),
    (Fault::Replicator, 12),
    (Fault::Guest, 10),
    (Fault::BothLinks, 14),
    (Fault::OneLink, 6),
    (Fault::Witness, 14),
    (Fault::WitnessAnew, 3),
    (Fault::Stop, 4),
    (Fault::Switchover, 14),
];

/// What ends a fault.
#[derive(Debug, Clone, Copy)]
pub enum Healing {
    /// Packets from this node pass again.
    Links(usize),
    /// This node reaches the witness.
    Witness(usize),
    /// An operator starts the guest.
    Start,
}

impl World {
    pub(crate) fn allowed(&self, f: Fault) -> bool {
        self.setup.only.is_empty() || self.setup.only.contains(&f)
    }

    pub(crate) fn fault(&mut self) {
        if self.now >= self.setup.faults_us {
            return;
        }
        self.faulty = true;
        let drawn: Vec<_> = DRAWN
            .iter()
            .filter(|(f, _)| self.allowed(*f))
            .copied()
            .collect();
        let total: u64 = drawn.iter().map(|(_, w)| w).sum();
        if total > 0 {
            let mut pick = self.rng.range(0, total);
            for (f, weight) in drawn {
                if pick < weight {
                    self.strike(f);
                    break;
                }
                pick -= weight;
            }
        }
        // Bursts and calm stretches: faults in the middle of healing, and protection in between.
        let next = if self.rng.chance(1, 3) {
            self.rng.range(1, 200)
        } else {
            self.rng.range(200, 3_500)
        };
        self.push(next * MS, Ev::Fault);
    }

    fn strike(&mut self, f: Fault) {
        let node = self.rng.range(0, 2) as usize;
        let long = self.rng.range(50, 4_000) * MS;
        self.log(|| format!("==== {f:?} (node {node})"));
        match f {
            Fault::PowerOff => {
                self.power_off(node);
                self.push(long, Ev::Boot { node });
            }
            Fault::Freeze => {
                if self.nodes[node].up {
                    self.nodes[node].frozen_until_us = self.now + long;
                }
            }
            Fault::Daemon => self.kill_daemon(node),
            Fault::Replicator => {
                if let Some(rid) = self.nodes[node].replica.as_ref().map(|r| r.rid) {
                    self.end_replica(node, rid);
                }
            }
            Fault::Guest => {
                if let Some(life) = self.nodes[node].guest.as_ref().map(|g| g.life) {
                    self.guest_ends(node, life, false);
                }
            }
            Fault::BothLinks => {
                self.links[node] = [false; 2];
                self.push(
                    long,
                    Ev::Heal {
                        what: Healing::Links(node),
                    },
                );
                if self.rng.chance(4, 5) {
                    self.links[1 - node] = [false; 2];
                    self.push(
                        long,
                        Ev::Heal {
                            what: Healing::Links(1 - node),
                        },
                    );
                }
            }
            Fault::OneLink => {
                let link = self.rng.range(0, 2) as usize;
                self.links[0][link] = false;
                self.links[1][link] = false;
                self.push(
                    long,
                    Ev::Heal {
                        what: Healing::Links(0),
                    },
                );
                self.push(
                    long,
                    Ev::Heal {
                        what: Healing::Links(1),
                    },
                );
            }
            Fault::Witness => {
                self.nodes[node].sees_witness = false;
                self.push(
                    long,
                    Ev::Heal {
                        what: Healing::Witness(node),
                    },
                );
                if self.rng.chance(1, 2) {
                    self.nodes[1 - node].sees_witness = false;
                    self.push(
                        long,
                        Ev::Heal {
                            what: Healing::Witness(1 - node),
                        },
                    );
                }
            }
            Fault::WitnessAnew => {
                self.incarnation = Incarnation(self.rng.id());
                self.register = Register::default();
            }
            Fault::Stop => self.stop_guest(node),
            Fault::Switchover => {
                for n in 0..2 {
                    self.tell(n, Event::Operator(Operator::Switchover));
                }
            }
            Fault::Persist | Fault::MidCommand => {}
        }
    }

    /// From inside, by `virsh destroy`, or by `havm stop`.
    fn stop_guest(&mut self, node: usize) {
        let later = self.rng.range(500, 4_000) * MS;
        self.push(
            later,
            Ev::Heal {
                what: Healing::Start,
            },
        );
        let Some(g) = self.nodes[node].guest.as_mut().filter(|g| g.running) else {
            return;
        };
        let life = g.life;
        match self.rng.range(0, 3) {
            0 => {
                let g = self.nodes[node].guest.as_mut();
                if let Some(g) = g {
                    g.down = true;
                    g.running = false;
                }
                if self.nodes[node].replica.is_some() {
                    self.report(
                        node,
                        Report::GuestEnded {
                            how: GuestEnd::Shutdown,
                        },
                    );
                }
                self.push(
                    90 * MS,
                    Ev::GuestEnds {
                        node,
                        life,
                        intended: true,
                    },
                );
            }
            1 => self.guest_ends(node, life, true),
            _ => self.tell(node, Event::Operator(Operator::Stop)),
        }
    }

    pub(crate) fn heal(&mut self, what: Healing) {
        match what {
            Healing::Links(from) => self.links[from] = [true; 2],
            Healing::Witness(node) => self.nodes[node].sees_witness = true,
            Healing::Start => {
                for n in 0..2 {
                    let status = self.nodes[n].daemon.as_ref().map(|d| d.engine.status());
                    // Only what was stopped: a suspect disk waits for the end of the faults.
                    if status.is_some_and(|s| s.safety == Safety::Stopped) {
                        self.tell(n, Event::Operator(Operator::Start));
                    }
                }
            }
        }
    }
}
