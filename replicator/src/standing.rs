//! What a daemon that has just (re)connected must still learn.
//!
//! A report that asks for a decision is kept until what it speaks of is over; a new daemon gets it again
//! after the state. Repeats are harmless: the engine drops what it knows.

use havm_core::order::Report;

/// The kinds that are kept, at most one of each.
#[derive(Default)]
pub struct Standing {
    kept: Vec<Report>,
}

impl Standing {
    /// Keeps `report` if it is of a kind that a daemon must not miss.
    pub fn note(&mut self, report: &Report) {
        if !lasting(report) {
            return;
        }
        self.forget_kind(report);
        self.kept.push(report.clone());
    }

    /// The role has changed: nothing of the old one matters any more.
    pub fn clear(&mut self) {
        self.kept.clear();
    }

    /// In the order in which they were made.
    pub fn all(&self) -> &[Report] {
        &self.kept
    }

    fn forget_kind(&mut self, like: &Report) {
        let kind = std::mem::discriminant(like);
        self.kept.retain(|r| std::mem::discriminant(r) != kind);
        // Of two opposite facts only the last stands.
        let opposite = |r: &Report| {
            matches!(
                (r, like),
                (Report::StreamSilent { .. }, Report::StreamAlive { .. })
                    | (Report::StreamAlive { .. }, Report::StreamSilent { .. })
            )
        };
        self.kept.retain(|r| !opposite(r));
    }
}

fn lasting(r: &Report) -> bool {
    !matches!(
        r,
        Report::State(_)
            | Report::SyncProgress { .. }
            | Report::Warning { .. }
            | Report::Refused { .. }
            | Report::Verified { .. }
            | Report::Detached
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use havm_core::ids::Term;

    #[test]
    fn the_last_of_a_kind_is_repeated_and_silence_ends_with_life() {
        let mut s = Standing::default();
        s.note(&Report::Synced { term: Term(1) });
        s.note(&Report::Synced { term: Term(2) });
        s.note(&Report::StreamSilent { term: Term(2) });
        s.note(&Report::StreamAlive { term: Term(2) });
        s.note(&Report::Warning { text: "x".into() });
        assert_eq!(
            s.all(),
            [
                Report::Synced { term: Term(2) },
                Report::StreamAlive { term: Term(2) }
            ]
        );
    }
}
