//! The events, with a sentence each: what `havm events --list` and the manual show.
//!
//! The names are those of `havm events` (`NoticeKind` of havm-core, in kebab-case); a test keeps
//! the two lists the same. Names are stable: hooks are written against them.

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its name, as in `HAVM_EVENT`.
    pub name: &'static str,
    /// It is about one guest (else about this host or the pair).
    pub guest: bool,
    /// What it means.
    pub sentence: &'static str,
}

const fn guest(name: &'static str, sentence: &'static str) -> Entry {
    Entry {
        name,
        guest: true,
        sentence,
    }
}
const fn host(name: &'static str, sentence: &'static str) -> Entry {
    Entry {
        name,
        guest: false,
        sentence,
    }
}

/// All events.
pub const CATALOGUE: &[Entry] = &[
    guest(
        "solo",
        "The guest runs here without a standby: a second fault would stop it.",
    ),
    guest(
        "protected",
        "The standby holds a complete copy; the guest survives the loss of this host.",
    ),
    guest(
        "sync-started",
        "A standby joined; memory and disk are being brought up to date.",
    ),
    guest(
        "standby-ready",
        "This host holds a complete copy and can take over.",
    ),
    guest(
        "peer-lost",
        "Neither the other host nor its stream for this guest is heard.",
    ),
    guest("peer-back", "The other host is heard again."),
    guest(
        "failover",
        "This host took the guest over after the other one was lost or gave up.",
    ),
    guest(
        "switchover-started",
        "A planned move of the guest has begun (by hand, or an automatic failback).",
    ),
    guest("switchover-done", "The guest came here by a planned move."),
    guest(
        "switchover-failed",
        "A planned move did not happen; the guest runs where it was.",
    ),
    guest(
        "rejoin",
        "This host gave up its old copy and joins the other host's guest as standby.",
    ),
    guest(
        "yielded",
        "This host gave up its claim, so that the other may act alone.",
    ),
    guest(
        "frozen",
        "The witness refused this host: the guest stands still here until the other host is heard.",
    ),
    guest(
        "gated",
        "No arbiter can be reached: the guest runs, but its output is held.",
    ),
    guest(
        "output-full",
        "Too much output is held: the guest's processors stand until the standby or a permit answers.",
    ),
    guest("stopped", "The guest was stopped on purpose."),
    guest("guest-crashed", "The guest's process ended unexpectedly."),
    guest("start-failed", "The guest's process could not be started."),
    guest(
        "replicator-crashed",
        "The guest's replicator ended unexpectedly and is started again.",
    ),
    guest(
        "stream-broken",
        "Replication to the other host broke and starts again.",
    ),
    guest(
        "record-fault",
        "The guest's durable record could not be written or read: this host makes no claim to it.",
    ),
    guest(
        "conflict",
        "Both hosts claim the guest, or their data does not descend from one another: an operator must decide.",
    ),
    guest(
        "witness-fault",
        "The witness refuses, or is not the one that was enrolled.",
    ),
    guest("forced", "An operator forced the promotion here."),
    guest(
        "probation",
        "The guest moved too often lately: automatic failback waits.",
    ),
    guest("request-refused", "An operator's request was not possible."),
    guest(
        "verified",
        "Memory and disk on both hosts were compared; the text has the result.",
    ),
    guest("unprotected", "Protection has ended as asked."),
    guest(
        "warning",
        "Something a person should know; nothing to decide.",
    ),
    guest(
        "disk-error",
        "A disk of the guest failed on this host; it is served from the other one.",
    ),
    host("link-down", "A replication link is down."),
    host("link-up", "A replication link works again."),
    host("witness-lost", "The witness does not answer."),
    host("witness-back", "The witness answers again."),
];

/// The entry of an event.
pub fn find(name: &str) -> Option<&'static Entry> {
    CATALOGUE.iter().find(|e| e.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use havm_core::command::NoticeKind::{self, *};

    /// A new kind of notice must get a sentence: this match stops compiling, then fails.
    #[test]
    fn every_notice_has_an_entry() {
        let all = [
            Solo,
            Protected,
            SyncStarted,
            StandbyReady,
            PeerLost,
            PeerBack,
            Failover,
            SwitchoverStarted,
            SwitchoverDone,
            SwitchoverFailed,
            Rejoin,
            Yielded,
            Frozen,
            Gated,
            OutputFull,
            Stopped,
            GuestCrashed,
            StartFailed,
            ReplicatorCrashed,
            StreamBroken,
            RecordFault,
            Conflict,
            WitnessFault,
            Forced,
            Probation,
            RequestRefused,
            Verified,
            Unprotected,
            Warning,
        ];
        let listed = |k: NoticeKind| match k {
            Solo | Protected | SyncStarted | StandbyReady | PeerLost | PeerBack | Failover
            | SwitchoverStarted | SwitchoverDone | SwitchoverFailed | Rejoin | Yielded | Frozen
            | Gated | OutputFull | Stopped | GuestCrashed | StartFailed | ReplicatorCrashed
            | StreamBroken | RecordFault | Conflict | WitnessFault | Forced | Probation
            | RequestRefused | Verified | Unprotected | Warning => true,
        };
        for kind in all {
            let name = serde_json::to_value(kind).expect("a name");
            let entry = find(name.as_str().expect("text"));
            assert!(
                listed(kind) && entry.is_some_and(|e| e.guest),
                "{name} has no entry"
            );
        }
    }

    #[test]
    fn names_are_unique_and_fit_an_environment() {
        for (i, e) in CATALOGUE.iter().enumerate() {
            assert!(
                e.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'),
                "{}",
                e.name
            );
            assert!(
                CATALOGUE[..i].iter().all(|f| f.name != e.name),
                "{} twice",
                e.name
            );
            assert!(e.sentence.ends_with('.'));
        }
    }
}
