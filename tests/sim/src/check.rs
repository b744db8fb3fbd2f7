//! What must never happen, checked at every step.
//!
//! A guest's history is a tree of points (one an epoch, or an instant of a solo guest); each knows
//! the one that it was made from. What the outside world has seen must be one line through that
//! tree: a released point descends from every point released before. Two open gates, a stale
//! standby promoted, an acked epoch that is missing, output that was not committed: each breaks
//! the line.

use havm_core::ids::Term;
use havm_core::record::{Record, Role, RoleStatus};
use std::collections::BTreeMap;

/// One state of the guest.
pub type Point = usize;

/// The checkers' memory.
#[derive(Debug, Default)]
pub struct Checker {
    parents: Vec<Option<Point>>,
    seen: Option<Point>,
    forgiven: bool,
    primaries: BTreeMap<Term, usize>,
    /// The first thing that went wrong.
    pub wrong: Option<String>,
    /// Points released to the outside.
    pub released: u64,
    /// The last release, microseconds of virtual time.
    pub last_release_us: u64,
}

impl Checker {
    /// A new state, made from another.
    pub fn grow(&mut self, parent: Option<Point>) -> Point {
        self.parents.push(parent);
        self.parents.len() - 1
    }

    /// The first violation counts.
    pub fn fail(&mut self, text: impl Into<String>) {
        if self.wrong.is_none() {
            self.wrong = Some(text.into());
        }
    }

    fn descends(&self, mut from: Point, to: Point) -> bool {
        loop {
            if from == to {
                return true;
            }
            match self.parents.get(from).copied().flatten() {
                // Points are numbered in order: a parent is older than its children.
                Some(p) if p >= to => from = p,
                _ => return false,
            }
        }
    }

    /// The outside sees a state.
    pub fn release(&mut self, node: usize, point: Point, now_us: u64) {
        if let Some(seen) = self.seen
            && seen != point
            && !self.descends(point, seen)
        {
            if self.descends(seen, point) {
                // A late release of an acked epoch: the successor's own history, and no news.
                return;
            }
            if !std::mem::take(&mut self.forgiven) {
                self.fail(format!("node {node} released point {point}, but the outside saw {seen} before: the history diverged"));
            }
        }
        self.seen = Some(point);
        self.released += 1;
        self.last_release_us = now_us;
    }

    /// A start from a disk that may lack acked writes is known of (both hosts failed within the
    /// moment before the flush after a promotion): the line begins anew there.
    pub fn forget_line(&mut self) {
        self.forgiven = true;
    }

    /// A record is made durable.
    pub fn persist(&mut self, node: usize, old: Option<&Record>, new: &Record) {
        if let Some(old) = old
            && (new.term < old.term || new.basis < old.basis)
        {
            self.fail(format!(
                "node {node}: term {} (basis {}) after term {} (basis {})",
                new.term, new.basis, old.term, old.basis
            ));
        }
        let primary =
            matches!(new.role, Role::Solo | Role::Protected) && new.status == RoleStatus::Active;
        if primary {
            let owner = *self.primaries.entry(new.basis).or_insert(node);
            if owner != node {
                self.fail(format!("both nodes were primary in term {}", new.basis));
            }
        }
    }
}
