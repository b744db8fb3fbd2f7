//! What the client has sent and seen: pure book-keeping.

use crate::proto::{Answer, Verdict};
use serde::{Deserialize, Serialize};

/// Gaps at least this long are listed one by one, milliseconds.
pub const LISTED_GAP_MS: f64 = 50.0;
/// Gaps and failures listed at most.
const MAX_LISTED: usize = 1000;
/// Answers kept for the proof; after that the run counts as failed.
const MAX_ANSWERS: usize = 16_000_000;

/// A stretch of time without an answer on any connection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// When it began, milliseconds after the client's start.
    pub at_ms: f64,
    /// How long it was, milliseconds.
    pub ms: f64,
}

/// Follows one row of events and finds its gaps.
#[derive(Debug, Clone, Default)]
pub struct Gaps {
    last_ms: Option<f64>,
    since_mark: Option<Gap>,
    ever: Option<Gap>,
    listed: Vec<Gap>,
}

impl Gaps {
    /// Something came at this time.
    pub fn event(&mut self, now_ms: f64) {
        if let Some(at_ms) = self.last_ms {
            let gap = Gap {
                at_ms,
                ms: now_ms - at_ms,
            };
            let larger = |g: &Option<Gap>| g.is_none_or(|g| gap.ms > g.ms);
            if larger(&self.since_mark) {
                self.since_mark = Some(gap);
            }
            if larger(&self.ever) {
                self.ever = Some(gap);
            }
            if gap.ms >= LISTED_GAP_MS && self.listed.len() < MAX_LISTED {
                self.listed.push(gap);
            }
        }
        self.last_ms = Some(now_ms);
    }

    /// From now on [`Gaps::since_mark`] counts anew; a gap that is open counts from its start.
    pub fn mark(&mut self) {
        self.since_mark = None;
    }

    /// The largest since the mark, one that is still open included.
    pub fn since_mark(&self, now_ms: f64) -> Gap {
        self.with_open(self.since_mark, now_ms)
    }

    /// The largest of all, one that is still open included.
    pub fn ever(&self, now_ms: f64) -> Gap {
        self.with_open(self.ever, now_ms)
    }

    fn with_open(&self, closed: Option<Gap>, now_ms: f64) -> Gap {
        let at_ms = self.last_ms.unwrap_or(0.0);
        let open = Gap {
            at_ms,
            ms: now_ms - at_ms,
        };
        closed.filter(|c| c.ms >= open.ms).unwrap_or(open)
    }

    /// Those of [`LISTED_GAP_MS`] and more.
    pub fn listed(&self) -> &[Gap] {
        &self.listed
    }
}

/// One answer as the proof needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noted {
    /// The answer.
    pub answer: Answer,
    /// The length of the request's payload.
    pub payload_len: u32,
}

/// One connection's book.
#[derive(Debug, Clone, Default)]
pub struct Conn {
    /// Its number in the guest's books.
    pub id: u64,
    /// Requests sent.
    pub sent: u64,
    /// Answers to requests not answered before.
    pub answers: u64,
    /// Answers that came again.
    pub repeated: u64,
    /// Answers that came before an earlier one's.
    pub out_of_order: u64,
    /// Running hash of all answers.
    pub chain: u64,
    /// Counter and stamp of the last answer.
    pub last: (u64, u64),
    /// Why it broke, if it did.
    pub failure: Option<String>,
    /// Its gaps.
    pub gaps: Gaps,
}

/// The whole book.
#[derive(Debug, Default)]
pub struct Ledger {
    /// The connections.
    pub conns: Vec<Conn>,
    /// All answers in the order in which they came.
    pub answers: Vec<Noted>,
    /// Answers not kept any more: the proof is not complete.
    pub not_kept: u64,
    /// Answers in which the guest says that it does not know what it had answered before.
    pub unknown_history: u64,
    /// Answers without a record because the disk failed.
    pub disk_errors: u64,
    /// Counters that went backwards on one connection.
    pub backwards: u64,
    /// Gaps between answers of any connection.
    pub gaps: Gaps,
    /// Replies of the echo probe.
    pub probe: Probe,
}

/// The echo probe's book.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    /// Datagrams sent.
    pub sent: u64,
    /// Replies.
    pub received: u64,
    /// Gaps between replies.
    pub gaps: Gaps,
}

impl Ledger {
    /// An empty book for connections of these numbers.
    pub fn new(ids: impl Iterator<Item = u64>) -> Ledger {
        Ledger {
            conns: ids
                .map(|id| Conn {
                    id,
                    ..Conn::default()
                })
                .collect(),
            ..Ledger::default()
        }
    }

    /// An answer came on connection `index`. Says why it cannot belong there, where it cannot.
    pub fn answer(&mut self, index: usize, noted: Noted, now_ms: f64) -> Result<(), String> {
        let a = noted.answer;
        let conn = &mut self.conns[index];
        if a.conn != conn.id || a.number > conn.sent || a.number == 0 {
            return Err(format!(
                "an answer to request {} of connection {} came",
                a.number, a.conn
            ));
        }
        // One connection's requests are answered in turn.
        let expected = conn.answers + 1;
        if a.number < expected {
            conn.repeated += 1;
        } else {
            conn.out_of_order += u64::from(a.number > expected);
            conn.answers += 1;
        }
        if a.counter <= conn.last.0 {
            self.backwards += 1;
        }
        conn.last = (a.counter, a.stamp_ns);
        conn.chain = a.chain(conn.chain);
        conn.gaps.event(now_ms);
        self.gaps.event(now_ms);
        match a.verdict {
            Verdict::UnknownHistory => self.unknown_history += 1,
            Verdict::DiskError => self.disk_errors += 1,
            Verdict::Ok | Verdict::BadRequest => {}
        }
        if self.answers.len() < MAX_ANSWERS {
            self.answers.push(noted);
        } else {
            self.not_kept += 1;
        }
        Ok(())
    }

    /// Requests that were sent and not answered.
    pub fn outstanding(&self) -> u64 {
        self.conns.iter().map(|c| c.sent - c.answers).sum()
    }

    /// The broken connections.
    pub fn failures(&self) -> Vec<String> {
        let broken = self
            .conns
            .iter()
            .filter_map(|c| Some((c.id, c.failure.as_ref()?)));
        broken
            .map(|(id, why)| format!("connection {id:#x}: {why}"))
            .collect()
    }

    /// Marks all gaps.
    pub fn mark(&mut self) {
        self.gaps.mark();
        self.probe.gaps.mark();
        self.conns.iter_mut().for_each(|c| c.gaps.mark());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Kind;

    fn noted(conn: u64, number: u64, counter: u64) -> Noted {
        let answer = Answer {
            kind: Kind::Testify,
            verdict: Verdict::Ok,
            conn,
            number,
            counter,
            record: counter,
            stamp_ns: counter * 10,
            boot: 1,
            payload_len: 0,
            payload_crc: 0,
        };
        Noted {
            answer,
            payload_len: 0,
        }
    }

    fn book() -> Ledger {
        let mut book = Ledger::new([7, 8].into_iter());
        book.conns.iter_mut().for_each(|c| c.sent = 5);
        book
    }

    /// What must never pass unseen: lost, repeated, reordered, foreign, backwards.
    #[test]
    fn each_kind_of_wrong_answer_is_counted() {
        let mut book = book();
        for (number, counter) in [(1, 1), (2, 3)] {
            book.answer(0, noted(7, number, counter), 1.0).unwrap();
        }
        assert_eq!(book.outstanding(), 8);
        book.answer(0, noted(7, 2, 4), 2.0).unwrap();
        assert_eq!((book.conns[0].repeated, book.conns[0].answers), (1, 2));
        book.answer(0, noted(7, 4, 5), 2.0).unwrap();
        assert_eq!(book.conns[0].out_of_order, 1);
        book.answer(0, noted(7, 5, 2), 2.0).unwrap();
        assert_eq!(book.backwards, 1);
        assert!(
            book.answer(1, noted(7, 1, 9), 3.0).is_err(),
            "of another connection"
        );
        assert!(book.answer(1, noted(8, 6, 9), 3.0).is_err(), "never asked");
    }

    /// The largest gap is over all connections, and one that has not ended counts too.
    #[test]
    fn gaps_are_found_also_while_they_last() {
        let mut book = book();
        book.answer(0, noted(7, 1, 1), 100.0).unwrap();
        book.answer(1, noted(8, 1, 2), 130.0).unwrap();
        book.answer(0, noted(7, 2, 3), 210.0).unwrap();
        assert_eq!(
            book.gaps.ever(215.0),
            Gap {
                at_ms: 130.0,
                ms: 80.0
            }
        );
        assert_eq!(book.conns[0].gaps.ever(215.0).ms, 110.0);
        assert_eq!(book.gaps.listed().len(), 1);
        book.mark();
        assert_eq!(book.gaps.since_mark(215.0).ms, 5.0);
        assert_eq!(book.gaps.since_mark(1215.0).ms, 1005.0);
        assert_eq!(book.gaps.ever(1215.0).ms, 1005.0);
    }
}
