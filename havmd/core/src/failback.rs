//! When a guest that runs away from home may move back by itself: after a time of unbroken
//! protection, with a growing wait after failures, and never more often than the budget says.

use crate::settings::FailbackSettings;
use std::collections::VecDeque;
use std::time::Duration;

/// Where the way home stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlook {
    /// Automatic failback is off.
    Off,
    /// Not before this time.
    At(Duration),
    /// Too many moves: not before this time.
    Probation(Duration),
}

/// The history of moves of one guest at one node.
#[derive(Debug, Clone, Default)]
pub struct Failback {
    protected_since: Option<Duration>,
    moves: VecDeque<Duration>,
    failures: u32,
    not_before: Duration,
    probation_until: Option<Duration>,
}

impl Failback {
    /// The guest is protected, or not any more.
    pub fn protected(&mut self, now: Duration, yes: bool) {
        match (yes, self.protected_since) {
            (true, None) => self.protected_since = Some(now),
            (false, _) => self.protected_since = None,
            _ => {}
        }
    }

    /// A move has begun without being asked for. Says whether it was the last for a while.
    pub fn moved(&mut self, now: Duration, s: &FailbackSettings) -> bool {
        self.moves.push_back(now);
        while self.moves.front().is_some_and(|t| *t + s.window < now) {
            self.moves.pop_front();
        }
        let over = self.moves.len() as u32 >= s.budget;
        if over {
            self.probation_until = Some(now + s.probation);
        }
        over
    }

    /// The move did not happen.
    pub fn failed(&mut self, now: Duration, s: &FailbackSettings) {
        self.not_before = now + s.backoff * (1 << self.failures.min(4));
        self.failures = self.failures.saturating_add(1);
    }

    /// It did.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// When the guest may move; none while it is not protected.
    pub fn outlook(&self, s: &FailbackSettings) -> Option<Outlook> {
        if !s.automatic {
            return Some(Outlook::Off);
        }
        let at = (self.protected_since? + s.stability).max(self.not_before);
        Some(match self.probation_until {
            Some(until) if until > at => Outlook::Probation(until),
            _ => Outlook::At(at),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn waits_for_unbroken_protection() {
        let s = Settings::default().failback;
        let mut f = Failback::default();
        assert_eq!(f.outlook(&s), None);
        f.protected(S(10), true);
        f.protected(S(20), true);
        assert_eq!(f.outlook(&s), Some(Outlook::At(S(40))));
        f.protected(S(25), false);
        f.protected(S(30), true);
        assert_eq!(f.outlook(&s), Some(Outlook::At(S(60))));
    }

    /// A flapping host must not carry the guest to and fro.
    #[test]
    fn third_move_in_an_hour_is_the_last_for_an_hour() {
        let s = Settings::default().failback;
        let mut f = Failback::default();
        assert!(!f.moved(S(100), &s));
        assert!(!f.moved(S(200), &s));
        assert!(f.moved(S(300), &s));
        f.protected(S(310), true);
        assert_eq!(f.outlook(&s), Some(Outlook::Probation(S(3_900))));
    }

    #[test]
    fn failures_wait_longer_and_longer() {
        let s = Settings::default().failback;
        let mut f = Failback::default();
        f.protected(S(0), true);
        f.failed(S(100), &s);
        assert_eq!(f.outlook(&s), Some(Outlook::At(S(160))));
        f.failed(S(200), &s);
        assert_eq!(f.outlook(&s), Some(Outlook::At(S(320))));
        f.succeeded();
        f.failed(S(400), &s);
        assert_eq!(f.outlook(&s), Some(Outlook::At(S(460))));
    }
}
