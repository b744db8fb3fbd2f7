//! The proof at the end: what the client was told, against what the guest knows and what its disk
//! holds.

use super::ledger::{Gap, Ledger, Noted};
use super::question::Question;
use crate::proto::{NO_RECORD, Record};
use crate::report::ConnSeen;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// What the run showed. [`Proof::perfect`] says whether all of it is as it must be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Connections opened at the start.
    pub connections_before: u64,
    /// Those that never broke.
    pub connections_kept: u64,
    /// Requests answered.
    pub answers: u64,
    /// Requests sent and never answered.
    pub answers_lost: u64,
    /// Answers that came more than once.
    pub answers_repeated: u64,
    /// Answers that came before an earlier one.
    pub out_of_order: u64,
    /// Answers that the guest does not know any more, counters that were used twice or went
    /// backwards: a history that was shown and taken back.
    pub taken_back: u64,
    /// Answered, but not on the guest's disk (or not as answered).
    pub records_lost: u64,
    /// Answered records compared with the disk.
    pub records_checked: u64,
    /// Answered records whose slot was used again since: the log is too small for the run.
    pub records_overwritten: u64,
    /// Writes of records that failed in the guest.
    pub disk_errors: u64,
    /// Memory pages that did not hold what they should.
    pub memory_errors: u64,
    /// The first of them.
    pub memory_first_error: Option<String>,
    /// Memory pages checked by the guest since its boot.
    pub memory_checked: u64,
    /// The largest gap between answers of any connection, milliseconds.
    pub max_gap_ms: f64,
    /// All of 50 ms and more.
    pub gaps_over_50_ms: Vec<Gap>,
    /// The largest gap on each connection.
    pub conn_max_gap_ms: Vec<f64>,
    /// The largest gap between replies of the echo probe.
    pub probe_max_gap_ms: f64,
    /// All of 50 ms and more.
    pub probe_gaps_over_50_ms: Vec<Gap>,
    /// Datagrams of the probe, and replies.
    pub probe_sent: u64,
    /// See [`Proof::probe_sent`].
    pub probe_received: u64,
    /// Broken connections, and why a part of the proof could not be made.
    pub failures: Vec<String>,
}

impl Proof {
    /// Nothing was lost, repeated, reordered or taken back, every record is on the disk, no
    /// connection broke, and all of that could be checked.
    pub fn perfect(&self) -> bool {
        self.answers > 0
            && self.connections_kept == self.connections_before
            && self.records_checked == self.answers
            && self.failures.is_empty()
            && [
                self.answers_lost,
                self.answers_repeated,
                self.out_of_order,
                self.taken_back,
                self.records_lost,
                self.records_overwritten,
                self.disk_errors,
                self.memory_errors,
            ] == [0; 8]
    }
}

/// Makes the proof. A guest that cannot be questioned is a failure in it.
pub fn prove(book: &Ledger, now_ms: f64, guest: IpAddr) -> Proof {
    let sum = |f: fn(&super::ledger::Conn) -> u64| book.conns.iter().map(f).sum::<u64>();
    let mut proof = Proof {
        connections_before: book.conns.len() as u64,
        connections_kept: book.conns.iter().filter(|c| c.failure.is_none()).count() as u64,
        answers: sum(|c| c.answers),
        answers_lost: book.outstanding(),
        answers_repeated: sum(|c| c.repeated),
        out_of_order: sum(|c| c.out_of_order),
        taken_back: book.unknown_history + book.backwards + used_twice(&book.answers),
        disk_errors: book.disk_errors,
        max_gap_ms: book.gaps.ever(now_ms).ms,
        gaps_over_50_ms: book.gaps.listed().to_vec(),
        conn_max_gap_ms: book.conns.iter().map(|c| c.gaps.ever(now_ms).ms).collect(),
        probe_max_gap_ms: book.probe.gaps.ever(now_ms).ms,
        probe_gaps_over_50_ms: book.probe.gaps.listed().to_vec(),
        probe_sent: book.probe.sent,
        probe_received: book.probe.received,
        failures: book.failures(),
        ..Proof::default()
    };
    if book.not_kept > 0 {
        proof
            .failures
            .push(format!("{} answers were too many to keep", book.not_kept));
    }
    if let Err(e) = question(book, guest, &mut proof) {
        proof.failures.push(format!("{e:#}"));
    }
    proof
}

fn question(book: &Ledger, guest: IpAddr, proof: &mut Proof) -> Result<()> {
    let mut guest = Question::connect(guest, Duration::from_secs(10))?;
    let seen = guest.seen(true)?;
    proof.memory_errors = seen.memory.errors;
    proof.memory_first_error = seen.memory.first_error;
    proof.memory_checked = seen.memory.checked;
    proof.taken_back += unknown_to_guest(book, &guest.conns()?);
    let Some(disk) = seen.disk else {
        proof.records_lost += book.answers.len() as u64;
        return Ok(());
    };
    proof.disk_errors = proof.disk_errors.max(disk.errors);
    let oldest = disk.next_seq.saturating_sub(disk.slots);
    let mut wanted: Vec<&Noted> = Vec::new();
    for noted in &book.answers {
        match noted.answer.record {
            NO_RECORD => proof.records_lost += 1,
            seq if seq < oldest => proof.records_overwritten += 1,
            _ => wanted.push(noted),
        }
    }
    wanted.sort_by_key(|n| n.answer.record);
    // One dump for a stretch of records, others' records in between included.
    for part in wanted.chunks(1000) {
        let (Some(first), Some(last)) = (part.first(), part.last()) else {
            continue;
        };
        let from = first.answer.record;
        let records = guest.records(from, last.answer.record - from + 1)?;
        for noted in part {
            let there = records
                .get((noted.answer.record - from) as usize)
                .copied()
                .flatten();
            proof.records_checked += 1;
            proof.records_lost += u64::from(there != Some(as_recorded(noted)));
        }
    }
    Ok(())
}

/// The record that must stand on the disk for an answer.
fn as_recorded(noted: &Noted) -> Record {
    let a = noted.answer;
    Record {
        seq: a.record,
        conn: a.conn,
        number: a.number,
        stamp_ns: a.stamp_ns,
        boot: a.boot,
        payload_crc: a.payload_crc,
        payload_len: noted.payload_len,
    }
}

/// Answers on the client's side that the guest's memory does not have.
fn unknown_to_guest(book: &Ledger, guest: &[ConnSeen]) -> u64 {
    let by_id: HashMap<u64, &ConnSeen> = guest.iter().map(|c| (c.conn, c)).collect();
    let missing = book.conns.iter().filter(|c| c.answers > 0).map(|mine| {
        match by_id.get(&mine.id) {
            None => mine.answers,
            Some(theirs) if theirs.answers < mine.answers => mine.answers - theirs.answers,
            // As many or more, but others: at least the last one is not what was said. More than
            // ours without a lost answer of ours cannot be compared.
            Some(theirs) => u64::from(theirs.answers == mine.answers && theirs.chain != mine.chain),
        }
    });
    missing.sum()
}

/// Counters that were used for two different answers.
fn used_twice(answers: &[Noted]) -> u64 {
    let mut keys: Vec<_> = answers
        .iter()
        .map(|n| {
            (
                n.answer.boot,
                n.answer.counter,
                n.answer.conn,
                n.answer.number,
                n.answer.stamp_ns,
            )
        })
        .collect();
    keys.sort_unstable();
    keys.dedup();
    keys.windows(2)
        .filter(|w| (w[0].0, w[0].1) == (w[1].0, w[1].1))
        .count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Answer, Kind, Verdict};

    fn noted(conn: u64, number: u64, counter: u64, stamp_ns: u64) -> Noted {
        let answer = Answer {
            kind: Kind::Testify,
            verdict: Verdict::Ok,
            conn,
            number,
            counter,
            record: counter,
            stamp_ns,
            boot: 1,
            payload_len: 0,
            payload_crc: 0,
        };
        Noted {
            answer,
            payload_len: 0,
        }
    }

    /// A guest set back in time uses its counters again, with other stamps.
    #[test]
    fn a_counter_used_twice_is_a_history_taken_back() {
        let mut answers = vec![noted(1, 1, 1, 10), noted(2, 1, 2, 20), noted(1, 2, 3, 30)];
        assert_eq!(used_twice(&answers), 0);
        answers.push(noted(1, 2, 3, 30)); // the same again is a repetition, counted elsewhere
        assert_eq!(used_twice(&answers), 0);
        answers.push(noted(2, 2, 3, 31));
        assert_eq!(used_twice(&answers), 1);
    }

    /// The guest's own memory of a connection must hold all that the client was told on it.
    #[test]
    fn an_answer_that_the_guest_does_not_know_is_taken_back() {
        let mut book = Ledger::new([1].into_iter());
        book.conns[0].sent = 2;
        let two = [noted(1, 1, 1, 10), noted(1, 2, 2, 20)];
        two.iter().for_each(|n| book.answer(0, *n, 0.0).unwrap());
        let seen = |answers, chain| {
            vec![ConnSeen {
                conn: 1,
                answers,
                number: answers,
                counter: 0,
                stamp_ns: 0,
                chain,
            }]
        };
        let chain = two[1].answer.chain(two[0].answer.chain(0));
        assert_eq!(unknown_to_guest(&book, &seen(2, chain)), 0);
        assert_eq!(unknown_to_guest(&book, &seen(2, chain ^ 1)), 1);
        assert_eq!(unknown_to_guest(&book, &seen(1, two[0].answer.chain(0))), 1);
        assert_eq!(unknown_to_guest(&book, &[]), 2);
    }

    /// Perfect means that everything was checked too: an empty run proves nothing.
    #[test]
    fn a_run_without_answers_is_not_perfect() {
        let good = Proof {
            connections_before: 4,
            connections_kept: 4,
            answers: 9,
            records_checked: 9,
            ..Proof::default()
        };
        assert!(good.perfect());
        assert!(!Proof::default().perfect());
        assert!(
            !Proof {
                records_checked: 8,
                ..good.clone()
            }
            .perfect()
        );
        assert!(
            !Proof {
                connections_kept: 3,
                ..good.clone()
            }
            .perfect()
        );
        assert!(
            !Proof {
                memory_errors: 1,
                ..good
            }
            .perfect()
        );
    }
}
