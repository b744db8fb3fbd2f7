//! The transition table of the durable record. Every edge that is not listed is prohibited, and
//! the engine refuses to persist it.
//!
//! The picture is made from the table and kept by a test beside this text: see [`picture`].

use crate::record::{Record, Role, RoleStatus};

/// How the term moves along an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TermMove {
    /// Term and basis stay.
    Same,
    /// Term and basis become one higher term.
    Join,
    /// The term rises, the basis stays.
    Promise,
    /// The basis catches up with a term promised before.
    CatchUp,
}

type State = (Role, RoleStatus);

/// One listed edge.
pub struct Edge {
    from: State,
    to: State,
    term: TermMove,
    why: &'static str,
}

use Role::{Eligible, Ineligible, Protected, Solo};
use RoleStatus::{Active, Handing, Yielded};
use TermMove::{CatchUp, Join, Promise, Same};

const fn edge(from: State, to: State, term: TermMove, why: &'static str) -> Edge {
    Edge {
        from,
        to,
        term,
        why,
    }
}

/// The whole table.
pub const EDGES: &[Edge] = &[
    edge((Solo, Active), (Protected, Active), Same, "3 protect"),
    edge((Solo, Active), (Ineligible, Active), Join, "10 rejoin"),
    edge(
        (Solo, Active),
        (Solo, Active),
        Join,
        "8 yielded above, 7 take",
    ),
    edge((Protected, Active), (Solo, Active), Join, "7 take"),
    edge(
        (Protected, Active),
        (Protected, Handing),
        Promise,
        "9 hand over",
    ),
    edge(
        (Protected, Active),
        (Protected, Yielded),
        Promise,
        "8 yield",
    ),
    edge((Protected, Active), (Ineligible, Active), Join, "10 rejoin"),
    edge(
        (Protected, Handing),
        (Solo, Active),
        Join,
        "9 no Conf, 7 take",
    ),
    edge(
        (Protected, Handing),
        (Eligible, Active),
        CatchUp,
        "9 Conf, same life",
    ),
    edge(
        (Protected, Handing),
        (Ineligible, Active),
        CatchUp,
        "10 rejoin",
    ),
    edge(
        (Protected, Handing),
        (Ineligible, Active),
        Join,
        "10 rejoin",
    ),
    edge(
        (Protected, Yielded),
        (Solo, Active),
        Join,
        "8 both yielded, 7 take",
    ),
    edge(
        (Protected, Yielded),
        (Ineligible, Active),
        CatchUp,
        "10 rejoin",
    ),
    edge(
        (Protected, Yielded),
        (Ineligible, Active),
        Join,
        "10 rejoin",
    ),
    edge((Eligible, Active), (Solo, Active), Join, "7 take"),
    edge((Eligible, Active), (Protected, Active), Join, "9 take over"),
    edge((Eligible, Active), (Eligible, Yielded), Promise, "8 yield"),
    edge((Eligible, Active), (Ineligible, Active), Join, "10 rejoin"),
    edge(
        (Eligible, Yielded),
        (Eligible, Yielded),
        Promise,
        "8 yield above",
    ),
    edge(
        (Eligible, Yielded),
        (Ineligible, Active),
        CatchUp,
        "10 rejoin",
    ),
    edge((Eligible, Yielded), (Ineligible, Active), Join, "10 rejoin"),
    edge(
        (Ineligible, Active),
        (Eligible, Active),
        Same,
        "3 image complete",
    ),
    edge(
        (Ineligible, Active),
        (Ineligible, Yielded),
        Promise,
        "8 yield",
    ),
    edge(
        (Ineligible, Active),
        (Ineligible, Active),
        Join,
        "10 rejoin",
    ),
    edge(
        (Ineligible, Yielded),
        (Ineligible, Yielded),
        Promise,
        "8 yield above",
    ),
    edge(
        (Ineligible, Yielded),
        (Ineligible, Active),
        CatchUp,
        "10 rejoin",
    ),
    edge(
        (Ineligible, Yielded),
        (Ineligible, Active),
        Join,
        "10 rejoin",
    ),
    edge((Eligible, Yielded), (Solo, Active), Join, "16 forced"),
    edge((Ineligible, Active), (Solo, Active), Join, "16 forced"),
    edge((Ineligible, Yielded), (Solo, Active), Join, "16 forced"),
];

/// Whether a record may be followed by another.
pub fn allowed(old: Option<&Record>, new: &Record) -> bool {
    let Some(old) = old else {
        // The first record, or the first after an unusable one.
        return new.basis == new.term && matches!(new.role, Solo | Ineligible);
    };
    let shape = match new.status {
        Active => new.term == new.basis,
        Handing | Yielded => new.term > new.basis,
    };
    if !shape || new.owner != old.owner || new.guest != old.guest {
        return false;
    }
    if (new.role, new.status, new.term, new.basis) == (old.role, old.status, old.term, old.basis) {
        return true; // flags only
    }
    let moved = match (new.term > old.term, new.basis > old.basis) {
        (false, false) if new.term == old.term && new.basis == old.basis => Same,
        (true, true) => Join,
        (true, false) if new.basis == old.basis => Promise,
        (false, true) if new.term == old.term => CatchUp,
        _ => return false,
    };
    let (from, to) = ((old.role, old.status), (new.role, new.status));
    EDGES
        .iter()
        .any(|e| e.from == from && e.to == to && e.term == moved)
}

/// The table as text.
pub fn picture() -> String {
    use std::fmt::Write;
    let name = |(r, s): State| match s {
        Active => format!("{r:?}").to_lowercase(),
        _ => format!("{r:?} {s:?}").to_lowercase(),
    };
    EDGES.iter().fold(String::new(), |mut out, e| {
        let mark = match e.term {
            Same => "term stays",
            Join => "joins a higher term",
            Promise => "promises a higher term",
            CatchUp => "basis catches up",
        };
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "{:18} -> {:18} {:23} rule {}",
            name(e.from),
            name(e.to),
            mark,
            e.why
        );
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The picture in the tree is the table: a changed edge must be seen in review.
    #[test]
    fn picture_is_up_to_date() {
        let kept = include_str!("role.txt");
        assert_eq!(picture(), kept, "write the new table to role.txt");
    }

    /// Rule 3: a term never returns from protected to solo; rule 8: a yield is final.
    #[test]
    fn forbidden_edges_are_not_listed() {
        let has = |from: State, to: State, term| {
            EDGES
                .iter()
                .any(|e| e.from == from && e.to == to && e.term == term)
        };
        for term in [Same, Promise, CatchUp] {
            assert!(!has((Protected, Active), (Solo, Active), term));
            assert!(!has((Protected, Handing), (Solo, Active), term));
            assert!(!has((Eligible, Active), (Solo, Active), term));
        }
        assert!(!has((Eligible, Yielded), (Eligible, Active), Same));
        assert!(!has((Protected, Yielded), (Protected, Active), Same));
        assert!(!has((Ineligible, Active), (Eligible, Active), Join));
    }
}
