//! When the next barrier is due.
//!
//! A held frame waits for an ack, so it wants an early barrier; a guest that sends nothing is cut
//! at the long interval only, because each barrier costs it a pause and a round of page faults. Epochs
//! in flight are bounded: a slow standby stretches the interval instead of filling memory.

use std::time::Duration;

/// Epochs sent and not acked before the next barrier waits.
const MAX_IN_FLIGHT: u64 = 2;

/// The two intervals of a guest.
#[derive(Debug, Clone, Copy)]
pub struct Pacing {
    /// The longest distance of two barriers.
    pub max: Duration,
    /// The shortest.
    pub min: Duration,
}

/// What the decision is made from.
#[derive(Debug, Clone, Copy)]
pub struct Situation {
    /// Since the last barrier.
    pub elapsed: Duration,
    /// What the last pause and sending cost together: never spend most of the time on barriers.
    pub last_cost: Duration,
    /// Frames wait in the open epoch.
    pub output_waits: bool,
    /// The disk server asks for a barrier: it keeps much in memory.
    pub disk_presses: bool,
    /// Epochs closed and not acked.
    pub in_flight: u64,
}

impl Pacing {
    /// Whether to close the epoch now.
    pub fn due(&self, s: Situation) -> bool {
        if s.in_flight >= MAX_IN_FLIGHT {
            return false;
        }
        if s.elapsed >= self.max || s.disk_presses {
            return true;
        }
        s.output_waits && s.elapsed >= self.min.max(s.last_cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: Pacing = Pacing {
        max: Duration::from_millis(100),
        min: Duration::from_millis(5),
    };

    fn at(ms: u64) -> Situation {
        Situation {
            elapsed: Duration::from_millis(ms),
            last_cost: Duration::from_millis(2),
            output_waits: false,
            disk_presses: false,
            in_flight: 0,
        }
    }

    #[test]
    fn an_idle_guest_is_cut_at_the_long_interval_only() {
        assert!(!P.due(at(99)));
        assert!(P.due(at(100)));
    }

    #[test]
    fn held_output_wants_an_early_barrier() {
        assert!(!P.due(Situation {
            output_waits: true,
            ..at(4)
        }));
        assert!(P.due(Situation {
            output_waits: true,
            ..at(5)
        }));
    }

    #[test]
    fn costly_epochs_are_not_cut_faster_than_they_cost() {
        let s = Situation {
            output_waits: true,
            last_cost: Duration::from_millis(30),
            ..at(29)
        };
        assert!(!P.due(s));
        assert!(P.due(Situation {
            elapsed: Duration::from_millis(30),
            ..s
        }));
    }

    #[test]
    fn a_slow_standby_stretches_the_interval() {
        assert!(!P.due(Situation {
            in_flight: 2,
            ..at(1000)
        }));
    }
}
