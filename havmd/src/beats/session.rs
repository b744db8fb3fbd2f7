//! Which beats count, pure: nothing old, nothing twice, nothing from another link.
//!
//! ```text
//!   unknown session ──its echo shows a beat of mine, sent just now──> the peer's session
//!   the peer's session ──another one is accepted──> retired, for ever
//! ```
//! Recorded beats of an earlier life of the peer are genuine and would make a dead peer look
//! alive; they cannot show an echo of a beat that was sent just now. Within a session, each link's
//! numbers only grow.

use super::packet::{Echo, Packet};
use havm_core::detector::Beat;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// An echo of an older beat opens no session.
const FRESH: Duration = Duration::from_secs(2);
/// Sessions that are remembered as ended; only one within [`FRESH`] of its end matters.
const RETIRED: usize = 64;

/// What came in over a link, since this daemon's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkCounters {
    /// Beats sent.
    pub sent: u64,
    /// Beats that could not be sent (no route, no address, no link).
    pub send_errors: u64,
    /// Beats that counted.
    pub received: u64,
    /// Beats of the peer's present session that never came.
    pub lost: u64,
    /// Datagrams that the peer did not make, or not for this link.
    pub forged: u64,
    /// Genuine beats that came again or too late.
    pub replayed: u64,
    /// Genuine beats of a session that has not proven itself (yet).
    pub unproven: u64,
}

#[derive(Debug, Default)]
struct Link {
    seq: u64,
    /// The newest beat of the peer's session, or of one that wants to be it.
    echo: Option<(Echo, Duration)>,
    counters: LinkCounters,
}

/// A beat that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// For the detector.
    pub beat: Beat,
    /// The peer's flags.
    pub flags: u8,
    /// The peer's daemon has started anew.
    pub new_session: bool,
}

/// The receiving side's memory.
#[derive(Debug)]
pub struct Sessions {
    mine: u64,
    peer: Option<u64>,
    retired: VecDeque<u64>,
    links: Vec<Link>,
}

impl Sessions {
    /// `mine` is this start's random number.
    pub fn new(mine: u64, links: usize) -> Self {
        Sessions {
            mine,
            peer: None,
            retired: VecDeque::new(),
            links: (0..links).map(|_| Link::default()).collect(),
        }
    }

    /// The peer's present session.
    pub fn peer(&self) -> Option<u64> {
        self.peer
    }

    /// The counters of a link, to read and to add to.
    pub fn counters(&mut self, link: usize) -> Option<&mut LinkCounters> {
        self.links.get_mut(link).map(|l| &mut l.counters)
    }

    /// The echo that the next beat on `link` carries.
    pub fn echo(&self, link: usize, now: Duration) -> Echo {
        let echo = self.links.get(link).and_then(|l| l.echo);
        echo.map_or(Echo::default(), |(e, at)| Echo {
            held: now.saturating_sub(at),
            ..e
        })
    }

    /// Judges a datagram: `packet` is `None` where its authentication failed. `at`: its arrival.
    pub fn judge(&mut self, link: usize, packet: Option<Packet>, at: Duration) -> Option<Accepted> {
        let l = self.links.get_mut(link)?;
        let p = match packet {
            Some(p) if usize::from(p.link) == link && p.session != 0 && p.session != self.mine => p,
            _ => {
                l.counters.forged += 1;
                return None;
            }
        };
        if self.retired.contains(&p.session) {
            l.counters.replayed += 1;
            return None;
        }
        let known = self.peer == Some(p.session);
        if known && p.seq <= l.seq {
            l.counters.replayed += 1;
            return None;
        }
        // Echo it, also where it is not accepted yet: that is how the peer comes to know us.
        let seen = Echo {
            session: p.session,
            seq: p.seq,
            sent: p.sent,
            held: Duration::ZERO,
        };
        l.echo = Some((seen, at));
        let fresh = p.echo.session == self.mine
            && p.echo.sent <= at
            && at.saturating_sub(p.echo.sent) <= FRESH;
        if !known && !fresh {
            l.counters.unproven += 1;
            return None;
        }
        if !known {
            if let Some(old) = self.peer.replace(p.session) {
                if self.retired.len() == RETIRED {
                    self.retired.pop_front();
                }
                self.retired.push_back(old);
            }
            for l in &mut self.links {
                l.seq = 0;
            }
        }
        let l = self.links.get_mut(link)?;
        if l.seq > 0 {
            let gap = p.seq.saturating_sub(l.seq).saturating_sub(1);
            l.counters.lost = l.counters.lost.saturating_add(gap);
        }
        l.seq = p.seq;
        l.counters.received += 1;
        let rtt = fresh
            .then(|| at.checked_sub(p.echo.sent)?.checked_sub(p.echo.held))
            .flatten();
        Some(Accepted {
            beat: Beat {
                session: p.session,
                seq: p.seq,
                rtt,
            },
            flags: p.flags,
            new_session: !known,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: u64 = 1;
    const PEER: u64 = 2;
    const MS: fn(u64) -> Duration = Duration::from_millis;

    /// A beat of the peer on link 0 that echoes a beat of mine sent at `echoed` ms.
    fn beat(session: u64, seq: u64, echoed: Option<u64>) -> Packet {
        Packet {
            link: 0,
            flags: 0,
            session,
            seq,
            sent: MS(1),
            echo: echoed.map_or(Echo::default(), |at| Echo {
                session: MINE,
                seq: 1,
                sent: MS(at),
                held: MS(1),
            }),
        }
    }

    fn met() -> Sessions {
        let mut s = Sessions::new(MINE, 2);
        assert_eq!(s.judge(0, Some(beat(PEER, 1, None)), MS(1000)), None);
        let a = s
            .judge(0, Some(beat(PEER, 2, Some(1000))), MS(1004))
            .unwrap();
        assert!(a.new_session);
        assert_eq!(a.beat.rtt, Some(MS(3)));
        s
    }

    #[test]
    fn a_peer_is_believed_once_it_echoes_what_was_sent_just_now() {
        let mut s = met();
        // From then on beats count without an echo: the way back may be broken.
        let a = s.judge(0, Some(beat(PEER, 3, None)), MS(1010)).unwrap();
        assert!(!a.new_session && a.beat.rtt.is_none());
        assert_eq!(
            s.echo(0, MS(1015)),
            Echo {
                session: PEER,
                seq: 3,
                sent: MS(1),
                held: MS(5)
            }
        );
        assert_eq!(s.echo(1, MS(1015)), Echo::default());
    }

    #[test]
    fn nothing_counts_twice_or_late() {
        let mut s = met();
        assert!(s.judge(0, Some(beat(PEER, 5, None)), MS(1010)).is_some());
        for seq in [5, 4, 1] {
            assert_eq!(s.judge(0, Some(beat(PEER, seq, None)), MS(1011)), None);
        }
        let c = *s.counters(0).unwrap();
        assert_eq!((c.received, c.lost, c.replayed, c.unproven), (2, 2, 3, 1));
    }

    /// The recorded beats of an earlier life are genuine; they must not revive a dead peer.
    #[test]
    fn recorded_beats_of_an_earlier_life_prove_nothing() {
        let mut s = met();
        // The peer starts anew.
        let a = s.judge(0, Some(beat(3, 1, Some(1100))), MS(1101)).unwrap();
        assert!(a.new_session);
        // Its last life's beats, even those that echo what was sent a moment ago.
        assert_eq!(s.judge(0, Some(beat(PEER, 50, Some(1100))), MS(1102)), None);
        // A life before this daemon's start: no echo of mine, or an old one.
        let mut s = met();
        assert_eq!(s.judge(0, Some(beat(9, 50, None)), MS(5000)), None);
        assert_eq!(s.judge(0, Some(beat(9, 51, Some(1000))), MS(5000)), None);
        assert_eq!(s.peer(), Some(PEER));
    }

    #[test]
    fn forgeries_own_beats_and_other_links_beats_are_counted_and_dropped() {
        let mut s = met();
        assert_eq!(s.judge(0, None, MS(1010)), None);
        assert_eq!(s.judge(0, Some(beat(MINE, 9, Some(1010))), MS(1010)), None);
        assert_eq!(s.judge(1, Some(beat(PEER, 9, None)), MS(1010)), None);
        assert_eq!(s.judge(7, Some(beat(PEER, 9, None)), MS(1010)), None);
        assert_eq!(s.counters(0).unwrap().forged, 2);
        assert_eq!(s.counters(1).unwrap().forged, 1);
    }

    #[test]
    fn each_link_counts_for_itself() {
        let mut s = met();
        let on_1 = |seq| Packet {
            link: 1,
            ..beat(PEER, seq, None)
        };
        assert!(s.judge(1, Some(on_1(1)), MS(1010)).is_some());
        assert!(s.judge(1, Some(on_1(2)), MS(1020)).is_some());
        assert_eq!(s.counters(1).unwrap().lost, 0);
    }
}
