//! What waits to be written to one connection.
//!
//! Notes beyond the bound push out the oldest: the engine repeats what it still needs, and an old
//! word helps nobody. Questions and answers beyond theirs are refused, and their asker is told.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// Notes that wait at most.
pub const MAX_NOTES: usize = 256;
/// Questions and answers that wait at most.
pub const MAX_BODIES: usize = 64;

/// Bytes of a frame, shared by the links that they go over.
pub type Frame = Arc<Vec<u8>>;

#[derive(Debug, Default)]
struct Waiting {
    notes: VecDeque<Frame>,
    bodies: VecDeque<Frame>,
}

/// The queue.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

impl Queue {
    /// Adds a note, and drops the oldest one where there are too many.
    pub fn note(&self, frame: Frame) {
        let mut w = self.lock();
        if w.notes.len() == MAX_NOTES {
            w.notes.pop_front();
        }
        w.notes.push_back(frame);
        drop(w);
        self.filled.notify_one();
    }

    /// Adds a question or an answer; `false` where too many wait.
    pub fn body(&self, frame: Frame) -> bool {
        let mut w = self.lock();
        if w.bodies.len() == MAX_BODIES {
            return false;
        }
        w.bodies.push_back(frame);
        drop(w);
        self.filled.notify_one();
        true
    }

    /// The next frame: notes first, they are small and urgent.
    pub async fn next(&self) -> Frame {
        loop {
            let filled = self.filled.notified();
            {
                let mut w = self.lock();
                if let Some(f) = w.notes.pop_front() {
                    return f;
                }
                if let Some(f) = w.bodies.pop_front() {
                    return f;
                }
            }
            filled.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_note_goes_and_bodies_are_refused_at_the_bound() {
        let q = Queue::default();
        for n in 0..MAX_NOTES + 10 {
            q.note(Arc::new(n.to_le_bytes().to_vec()));
        }
        for _ in 0..MAX_BODIES {
            assert!(q.body(Arc::new(vec![])));
        }
        assert!(!q.body(Arc::new(vec![])));
        assert_eq!(*q.next().await, 10usize.to_le_bytes());
        for _ in 1..MAX_NOTES {
            assert_eq!(q.next().await.len(), 8);
        }
        assert!(q.next().await.is_empty());
    }
}
