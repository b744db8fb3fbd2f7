//! Every timer of an engine: one enum, one table, so that none is forgotten.

use std::time::Duration;

/// What a timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Timer {
    /// Say Hello again.
    Hello,
    /// Repeat what waits for an answer: Yield, YieldAsk, Hand, Conf, Protect.
    Resend,
    /// Ask the arbiter (again).
    Arbiter,
    /// The stream has been silent for too long while the peer lives.
    StreamGrace,
    /// The handover found no taker.
    Hand,
    /// The peer has had its time; a cold claim may be made.
    Cold,
    /// A solo primary may start its guest.
    SoloStart,
    /// Start a crashed guest or replicator again.
    Restart,
    /// Look whether the guest may move home.
    Failback,
    /// Try to write the record again.
    Persist,
}

const COUNT: usize = Timer::Persist as usize + 1;

/// Every timer, in the table's order.
pub const ALL: [Timer; COUNT] = [
    Timer::Hello,
    Timer::Resend,
    Timer::Arbiter,
    Timer::StreamGrace,
    Timer::Hand,
    Timer::Cold,
    Timer::SoloStart,
    Timer::Restart,
    Timer::Failback,
    Timer::Persist,
];

/// When each timer is due, as time since the daemon's start.
#[derive(Debug, Clone, Default)]
pub struct Timers([Option<Duration>; COUNT]);

impl Timers {
    /// Sets it, whatever it was.
    pub fn set(&mut self, t: Timer, at: Duration) {
        self.0[t as usize] = Some(at);
    }
    /// Sets it unless it is set already.
    pub fn set_once(&mut self, t: Timer, at: Duration) {
        self.0[t as usize].get_or_insert(at);
    }
    /// Unsets it.
    pub fn stop(&mut self, t: Timer) {
        self.0[t as usize] = None;
    }
    /// When it is due.
    pub fn get(&self, t: Timer) -> Option<Duration> {
        self.0[t as usize]
    }
    /// The earliest.
    pub fn next(&self) -> Option<Duration> {
        self.0.iter().flatten().min().copied()
    }
    /// Takes one that is due.
    pub fn take_due(&mut self, now: Duration) -> Option<Timer> {
        let t = ALL
            .into_iter()
            .filter(|t| self.get(*t).is_some_and(|at| at <= now))
            .min_by_key(|t| self.get(*t))?;
        self.stop(t);
        Some(t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_timers_come_once_and_in_order() {
        let mut t = Timers::default();
        let ms = Duration::from_millis;
        t.set(Timer::Cold, ms(5));
        t.set(Timer::Hello, ms(7));
        t.set_once(Timer::Hello, ms(1));
        assert_eq!(t.next(), Some(ms(5)));
        assert_eq!(t.take_due(ms(4)), None);
        assert_eq!(t.take_due(ms(9)), Some(Timer::Cold));
        assert_eq!(t.take_due(ms(9)), Some(Timer::Hello));
        assert_eq!(t.take_due(ms(9)), None);
    }
}
