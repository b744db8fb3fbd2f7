//! The numbers of the decisions, checked by `havm-config` before they come here.

use std::time::Duration;

/// What arbitrates the next term of a guest (rule 6); fixed for a term when protection starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArbiterKind {
    /// The witness. Protection starts only while it answers, else the first lost standby would
    /// leave the guest gated.
    Witness,
    /// Fencing.
    Fence,
    /// Nobody: only yields. A lost peer needs an operator.
    None,
}

/// Automatic return to the home node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailbackSettings {
    /// Move home without being asked.
    pub automatic: bool,
    /// How long the guest must have been protected without a break before it moves.
    pub stability: Duration,
    /// The wait after a failed move; doubled at each, to 16 times.
    pub backoff: Duration,
    /// At most this many automatic moves in `window`, then `probation`.
    pub budget: u32,
    /// See `budget`.
    pub window: Duration,
    /// How long automatic moves rest after too many.
    pub probation: Duration,
}

/// Timing and policy of one guest's engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Between repeated messages that wait for an answer (Hello of a primary without a standby).
    pub hello_interval: Duration,
    /// Between repeats of messages in a hurry (Yield, YieldAsk, Hand, Conf, Protect).
    pub resend_interval: Duration,
    /// How long a standby waits before it asks the arbiter, so that a healthy primary asks first.
    pub standby_delay: Duration,
    /// Between two questions to the arbiter.
    pub arbiter_retry: Duration,
    /// How long a stream may be silent, while the peer's daemon lives, before the primary asks
    /// the standby to yield.
    pub stream_grace: Duration,
    /// How long an asked standby may leave `YieldAsk` unanswered before the arbiter is asked too.
    pub yield_patience: Duration,
    /// How long an old primary waits for `Conf` before it seeks a permit and resumes.
    pub hand_timeout: Duration,
    /// How long a node without its image waits for the peer before a cold claim (rule 5).
    pub cold_wait: Duration,
    /// How long a solo primary without a guest waits for word of a higher term before it starts.
    pub solo_start_wait: Duration,
    /// The wait before a guest or replicator that crashed twice is started again (after the first
    /// crash there is none); roughly doubled at each crash that follows soon, to 63 times.
    pub restart_backoff: Duration,
    /// Between attempts to write the record after a failure.
    pub persist_retry: Duration,
    /// Who arbitrates.
    pub arbiter: ArbiterKind,
    /// The way home.
    pub failback: FailbackSettings,
}

impl Default for Settings {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Settings {
            hello_interval: ms(500),
            resend_interval: ms(100),
            standby_delay: ms(30),
            arbiter_retry: ms(300),
            stream_grace: ms(400),
            yield_patience: ms(1_500),
            hand_timeout: ms(1_000),
            cold_wait: ms(5_000),
            solo_start_wait: ms(2_000),
            restart_backoff: ms(500),
            persist_retry: ms(1_000),
            arbiter: ArbiterKind::Witness,
            failback: FailbackSettings {
                automatic: true,
                stability: Duration::from_secs(30),
                backoff: Duration::from_secs(60),
                budget: 3,
                window: Duration::from_secs(3_600),
                probation: Duration::from_secs(3_600),
            },
        }
    }
}
