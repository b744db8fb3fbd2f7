//! Frames as they come in over several links: put in order, repeats dropped, bounded.

use crate::hello::Position;
use crate::raw::{HEADER_BYTES, MAX_PAYLOAD_BYTES, RawFrame};
use std::collections::{BTreeMap, VecDeque};

/// The sender does not keep to the window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiverBroken {
    /// More than was agreed.
    #[error("the peer sent {held} bytes ahead, the window is {window}")]
    Overrun {
        /// Bytes held.
        held: usize,
        /// The window.
        window: usize,
    },
    /// A stream frame without a number.
    #[error("the peer sent a frame of kind {0:#04x} without a number")]
    NoNumber(u8),
}

/// Puts frames in order.
#[derive(Debug)]
pub struct Reorder {
    ahead: BTreeMap<u64, RawFrame>,
    ready: VecDeque<RawFrame>,
    position: Position,
    bytes: usize,
    window_bytes: usize,
    repeats: u64,
}

impl Reorder {
    /// Holds at most `window_bytes` and one frame.
    pub fn new(window_bytes: usize) -> Self {
        Reorder {
            ahead: BTreeMap::new(),
            ready: VecDeque::new(),
            position: Position::default(),
            bytes: 0,
            window_bytes,
            repeats: 0,
        }
    }

    /// Takes a frame from any link. True when frames became ready.
    pub fn push(&mut self, frame: RawFrame) -> Result<bool, ReceiverBroken> {
        let seq = frame.header.seq;
        if seq == 0 {
            return Err(ReceiverBroken::NoNumber(frame.header.kind));
        }
        if seq <= self.position.received || self.ahead.contains_key(&seq) {
            self.repeats += 1;
            return Ok(false);
        }
        self.bytes += HEADER_BYTES + frame.payload.len();
        if self.bytes
            > self
                .window_bytes
                .saturating_add(HEADER_BYTES + MAX_PAYLOAD_BYTES)
        {
            return Err(ReceiverBroken::Overrun {
                held: self.bytes,
                window: self.window_bytes,
            });
        }
        if seq != self.position.received + 1 {
            self.ahead.insert(seq, frame);
            return Ok(false);
        }
        self.ready.push_back(frame);
        self.position.received = seq;
        while let Some(next) = self.ahead.remove(&(self.position.received + 1)) {
            self.ready.push_back(next);
            self.position.received += 1;
        }
        Ok(true)
    }

    /// The next frame in order, for its consumer.
    pub fn pop(&mut self) -> Option<RawFrame> {
        let frame = self.ready.pop_front()?;
        self.bytes -= HEADER_BYTES + frame.payload.len();
        self.position.consumed += 1;
        Some(frame)
    }

    /// How far it came.
    pub fn position(&self) -> Position {
        self.position
    }
    /// Frames that came more than once.
    pub fn repeats(&self) -> u64 {
        self.repeats
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
