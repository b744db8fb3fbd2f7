//! What goes over the daemons' connection, and what was heard already.

use havm_core::ids::NodeId;
use havm_core::message::Envelope;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::VecDeque;

/// The largest frame, bytes.
pub const MAX_FRAME_BYTES: usize = 16 * 1024 * 1024;

/// One frame.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "packet")]
pub enum Packet {
    /// First on every connection, both ways.
    Hello {
        /// The sender.
        node: NodeId,
        /// Random at each start of its daemon.
        session: u64,
    },
    /// About a guest. The same one goes over every link; `seq` tells them apart.
    Note {
        /// Counts up within the sender's session.
        seq: u64,
        /// What is said.
        envelope: Box<Envelope>,
    },
    /// A question; asked again over another link when the one that it went over broke.
    Ask {
        /// Names it within the asker's session.
        id: u64,
        /// What.
        body: Value,
    },
    /// The answer.
    Answer {
        /// The question's.
        id: u64,
        /// What.
        body: Value,
    },
    /// Nothing but a sign of life of this connection.
    Ping,
}

/// How far apart the links may be before a late note counts as heard.
const WINDOW: usize = 1024;
/// Sessions of the peer that are told apart at once: the present one, and what is left of others.
const SESSIONS: usize = 4;

/// Which notes came already, over whichever link.
#[derive(Debug, Default)]
pub struct Heard {
    sessions: VecDeque<(u64, Seqs)>,
}

#[derive(Debug, Default)]
struct Seqs {
    highest: u64,
    recent: VecDeque<u64>,
}

impl Heard {
    /// Whether this note is new; it is not, from now on.
    pub fn is_new(&mut self, session: u64, seq: u64) -> bool {
        let at = match self.sessions.iter().position(|(s, _)| *s == session) {
            Some(at) => at,
            None => {
                if self.sessions.len() == SESSIONS {
                    self.sessions.pop_front();
                }
                self.sessions.push_back((session, Seqs::default()));
                self.sessions.len() - 1
            }
        };
        let Some((_, seqs)) = self.sessions.get_mut(at) else {
            return true;
        };
        let too_old = seq.saturating_add(WINDOW as u64) <= seqs.highest;
        if too_old || seqs.recent.contains(&seq) {
            return false;
        }
        seqs.highest = seqs.highest.max(seq);
        if seqs.recent.len() == WINDOW {
            seqs.recent.pop_front();
        }
        seqs.recent.push_back(seq);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_note_is_heard_once_whichever_link_is_first() {
        let mut h = Heard::default();
        for seq in 1..5000 {
            assert!(h.is_new(1, seq));
            assert!(!h.is_new(1, seq));
        }
        assert!(!h.is_new(1, 10), "older than the window");
        // Out of order within the window.
        assert!(h.is_new(1, 6000));
        assert!(h.is_new(1, 5999));
        assert!(!h.is_new(1, 6000));
        // The peer's daemon started anew.
        assert!(h.is_new(2, 1));
        assert!(!h.is_new(2, 1));
        for s in 3..100 {
            assert!(h.is_new(s, 1));
        }
        assert!(h.sessions.len() <= SESSIONS);
    }
}
