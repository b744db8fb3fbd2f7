//! Frames on their way out: numbered, kept until received, shared out over the links.
//!
//! [`StripeSender`] (primary to standby) gives each frame to one link; [`Repeater`] (back) gives
//! each to every link. Both keep what the other side has not received, and give it to another link
//! when one dies. Neither knows a socket or a clock: the caller asks [`StripeSender::next`] when a
//! link can take something.
//!
//! ```text
//!   queued ──next(link)──> in flight on a link ──position.received──> (content freed) ──position.consumed──> gone
//!     ^                        │  link down
//!     └────────────────────────┘  (or late while another link has nothing to do: sent there as well)
//! ```

use crate::hello::Position;
use crate::raw::Encoded;
use std::collections::{BTreeSet, VecDeque};

/// A link of the pair, from 0.
pub type LinkIndex = usize;

/// Late frames looked at when a link has nothing else to do.
const LATE_SCAN: usize = 256;

/// The stream cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SenderBroken {
    /// The peer claims what was never sent.
    #[error("the peer received frame {received}, but {sent} is the last that was sent")]
    FromTheFuture {
        /// Its claim.
        received: u64,
        /// The truth.
        sent: u64,
    },
    /// The peer is not the one that took the stream on.
    #[error("the peer lost what it had received of this stream (its replicator was restarted)")]
    PeerForgot,
}

/// A frame to be written now.
#[derive(Debug, Clone)]
pub struct Outbound {
    /// Its number.
    pub seq: u64,
    /// The frame.
    pub frame: Encoded,
    /// It was given to a link before.
    pub again: bool,
}

#[derive(Debug)]
struct Slot {
    frame: Option<Encoded>,
    bytes: usize,
    on: LinkIndex,
    sent_at_us: u64,
    sent: bool,
    again: bool,
}

/// Sends each frame over one link.
#[derive(Debug)]
pub struct StripeSender {
    /// Of `first_seq ..`: all that is not consumed.
    slots: VecDeque<Slot>,
    first_seq: u64,
    /// All below were received.
    first_unreceived: u64,
    /// All below were given to some link.
    first_unsent: u64,
    again: BTreeSet<u64>,
    session: Option<[u8; 16]>,
    /// Bytes of all that is not consumed.
    bytes: usize,
    window_bytes: usize,
    late_us: u64,
    /// When the peer's position advanced last.
    progress_us: u64,
    /// Usual time from sending a frame to hearing that it was received (mean, weight 1/8).
    usual_us: u64,
}

impl StripeSender {
    /// Holds at most `window_bytes`; a frame that is not received after `late_us` is also sent
    /// over a link that has nothing else to do.
    pub fn new(window_bytes: usize, late_us: u64) -> Self {
        StripeSender {
            slots: VecDeque::new(),
            first_seq: 1,
            first_unreceived: 1,
            first_unsent: 1,
            again: BTreeSet::new(),
            session: None,
            bytes: 0,
            window_bytes,
            late_us,
            progress_us: 0,
            usual_us: 0,
        }
    }

    /// A frame of `bytes` may be pushed now. One always may when there is none.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.slots.is_empty() || self.bytes.saturating_add(bytes) <= self.window_bytes
    }
    /// The window from now on: the smaller of both sides' bounds, once the peer told its own.
    pub fn set_window(&mut self, bytes: usize) {
        self.window_bytes = bytes;
    }
    /// A link with nothing else to do would get something now.
    pub fn has_next(&self, link: LinkIndex, now_us: u64) -> bool {
        self.first_unsent < self.next_seq()
            || !self.again.is_empty()
            || self.late(now_us, link).is_some()
    }
    /// Bytes that are not consumed yet.
    pub fn held_bytes(&self) -> usize {
        self.bytes
    }
    /// All that was pushed is received.
    pub fn is_received(&self) -> bool {
        self.first_unreceived == self.next_seq()
    }
    fn next_seq(&self) -> u64 {
        self.first_seq + self.slots.len() as u64
    }

    /// Queues a frame; its number.
    pub fn push(&mut self, frame: Encoded) -> u64 {
        let seq = self.next_seq();
        let bytes = frame.wire_bytes();
        self.bytes += bytes;
        self.slots.push_back(Slot {
            frame: Some(frame),
            bytes,
            on: 0,
            sent_at_us: 0,
            sent: false,
            again: false,
        });
        seq
    }

    /// The frame that `link` should send now.
    pub fn next(&mut self, link: LinkIndex, now_us: u64) -> Option<Outbound> {
        while let Some(seq) = self.again.pop_first() {
            if seq >= self.first_unreceived {
                return self.give(seq, link, now_us);
            }
        }
        if self.first_unsent < self.next_seq() {
            self.first_unsent += 1;
            return self.give(self.first_unsent - 1, link, now_us);
        }
        let late = self.late(now_us, link)?;
        // What else that link holds is late as well, or will be.
        let stuck = self.slots.get((late - self.first_seq) as usize)?.on;
        let with_it = self
            .in_flight()
            .filter(|(seq, s)| *seq > late && s.on == stuck);
        let with_it: Vec<u64> = with_it.map(|(seq, _)| seq).collect();
        self.again.extend(with_it);
        self.give(late, link, now_us)
    }

    /// When [`StripeSender::next`] may have a late frame for a link with nothing to do; none when
    /// all is received or waiting for a link anyway.
    pub fn late_at_us(&self) -> Option<u64> {
        self.in_flight().map(|(_, s)| self.late_from(s)).min()
    }

    /// Frames are late when the peer's position stands still as well, for longer than is usual (up
    /// to ten times `late_us`): a busy receiver is not a dead link.
    fn late_from(&self, slot: &Slot) -> u64 {
        let most = self.late_us.saturating_mul(10);
        let patience = self.late_us.max(self.usual_us.saturating_mul(4)).min(most);
        slot.sent_at_us
            .max(self.progress_us)
            .saturating_add(patience)
    }

    fn in_flight(&self) -> impl Iterator<Item = (u64, &Slot)> {
        let skip = (self.first_unreceived - self.first_seq) as usize;
        let first = self.first_unreceived;
        let end = (self.first_unsent - self.first_seq) as usize;
        self.slots
            .range(skip.min(end)..end)
            .take(LATE_SCAN)
            .enumerate()
            .map(move |(i, s)| (first + i as u64, s))
            .filter(|(seq, _)| !self.again.contains(seq))
    }

    /// The first late frame that another link than `link` carries.
    fn late(&self, now_us: u64, link: LinkIndex) -> Option<u64> {
        let mut late = self
            .in_flight()
            .filter(|(_, s)| now_us >= self.late_from(s));
        late.find(|(_, s)| s.on != link).map(|(seq, _)| seq)
    }

    fn give(&mut self, seq: u64, link: LinkIndex, now_us: u64) -> Option<Outbound> {
        let slot = self
            .slots
            .get_mut(seq.checked_sub(self.first_seq)? as usize)?;
        let again = std::mem::replace(&mut slot.sent, true);
        slot.again |= again;
        slot.on = link;
        slot.sent_at_us = now_us;
        Some(Outbound {
            seq,
            frame: slot.frame.clone()?,
            again,
        })
    }

    /// A link was welcomed by the peer's `session`, which stands at `position`.
    pub fn link_up(
        &mut self,
        session: [u8; 16],
        position: Position,
        now_us: u64,
    ) -> Result<(), SenderBroken> {
        if *self.session.get_or_insert(session) != session {
            return Err(SenderBroken::PeerForgot);
        }
        self.on_position(position, now_us).map(drop)
    }

    /// A link died: what it carried goes over the others, or over itself when it is back.
    pub fn link_down(&mut self, link: LinkIndex) {
        let lost = (self.first_unreceived..self.first_unsent).filter(|seq| {
            let slot = (seq - self.first_seq) as usize;
            self.slots
                .get(slot)
                .is_some_and(|s| s.sent && s.on == link && s.frame.is_some())
        });
        let lost: Vec<u64> = lost.collect();
        self.again.extend(lost);
    }

    /// The peer told its position over any link. True where that freed room.
    pub fn on_position(&mut self, position: Position, now_us: u64) -> Result<bool, SenderBroken> {
        if position.received >= self.first_unsent {
            let sent = self.first_unsent - 1;
            return Err(SenderBroken::FromTheFuture {
                received: position.received,
                sent,
            });
        }
        if self.first_unreceived <= position.received {
            self.progress_us = now_us;
        }
        while self.first_unreceived <= position.received {
            let slot = (self.first_unreceived - self.first_seq) as usize;
            if let Some(s) = self.slots.get_mut(slot) {
                s.frame = None;
                // One that was sent twice says nothing about either way.
                if !s.again {
                    let took = now_us.saturating_sub(s.sent_at_us);
                    self.usual_us = self.usual_us - self.usual_us / 8 + took / 8;
                }
            }
            self.first_unreceived += 1;
        }
        let mut freed = false;
        while self.first_seq <= position.consumed.min(position.received) {
            match self.slots.pop_front() {
                Some(s) => self.bytes -= s.bytes,
                None => break,
            }
            self.first_seq += 1;
            freed = true;
        }
        Ok(freed)
    }
}

/// Sends each frame over every link: for few small frames that should not wait for a late link.
#[derive(Debug)]
pub struct Repeater {
    frames: VecDeque<Encoded>,
    first_seq: u64,
    /// Per link: the next to send there.
    cursors: Vec<u64>,
    bytes: usize,
    limit_bytes: usize,
}

/// Too much waits for the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{held} bytes wait for the peer already, at most {limit} may")]
pub struct Full {
    /// Bytes held.
    pub held: usize,
    /// The bound.
    pub limit: usize,
}

impl Repeater {
    /// For `links` links; holds at most `limit_bytes`.
    pub fn new(links: usize, limit_bytes: usize) -> Self {
        Repeater {
            frames: VecDeque::new(),
            first_seq: 1,
            cursors: vec![1; links],
            bytes: 0,
            limit_bytes,
        }
    }

    /// Queues a frame; its number.
    pub fn push(&mut self, frame: Encoded) -> Result<u64, Full> {
        let bytes = frame.wire_bytes();
        if !self.frames.is_empty() && self.bytes + bytes > self.limit_bytes {
            return Err(Full {
                held: self.bytes,
                limit: self.limit_bytes,
            });
        }
        self.bytes += bytes;
        self.frames.push_back(frame);
        Ok(self.first_seq + self.frames.len() as u64 - 1)
    }

    /// [`Repeater::next`] has something for `link`.
    pub fn has_next(&self, link: LinkIndex) -> bool {
        let end = self.first_seq + self.frames.len() as u64;
        self.cursors.get(link).is_some_and(|c| *c < end)
    }

    /// The frame that `link` should send now.
    pub fn next(&mut self, link: LinkIndex) -> Option<Outbound> {
        let cursor = self.cursors.get_mut(link)?;
        *cursor = (*cursor).max(self.first_seq);
        let seq = *cursor;
        let frame = self.frames.get((seq - self.first_seq) as usize)?.clone();
        *cursor += 1;
        Some(Outbound {
            seq,
            frame,
            again: false,
        })
    }

    /// A link is up; the peer stands at `position`.
    pub fn link_up(&mut self, link: LinkIndex, position: Position) -> Result<(), SenderBroken> {
        self.on_position(position)?;
        if let Some(cursor) = self.cursors.get_mut(link) {
            *cursor = self.first_seq;
        }
        Ok(())
    }

    /// The peer told its position over any link.
    pub fn on_position(&mut self, position: Position) -> Result<(), SenderBroken> {
        let sent = self.first_seq + self.frames.len() as u64 - 1;
        if position.received > sent {
            return Err(SenderBroken::FromTheFuture {
                received: position.received,
                sent,
            });
        }
        while self.first_seq <= position.received {
            if let Some(f) = self.frames.pop_front() {
                self.bytes -= f.wire_bytes();
            }
            self.first_seq += 1;
        }
        Ok(())
    }
}
