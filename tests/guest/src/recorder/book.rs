//! What frames say: pure book-keeping.

use crate::proto::{Answer, HEADER_BYTES, Kind, PORT};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::net::Ipv4Addr;

/// Answers and segments remembered at most; beyond, the record says that it is not complete.
const MAX_REMEMBERED: usize = 8_000_000;
/// Conflicts and runs listed at most.
const MAX_LISTED: usize = 1000;

/// A stretch of time in which a guest's frames came from one interface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// The interface.
    pub interface: String,
    /// First and last frame, milliseconds after the recorder's start.
    pub first_ms: f64,
    /// See [`Run::first_ms`].
    pub last_ms: f64,
    /// Counters of the first and last answer in it; 0 where there was none.
    pub first_counter: u64,
    /// See [`Run::first_counter`].
    pub last_counter: u64,
    /// Frames.
    pub frames: u64,
}

/// Two frames that contradict each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Conflict {
    /// When the second was seen.
    pub at_ms: f64,
    /// In words.
    pub what: String,
}

/// What was recorded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// Frames that came from testifying guests (TCP from their port).
    pub guest_frames: u64,
    /// Answers seen for the first time.
    pub answers: u64,
    /// Answers seen again, the same: retransmissions.
    pub answers_again: u64,
    /// Answers that came after one with a higher counter: losses and reordering, no contradiction.
    pub answers_late: u64,
    /// One counter with two different answers: output was seen that was taken back afterwards.
    pub answer_conflicts: u64,
    /// The same stretch of a TCP stream with two contents: the same, seen by TCP.
    pub segment_conflicts: u64,
    /// The first conflicts.
    pub conflicts: Vec<Conflict>,
    /// Which interface spoke for each guest, in turn. More than one run at a time means two hosts.
    pub runs: Vec<Run>,
    /// Frames that the kernel dropped before they were looked at, and what was not remembered: where
    /// not 0, the rest is a lower bound.
    pub missed: u64,
}

impl Recorded {
    /// Frames that must never have been seen.
    pub fn uncommitted_frames_seen(&self) -> u64 {
        self.answer_conflicts + self.segment_conflicts
    }
}

/// A TCP flow from a guest.
type Flow = (Ipv4Addr, Ipv4Addr, u16);

/// The book.
#[derive(Default)]
pub struct Book {
    recorded: Recorded,
    answers: HashMap<(Ipv4Addr, u32, u64), [u8; HEADER_BYTES]>,
    highest: HashMap<(Ipv4Addr, u32), u64>,
    /// Hash of what was seen at a sequence number.
    segments: HashMap<(Flow, u32, u16), u64>,
    /// The run that each guest is in.
    current: HashMap<Ipv4Addr, usize>,
}

/// A TCP segment from a testifying guest.
struct Segment<'a> {
    flow: Flow,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

fn parse(frame: &[u8]) -> Option<Segment<'_>> {
    let be16 = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let address = |at: usize| {
        let b = frame.get(at..at + 4)?;
        Some(Ipv4Addr::new(b[0], b[1], b[2], b[3]))
    };
    const IP: usize = 14;
    if be16(12)? != 0x0800 || *frame.get(IP + 9)? != 6 {
        return None;
    }
    let ip_header = usize::from(frame.get(IP)? & 0x0f) * 4;
    let total = usize::from(be16(IP + 2)?);
    let tcp = IP + ip_header;
    if be16(tcp)? != PORT {
        return None;
    }
    let data = tcp + usize::from(frame.get(tcp + 12)? >> 4) * 4;
    // A frame may be padded; a segment that the NIC is still to cut may say a length of 0.
    let end = if total == 0 {
        frame.len()
    } else {
        (IP + total).min(frame.len())
    };
    let sequence = u32::from_be_bytes(frame.get(tcp + 4..tcp + 8)?.try_into().ok()?);
    Some(Segment {
        flow: (address(IP + 12)?, address(IP + 16)?, be16(tcp + 2)?),
        sequence,
        syn: frame.get(tcp + 13)? & 2 != 0,
        payload: frame.get(data..end)?,
    })
}

impl Book {
    /// What was recorded so far.
    pub fn recorded(&self) -> &Recorded {
        &self.recorded
    }

    /// Frames were lost before they could be looked at.
    pub fn missed(&mut self, frames: u64) {
        self.recorded.missed += frames;
    }

    /// A frame came in on an interface.
    pub fn frame(&mut self, interface: &str, now_ms: f64, frame: &[u8]) {
        let Some(segment) = parse(frame) else { return };
        self.recorded.guest_frames += 1;
        let guest = segment.flow.0;
        let run = self.run(guest, interface, now_ms);
        if segment.syn {
            // A new connection may use the port of an old one.
            self.segments.retain(|(flow, ..), _| *flow != segment.flow);
            return;
        }
        if segment.payload.is_empty() {
            return;
        }
        self.segment(&segment, now_ms);
        for chunk in segment.payload.chunks_exact(HEADER_BYTES) {
            let mut head = [0; HEADER_BYTES];
            head.copy_from_slice(chunk);
            // Anything else is (part of) the body of an answer to a question.
            let Ok(answer) = Answer::decode(&head) else {
                break;
            };
            if answer.kind != Kind::Testify {
                break;
            }
            self.answer(guest, &answer, &head, now_ms);
            if let Some(run) = run.and_then(|r| self.recorded.runs.get_mut(r)) {
                if run.first_counter == 0 {
                    run.first_counter = answer.counter;
                }
                run.last_counter = answer.counter;
            }
        }
    }

    fn run(&mut self, guest: Ipv4Addr, interface: &str, now_ms: f64) -> Option<usize> {
        if let Some(&i) = self.current.get(&guest)
            && let Some(run) = self.recorded.runs.get_mut(i)
            && run.interface == interface
        {
            run.last_ms = now_ms;
            run.frames += 1;
            return Some(i);
        }
        if self.recorded.runs.len() >= MAX_LISTED {
            self.recorded.missed += 1;
            return None;
        }
        self.recorded.runs.push(Run {
            guest,
            interface: interface.to_owned(),
            first_ms: now_ms,
            last_ms: now_ms,
            first_counter: 0,
            last_counter: 0,
            frames: 1,
        });
        let i = self.recorded.runs.len() - 1;
        self.current.insert(guest, i);
        Some(i)
    }

    fn answer(&mut self, guest: Ipv4Addr, a: &Answer, head: &[u8; HEADER_BYTES], now_ms: f64) {
        match self.answers.get(&(guest, a.boot, a.counter)) {
            Some(before) if before == head => self.recorded.answers_again += 1,
            Some(before) => {
                self.recorded.answer_conflicts += 1;
                let before = Answer::decode(before);
                self.conflict(now_ms, format!("{guest} first said {before:?}, then {a:?}"));
            }
            None => {
                self.recorded.answers += 1;
                let highest = self.highest.entry((guest, a.boot)).or_default();
                if a.counter < *highest {
                    self.recorded.answers_late += 1;
                }
                *highest = a.counter.max(*highest);
                if self.answers.len() < MAX_REMEMBERED {
                    self.answers.insert((guest, a.boot, a.counter), *head);
                } else {
                    self.recorded.missed += 1;
                }
            }
        }
    }

    fn segment(&mut self, s: &Segment<'_>, now_ms: f64) {
        // Not a CRC: an answer ends with its own, which makes the CRC of every answer the same.
        let mut hasher = DefaultHasher::new();
        hasher.write(s.payload);
        let hash = hasher.finish();
        // Segments of a retransmission may be cut otherwise: only equal stretches are compared.
        let len = s.payload.len().min(usize::from(u16::MAX)) as u16;
        let key = (s.flow, s.sequence, len);
        match self.segments.get(&key) {
            Some(before) if *before != hash => {
                self.recorded.segment_conflicts += 1;
                let what = format!(
                    "{} bytes at {} of {:?} differ",
                    s.payload.len(),
                    s.sequence,
                    s.flow
                );
                self.conflict(now_ms, what);
            }
            Some(_) => {}
            None if self.segments.len() < MAX_REMEMBERED => {
                self.segments.insert(key, hash);
            }
            None => self.recorded.missed += 1,
        }
    }

    fn conflict(&mut self, at_ms: f64, what: String) {
        if self.recorded.conflicts.len() < MAX_LISTED {
            self.recorded.conflicts.push(Conflict { at_ms, what });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Verdict;

    fn frame(sequence: u32, answers: &[(u64, u64)]) -> Vec<u8> {
        let mut f = vec![0u8; 14 + 20 + 20];
        f[12..14].copy_from_slice(&[8, 0]);
        f[14] = 0x45;
        let total = (40 + answers.len() * HEADER_BYTES) as u16;
        f[16..18].copy_from_slice(&total.to_be_bytes());
        f[23] = 6;
        f[26..30].copy_from_slice(&[10, 9, 0, 10]);
        f[30..34].copy_from_slice(&[10, 9, 0, 2]);
        f[34..36].copy_from_slice(&PORT.to_be_bytes());
        f[36..38].copy_from_slice(&40000u16.to_be_bytes());
        f[38..42].copy_from_slice(&sequence.to_be_bytes());
        f[46] = 0x50;
        for (counter, stamp_ns) in answers {
            let a = Answer {
                kind: Kind::Testify,
                verdict: Verdict::Ok,
                conn: 1,
                number: *counter,
                counter: *counter,
                record: 0,
                stamp_ns: *stamp_ns,
                boot: 1,
                payload_len: 0,
                payload_crc: 0,
            };
            f.extend_from_slice(&a.encode());
        }
        f
    }

    /// The one thing the recorder is for: output seen outside and then contradicted.
    #[test]
    fn a_history_taken_back_is_seen_in_frames() {
        let mut book = Book::default();
        book.frame("lan-alpha", 1.0, &frame(1, &[(1, 10), (2, 20)]));
        book.frame("lan-alpha", 2.0, &frame(129, &[(3, 30)]));
        book.frame("lan-alpha", 3.0, &frame(129, &[(3, 30)]));
        assert_eq!(book.recorded().uncommitted_frames_seen(), 0);
        assert_eq!(
            (book.recorded().answers, book.recorded().answers_again),
            (3, 1)
        );
        // The standby goes on from before answer 3 and says it again, at another time.
        book.frame("lan-beta", 9.0, &frame(129, &[(3, 31)]));
        let r = book.recorded();
        assert_eq!((r.answer_conflicts, r.segment_conflicts), (1, 1));
        assert_eq!(r.runs.len(), 2);
        assert_eq!((r.runs[0].last_counter, r.runs[1].first_counter), (3, 3));
    }

    /// A lost or reordered frame is no contradiction, and a damaged frame is no crash.
    #[test]
    fn late_and_short_frames_are_harmless() {
        let mut book = Book::default();
        book.frame("x", 1.0, &frame(65, &[(2, 20)]));
        book.frame("x", 2.0, &frame(1, &[(1, 10)]));
        assert_eq!(book.recorded().answers_late, 1);
        let whole = frame(200, &[(3, 30)]);
        for len in 0..whole.len() {
            book.frame("x", 3.0, &whole[..len]);
        }
        assert_eq!(book.recorded().answer_conflicts, 0);
    }
}
