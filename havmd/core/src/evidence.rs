//! From what is heard to a verdict about one guest.
//!
//! ```text
//!   beats \ stream |  alive           silent, or none
//!   alive, suspect |  fine            one guest's trouble: the primary asks for a yield
//!   lost           |  a daemon died   gone: a claim may be sought
//! ```
//! A restart of `havmd` silences the beats only; a dead replicator silences one stream only.
//! Neither alone makes a failover.

use crate::event::Peer;

/// What this guest's stream tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// There is none, or the replicator here that would know is gone.
    None,
    /// Something came lately.
    Alive,
    /// Nothing came for the detection time.
    Silent,
}

/// The verdict about the peer, for this guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong, or not enough to act on.
    Fine,
    /// The peer's host is there, this guest's stream is not.
    GuestTrouble,
    /// The peer is silent in every way.
    Gone,
}

/// The table above.
pub fn verdict(peer: Peer, stream: Stream) -> Verdict {
    match (peer, stream) {
        (_, Stream::Alive) => Verdict::Fine,
        (Peer::Lost, _) => Verdict::Gone,
        (_, Stream::Silent | Stream::None) => Verdict::GuestTrouble,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A restarted havmd on the primary (beats silent, stream alive) is no reason to fail over,
    /// and one dead replicator is no verdict about a host.
    #[test]
    fn one_silent_witness_is_not_enough() {
        assert_eq!(verdict(Peer::Lost, Stream::Alive), Verdict::Fine);
        assert_eq!(verdict(Peer::Alive, Stream::Silent), Verdict::GuestTrouble);
        assert_eq!(
            verdict(Peer::Suspect, Stream::Silent),
            Verdict::GuestTrouble
        );
        assert_eq!(verdict(Peer::Lost, Stream::Silent), Verdict::Gone);
    }
}
