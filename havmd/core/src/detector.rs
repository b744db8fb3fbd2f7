//! Is the peer's host there? From beats on every link, with what each beat says and when it came.
//!
//! ```text
//!   any link heard within suspect_after  -> alive
//!   none within suspect_after            -> suspect (nobody acts on it)
//!   none within lost_after               -> lost
//! ```
//! Our own stalls count for nothing: when this process itself was not run for a while, beats lie
//! unread in the socket. [`Detector::poll`] notices a late poll and gives the peer that time back.

use crate::event::Peer;
use std::time::Duration;

/// Thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetectorSettings {
    /// How often a beat is sent on each link.
    pub interval: Duration,
    /// Silence that makes a suspect.
    pub suspect_after: Duration,
    /// Silence that makes a loss.
    pub lost_after: Duration,
}

impl Default for DetectorSettings {
    fn default() -> Self {
        DetectorSettings {
            interval: Duration::from_millis(20),
            suspect_after: Duration::from_millis(70),
            lost_after: Duration::from_millis(140),
        }
    }
}

/// What a link shows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LinkView {
    /// The last beat's arrival.
    pub heard: Option<Duration>,
    /// The highest sequence number seen in this session of the peer.
    pub seq: u64,
    /// The peer daemon's session (new at each of its starts).
    pub session: u64,
    /// Smoothed round trip time, microseconds (RFC 6298's alpha of 1/8).
    pub rtt_us: Option<u64>,
    /// Beats that did not come, since the session's start.
    pub missed: u64,
    /// Beats that came.
    pub received: u64,
}

/// A received beat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Random at each start of the peer's daemon.
    pub session: u64,
    /// Counts up within the session, per link.
    pub seq: u64,
    /// The round trip time that this beat's echo shows.
    pub rtt: Option<Duration>,
}

/// The detector of one peer host.
#[derive(Debug, Clone)]
pub struct Detector {
    settings: DetectorSettings,
    links: Vec<LinkView>,
    last_poll: Option<Duration>,
    /// Silence is counted from here at the earliest.
    grace_from: Duration,
    verdict: Peer,
}

impl Detector {
    /// With so many links; a peer never heard is lost after `lost_after` from the first poll.
    pub fn new(settings: DetectorSettings, links: usize) -> Self {
        Detector {
            settings,
            links: vec![LinkView::default(); links],
            last_poll: None,
            grace_from: Duration::ZERO,
            verdict: Peer::Suspect,
        }
    }

    /// What each link shows.
    pub fn links(&self) -> &[LinkView] {
        &self.links
    }

    /// Whether a link is silent for longer than `lost_after`.
    pub fn link_lost(&self, link: usize, now: Duration) -> bool {
        self.links
            .get(link)
            .is_none_or(|l| self.silence(l, now) >= self.settings.lost_after)
    }

    /// A beat came. Old and repeated ones are not signs of life. A new session counts when its
    /// number differs: sessions are random, and beats are authenticated before they come here.
    pub fn beat(&mut self, link: usize, beat: Beat, now: Duration) {
        let Some(l) = self.links.get_mut(link) else {
            return;
        };
        if beat.session != l.session {
            *l = LinkView {
                session: beat.session,
                rtt_us: l.rtt_us,
                ..LinkView::default()
            };
        } else if beat.seq <= l.seq && l.received > 0 {
            return;
        } else {
            l.missed = l
                .missed
                .saturating_add(beat.seq.saturating_sub(l.seq).saturating_sub(1));
        }
        l.seq = beat.seq;
        l.received += 1;
        l.heard = Some(now);
        if let Some(rtt) = beat.rtt {
            let us = u64::try_from(rtt.as_micros())
                .unwrap_or(u64::MAX)
                .min(60_000_000);
            l.rtt_us = Some(l.rtt_us.map_or(us, |old| (old * 7 + us) / 8));
        }
    }

    /// The verdict at `now`, and whether it is new. Call it at [`Detector::next_deadline`], and
    /// after the beats that wait in the sockets were read.
    pub fn poll(&mut self, now: Duration) -> (Peer, bool) {
        let late = match self.last_poll {
            // Polled at least every interval by contract; beyond three we were not run.
            Some(last) => now.saturating_sub(last) > self.settings.interval * 3,
            None => true,
        };
        if late {
            self.grace_from = now;
        }
        self.last_poll = Some(now);
        let silence = self.links.iter().map(|l| self.silence(l, now)).min();
        let verdict = match silence {
            None => Peer::Lost,
            Some(s) if s >= self.settings.lost_after => Peer::Lost,
            Some(s) if s >= self.settings.suspect_after => Peer::Suspect,
            // After a stall of our own, nothing was heard yet: not alive, not lost.
            Some(_) if !self.heard_since_grace(now) => match self.verdict {
                Peer::Lost => Peer::Lost,
                v => v,
            },
            Some(_) => Peer::Alive,
        };
        let new = verdict != self.verdict;
        self.verdict = verdict;
        (verdict, new)
    }

    /// When to poll next, at the latest.
    pub fn next_deadline(&self) -> Duration {
        self.last_poll.unwrap_or_default() + self.settings.interval
    }

    fn heard_since_grace(&self, now: Duration) -> bool {
        self.links.iter().any(|l| {
            l.heard
                .is_some_and(|h| now.saturating_sub(h) < self.settings.suspect_after)
        })
    }

    fn silence(&self, l: &LinkView, now: Duration) -> Duration {
        let from = l.heard.unwrap_or_default().max(self.grace_from);
        now.saturating_sub(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn beat(seq: u64) -> Beat {
        Beat {
            session: 7,
            seq,
            rtt: None,
        }
    }

    /// Runs from..to in steps of 10 ms, with beats on the links given, and returns each change.
    fn run(d: &mut Detector, from: u64, to: u64, links: &[usize]) -> Vec<(u64, Peer)> {
        let mut out = vec![];
        for t in (from..to).step_by(10) {
            for l in links {
                d.beat(*l, beat(t), MS(t));
            }
            if let (p, true) = d.poll(MS(t)) {
                out.push((t, p));
            }
        }
        out
    }

    /// One living link is enough; all silent is lost within 150 ms.
    #[test]
    fn all_links_must_fall_silent() {
        let mut d = Detector::new(DetectorSettings::default(), 2);
        assert_eq!(run(&mut d, 1000, 2000, &[0, 1]), [(1000, Peer::Alive)]);
        assert_eq!(run(&mut d, 2000, 3000, &[1]), []);
        assert!(d.link_lost(0, MS(3000)) && !d.link_lost(1, MS(3000)));
        let seen = run(&mut d, 3000, 4000, &[]);
        assert_eq!(seen, [(3060, Peer::Suspect), (3130, Peer::Lost)]);
        assert_eq!(run(&mut d, 4000, 4100, &[0]), [(4000, Peer::Alive)]);
    }

    /// A stalled daemon must not take its own sleep for the peer's death.
    #[test]
    fn own_stall_gives_time_back() {
        let mut d = Detector::new(DetectorSettings::default(), 1);
        run(&mut d, 1000, 2000, &[0]);
        assert_eq!(d.poll(MS(7000)), (Peer::Alive, false));
        assert_eq!(
            run(&mut d, 7010, 7200, &[])[..],
            [(7070, Peer::Suspect), (7140, Peer::Lost)]
        );
    }

    /// Replayed or old beats prove nothing.
    #[test]
    fn repeats_are_not_signs_of_life() {
        let mut d = Detector::new(DetectorSettings::default(), 1);
        run(&mut d, 1000, 1200, &[0]);
        for t in (1200..1400).step_by(10) {
            d.beat(0, beat(1190), MS(t));
            d.poll(MS(t));
        }
        assert_eq!(d.poll(MS(1400)).0, Peer::Lost);
        // A new session starts from any number.
        d.beat(
            0,
            Beat {
                session: 8,
                seq: 1,
                rtt: Some(MS(1)),
            },
            MS(1410),
        );
        assert_eq!(d.poll(MS(1410)), (Peer::Alive, true));
        assert_eq!(d.links()[0].rtt_us, Some(1000));
    }

    /// A peer that was never heard is lost after the usual time, not at once.
    #[test]
    fn silence_from_the_start() {
        let mut d = Detector::new(DetectorSettings::default(), 2);
        assert_eq!(d.poll(MS(10_000)), (Peer::Suspect, false));
        assert_eq!(run(&mut d, 10_010, 10_300, &[]), [(10_140, Peer::Lost)]);
    }
}
