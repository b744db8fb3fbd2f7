//! How the modelled replicator obeys orders and handles epochs.

use crate::replica::{Gate, Packet, Receiver, Replica, Sender};
use crate::world::{EPOCH_US, Ev, Lie, MS, World, primary_mode};
use havm_core::ids::{EpochNo, LifeId, StreamId, Term};
use havm_core::order::{Mode, Order, PromoteAs, Report};

/// Silence that is reported.
const SILENT_US: u64 = 140 * MS;
/// How long a handover's last epoch may take.
const HAND_US: u64 = 400 * MS;

fn term_of(order: &Order) -> Option<Term> {
    match order {
        Order::Run { term }
        | Order::OpenGate { term }
        | Order::CloseGate { term }
        | Order::StartStream { term, .. }
        | Order::StopStream { term }
        | Order::Arm { term }
        | Order::Receive { term, .. }
        | Order::ConfirmEligible { term }
        | Order::Seal { term }
        | Order::Promote { term, .. }
        | Order::HandOver { term }
        | Order::Resume { term }
        | Order::BecomeStandby { term, .. }
        | Order::Freeze { term } => Some(*term),
        _ => None,
    }
}

impl World {
    fn replica(&mut self, node: usize, rid: u64) -> Option<&mut Replica> {
        self.nodes[node].replica.as_mut().filter(|r| r.rid == rid)
    }

    fn sender(&mut self, term: Term, peer_life: LifeId, armed: bool) -> Sender {
        Sender {
            stream: StreamId(self.rng.id()),
            order: self.number(),
            term,
            peer_life,
            points: vec![],
            eligible_from: armed.then_some(1),
            acked: 0,
            sync_left: self.rng.range(2, 15) as u32,
            synced: armed,
            protected: false,
            broken: false,
        }
    }

    pub(crate) fn obey(&mut self, node: usize, rid: u64, order: Order) {
        let now = self.now;
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        if let Some(t) = term_of(&order) {
            if t < r.term {
                let why = format!("term {t} after {}", r.term);
                return self.report(
                    node,
                    Report::Refused {
                        order: format!("{order:?}"),
                        why,
                    },
                );
            }
            r.term = t;
        }
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        match order {
            Order::Status | Order::Verify { .. } | Order::Quit => {}
            Order::AttachPrimary { life } => self.attach(node, rid, life, false),
            Order::AttachStandby { life } => self.attach(node, rid, life, true),
            Order::Run { .. } => {
                if let Some(g) = self.nodes[node]
                    .guest
                    .as_mut()
                    .filter(|g| !g.waiting && !g.down)
                {
                    g.running = true;
                }
            }
            Order::OpenGate { .. } => {
                r.gate = Gate::Open;
                r.mode = Mode::Solo;
                r.send = None;
            }
            Order::CloseGate { .. } => r.gate = Gate::Closed,
            Order::StartStream {
                term, peer_life, ..
            } => {
                let s = self.sender(term, peer_life, false);
                if let Some(r) = self.replica(node, rid) {
                    r.send = Some(s);
                    r.mode = Mode::Syncing;
                    r.heard_us = now;
                    r.silent = false;
                }
            }
            Order::StopStream { .. } => r.send = None,
            Order::Arm { .. } => {
                r.gate = Gate::Acks;
                r.mode = Mode::Protected;
                if let Some(s) = &mut r.send {
                    let next = s.points.len() as u64 + 1;
                    s.eligible_from.get_or_insert(next);
                }
            }
            Order::Receive { term, my_life, .. } => {
                r.recv = Some(receiver(term, my_life, None));
                r.send = None;
                r.mode = Mode::Receiving;
                r.heard_us = now;
                r.silent = false;
                let ports = r.ports();
                self.nodes[node].disk.now = None;
                self.nodes[node].unflushed = false;
                self.report(node, Report::Listening { term, ports });
            }
            Order::ConfirmEligible { .. } => {
                if let Some(v) = r.recv.as_mut().filter(|v| v.complete) {
                    v.confirmed = true;
                    r.mode = Mode::Eligible;
                }
            }
            Order::Seal { .. } => {
                let mut n = None;
                if let Some(v) = r.recv.as_mut() {
                    v.sealed = true;
                    n = (v.complete && v.confirmed).then_some(EpochNo(v.n));
                    r.mode = Mode::Sealed;
                }
                self.report(node, Report::Sealed { n });
            }
            Order::Promote { term, expect, then } => self.promote(node, rid, term, expect, then),
            Order::HandOver { term } => {
                let fit = r.mode == Mode::Protected && r.send.is_some();
                if !fit {
                    return self.report(
                        node,
                        Report::HandOverFailed {
                            term,
                            why: "not protected".into(),
                        },
                    );
                }
                let last = r.send.as_ref().map_or(0, |s| s.points.len() as u64) + 1;
                r.handing = Some((last, now + HAND_US));
                self.close_epoch(node, rid);
                if let Some(g) = self.nodes[node].guest.as_mut() {
                    g.running = false;
                }
                self.send_data(node, rid);
            }
            Order::Resume { .. } => {
                r.send = None;
                r.handing = None;
                r.gate = Gate::Open;
                r.mode = Mode::Solo;
                if let Some(g) = self.nodes[node].guest.as_mut().filter(|g| !g.waiting) {
                    g.running = !g.down;
                }
            }
            Order::BecomeStandby { term, my_life, .. } => {
                if r.mode != Mode::Handed {
                    return self.report(
                        node,
                        Report::Refused {
                            order: "become-standby".into(),
                            why: "not handed".into(),
                        },
                    );
                }
                let point = self.nodes[node].guest.as_ref().and_then(|g| g.point);
                let Some(r) = self.replica(node, rid) else {
                    return;
                };
                r.recv = Some(Receiver {
                    complete: true,
                    confirmed: true,
                    ..receiver(term, my_life, point)
                });
                r.send = None;
                r.gate = Gate::Closed;
                r.mode = Mode::Eligible;
                r.heard_us = now;
                r.silent = false;
                self.report(node, Report::ImageHeld);
            }
            Order::Freeze { .. } => {
                r.gate = Gate::Closed;
                r.send = None;
                r.mode = Mode::Frozen;
                if let Some(g) = self.nodes[node].guest.as_mut() {
                    g.running = false;
                }
            }
            Order::Detach => {
                r.attached = false;
                self.report(node, Report::Detached);
            }
        }
    }

    fn attach(&mut self, node: usize, rid: u64, life: LifeId, waiting: bool) {
        let fits = self.nodes[node]
            .guest
            .as_ref()
            .is_some_and(|g| g.life == life && g.waiting == waiting);
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        if !fits {
            return self.report(
                node,
                Report::AttachFailed {
                    why: "no such process".into(),
                },
            );
        }
        r.life = Some(life);
        r.attached = true;
        let holds = r.recv.as_ref().is_some_and(|v| v.complete);
        if !holds {
            r.mode = if waiting {
                Mode::Waiting
            } else {
                Mode::Attached
            };
        }
        self.report(node, Report::Attached { life });
        if waiting && holds {
            self.report(node, Report::Ready);
        }
    }

    fn promote(
        &mut self,
        node: usize,
        rid: u64,
        term: Term,
        expect: Option<EpochNo>,
        then: PromoteAs,
    ) {
        let unlucky = self.faulty && self.rng.chance(1, 50);
        let waits = self.nodes[node].guest.as_ref().is_some_and(|g| g.waiting);
        let now = self.now;
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        let image = r
            .recv
            .as_ref()
            .filter(|v| v.complete && v.confirmed)
            .map(|v| (v.n, v.point));
        let fits = waits && r.attached && !unlucky;
        let (Some((n, Some(point))), true) = (image, fits) else {
            return self.report(
                node,
                Report::PromoteFailed {
                    term,
                    why: "no image".into(),
                },
            );
        };
        if expect.is_some_and(|e| e.0 != n) {
            return self.report(
                node,
                Report::PromoteFailed {
                    term,
                    why: "another epoch".into(),
                },
            );
        }
        let sender = match &then {
            PromoteAs::Solo => None,
            PromoteAs::Protected { peer_life, .. } => Some(self.sender(term, *peer_life, true)),
        };
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        r.recv = None;
        r.mode = if sender.is_some() {
            Mode::Protected
        } else {
            Mode::Solo
        };
        r.gate = if sender.is_some() {
            Gate::Acks
        } else {
            Gate::Open
        };
        r.send = sender;
        r.heard_us = now;
        r.silent = false;
        let next = self.check.grow(Some(point));
        let n_ = &mut self.nodes[node];
        n_.disk.now = Some(next);
        n_.unflushed = true;
        if let Some(g) = n_.guest.as_mut() {
            g.waiting = false;
            g.running = true;
            g.point = Some(next);
        }
        let took = self.rng.range(2_000, 20_000);
        self.push(took + 20 * MS, Ev::Flushed { node, rid, term });
        self.report(
            node,
            Report::Promoted {
                term,
                n: EpochNo(n),
                took_us: took,
            },
        );
    }

    pub(crate) fn flushed(&mut self, node: usize, rid: u64, term: Term) {
        if self.replica(node, rid).is_some() {
            let n = &mut self.nodes[node];
            n.unflushed = false;
            n.disk.flushed = n.disk.now;
            self.report(node, Report::DiskFlushed { term });
        }
    }

    /// The running guest's next state belongs to a new epoch.
    fn close_epoch(&mut self, node: usize, rid: u64) {
        let held = self
            .replica(node, rid)
            .is_some_and(|r| r.attached && primary_mode(r.mode));
        let running = self.nodes[node].guest.as_ref().is_some_and(|g| g.running);
        if !held {
            return;
        }
        if running {
            let old = self.nodes[node].guest.as_ref().and_then(|g| g.point);
            let point = self.check.grow(old);
            let n = &mut self.nodes[node];
            if let Some(g) = n.guest.as_mut() {
                g.point = Some(point);
            }
            n.disk.now = Some(point);
            if !n.unflushed {
                n.disk.flushed = Some(point);
            }
        }
        let point = self.nodes[node].guest.as_ref().and_then(|g| g.point);
        let now = self.now;
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        let gate = r.gate;
        if let (Some(s), Some(p)) = (r.send.as_mut(), point) {
            s.points.push(p);
        }
        let leaks = self.setup.lie == Some(Lie::UnackedOutput) && gate == Gate::Acks;
        if let (true, Some(p), true) = (gate == Gate::Open || leaks, point, running) {
            self.check.release(node, p, now);
        }
    }

    fn send_data(&mut self, node: usize, rid: u64) {
        let shutdown = self.nodes[node].guest.as_ref().is_some_and(|g| g.down);
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        let Some(s) = r.send.as_ref().filter(|s| !s.broken) else {
            return;
        };
        let n = s.points.len() as u64;
        let Some(point) = s.points.last().copied() else {
            return;
        };
        let packet = Packet::Data {
            stream: s.stream,
            order: s.order,
            term: s.term,
            to_life: s.peer_life,
            n,
            point,
            mark: s.eligible_from.is_some_and(|e| n >= e),
            shutdown,
        };
        self.send_packet(node, packet);
    }

    pub(crate) fn epoch(&mut self, node: usize, rid: u64) {
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        if r.handing.is_none() && r.mode != Mode::Handed {
            self.close_epoch(node, rid);
        }
        self.send_data(node, rid);
        self.watch_stream(node, rid);
        self.push(EPOCH_US, Ev::Epoch { node, rid });
    }

    fn watch_stream(&mut self, node: usize, rid: u64) {
        let now = self.now;
        let Some(r) = self.replica(node, rid) else {
            return;
        };
        let term = match (&r.send, &r.recv) {
            (Some(s), _) => s.term,
            (_, Some(v)) => v.term,
            _ => return,
        };
        let silent = now - r.heard_us > SILENT_US;
        let changed = silent != r.silent;
        r.silent = silent;
        let failed = r
            .handing
            .is_some_and(|(_, until)| until < now && r.mode != Mode::Handed);
        if failed {
            r.handing = None;
            if let Some(g) = self.nodes[node].guest.as_mut() {
                g.running = !g.down;
            }
            self.report(
                node,
                Report::HandOverFailed {
                    term,
                    why: "no ack".into(),
                },
            );
        }
        if changed {
            self.report(
                node,
                if silent {
                    Report::StreamSilent { term }
                } else {
                    Report::StreamAlive { term }
                },
            );
        }
    }

    fn heard(&mut self, node: usize) {
        let now = self.now;
        if let Some(r) = self.nodes[node].replica.as_mut() {
            r.heard_us = now;
            if r.silent {
                let rid = r.rid;
                self.watch_stream(node, rid);
            }
        }
    }

    pub(crate) fn packet(&mut self, node: usize, packet: Packet) {
        if !self.nodes[node].up || self.nodes[node].replica.is_none() {
            return;
        }
        match packet {
            Packet::Data { .. } => self.on_data(node, packet),
            Packet::Ack { stream, n } => self.on_ack(node, stream, n),
            Packet::Reject { stream } => {
                let mine = self.nodes[node]
                    .replica
                    .as_mut()
                    .and_then(|r| r.send.as_mut());
                if let Some(s) = mine.filter(|s| s.stream == stream && !s.broken) {
                    s.broken = true;
                    let term = s.term;
                    self.report(
                        node,
                        Report::StreamBroken {
                            term,
                            why: "rejected".into(),
                        },
                    );
                }
            }
        }
    }

    fn on_data(&mut self, node: usize, packet: Packet) {
        let Packet::Data {
            stream,
            order,
            term,
            to_life,
            n,
            point,
            mark,
            shutdown,
        } = packet
        else {
            return;
        };
        let Some(r) = self.nodes[node].replica.as_mut() else {
            return;
        };
        if r.mode == Mode::Handed {
            return; // a receiver that is not bound yet
        }
        let Some(v) = r
            .recv
            .as_mut()
            .filter(|v| v.my_life == to_life && v.term == term)
        else {
            return self.send_packet(node, Packet::Reject { stream });
        };
        match v.from {
            Some((_, seen)) if order < seen => return,
            Some((s, _)) if s == stream => {}
            Some(_) if v.complete => return self.send_packet(node, Packet::Reject { stream }),
            _ => {
                v.from = Some((stream, order));
                v.n = 0;
            }
        }
        if v.sealed {
            return;
        }
        let mut reports = vec![];
        let hasty = self.setup.lie == Some(Lie::AckBeforeCommit) && v.confirmed && n % 3 != 0;
        if hasty {
            return self.send_packet(node, Packet::Ack { stream, n: Some(n) });
        }
        if n > v.n {
            v.n = n;
            v.point = Some(point);
            if mark && !v.complete {
                v.complete = true;
                reports.push(Report::EligibleImage {
                    term,
                    stream,
                    n: EpochNo(n),
                });
            }
        }
        if v.complete && !v.confirmed && mark && reports.is_empty() {
            // Repeated until it is confirmed.
            reports.push(Report::EligibleImage {
                term,
                stream,
                n: EpochNo(v.n),
            });
        }
        if shutdown && v.confirmed && !v.shutdown_said {
            v.shutdown_said = true;
            reports.push(Report::PeerGuestShutdown { term });
        }
        let ack = (v.complete && v.confirmed).then_some(v.n);
        let (complete, at) = (v.complete, v.point);
        if complete {
            // The commit record is durable at first; later ones get to the disk now and then.
            let durable = !reports.is_empty() || self.rng.chance(1, 4);
            self.nodes[node].disk.now = at;
            if durable {
                self.nodes[node].disk.flushed = at;
            }
        }
        for r in reports {
            self.report(node, r);
        }
        self.heard(node);
        self.send_packet(node, Packet::Ack { stream, n: ack });
    }

    fn on_ack(&mut self, node: usize, stream: StreamId, n: Option<u64>) {
        let now = self.now;
        let Some(r) = self.nodes[node].replica.as_mut() else {
            return;
        };
        let gate = r.gate;
        let handing = r.handing;
        let ports = r.ports();
        let any = self.setup.lie == Some(Lie::AckOfAnyStream);
        let Some(s) = r.send.as_mut().filter(|s| any || s.stream == stream) else {
            return;
        };
        let n = n.map(|n| n.min(s.points.len() as u64)).filter(|n| *n > 0);
        let term = s.term;
        let mut reports = vec![];
        s.sync_left = s.sync_left.saturating_sub(1);
        if s.sync_left == 0 && !s.synced {
            s.synced = true;
            reports.push(Report::Synced { term });
        }
        let mut out = None;
        if let Some(n) = n.filter(|n| *n > s.acked) {
            let marked = s.eligible_from.is_some_and(|e| n >= e);
            s.acked = n;
            if marked && !s.protected {
                s.protected = true;
                reports.push(Report::Protected {
                    term,
                    stream,
                    n: EpochNo(n),
                });
            }
            if marked && gate == Gate::Acks {
                out = s.points.get(n as usize - 1).copied();
            }
        }
        let acked = s.acked;
        if let Some((last, _)) = handing
            && acked >= last
            && r.mode != Mode::Handed
        {
            r.mode = Mode::Handed;
            r.handing = None;
            reports.push(Report::HandedOver {
                term,
                n: EpochNo(acked),
                ports,
            });
        }
        if let Some(point) = out {
            self.check.release(node, point, now);
        }
        for r in reports {
            self.report(node, r);
        }
        self.heard(node);
    }
}

fn receiver(term: Term, my_life: LifeId, point: Option<usize>) -> Receiver {
    Receiver {
        term,
        my_life,
        from: None,
        n: 0,
        point,
        complete: false,
        confirmed: false,
        sealed: false,
        shutdown_said: false,
    }
}
