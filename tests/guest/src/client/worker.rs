//! One connection kept busy.
//!
//! In turn: the next request goes out a little after the last answer came. Paced: a request goes out
//! every so often whatever is still open, as from a client that does not wait; on such a connection
//! TCP mends a loss fast, where in turn it waits for a timer of 200 ms and more.

use super::ledger::{Ledger, Noted};
use crate::proto::{Answer, HEADER_BYTES, Kind, Request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Requests under way at the most on a paced connection; the guest remembers more.
const MAX_OPEN: usize = 256;
/// A request's payload.
const PAYLOAD_BYTES: usize = 256;

/// How a connection is kept busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Waits for the answer, then this long.
    InTurn(Duration),
    /// Sends every so often.
    Every(Duration),
}

/// What all workers share.
#[derive(Clone)]
pub struct Shared {
    /// The book.
    pub ledger: Arc<Mutex<Ledger>>,
    /// Time zero of the book.
    pub start: Instant,
    /// No new requests from now on.
    pub stopping: Arc<AtomicBool>,
}

impl Shared {
    /// The book, locked.
    pub fn book(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since the start.
    pub fn now_ms(&self) -> f64 {
        self.start.elapsed().as_secs_f64() * 1000.0
    }
}

/// The connection.
pub struct Worker {
    /// Its place in the book.
    pub index: usize,
    /// How it is kept busy.
    pub pace: Pace,
    /// The connection.
    pub stream: TcpStream,
    /// The book and the rest.
    pub shared: Shared,
}

struct Flow {
    id: u64,
    number: u64,
    /// Payload length of the requests under way, in order.
    open: VecDeque<u32>,
    unsent: Vec<u8>,
    received: Vec<u8>,
    last: (u64, u64),
    next_send: Instant,
}

impl Worker {
    /// Works until told to stop and all answers are there, or the drain time is over, or the
    /// connection breaks, which is written into the book.
    pub fn run(mut self, drain: Duration) {
        if let Err(why) = self.work(drain) {
            self.shared.book().conns[self.index].failure = Some(why);
        }
    }

    fn work(&mut self, drain: Duration) -> Result<(), String> {
        let broke = |e: std::io::Error| format!("{e} ({:?})", e.kind());
        self.stream.set_nonblocking(true).map_err(broke)?;
        let mut flow = Flow {
            id: self.shared.book().conns[self.index].id,
            number: 0,
            open: VecDeque::new(),
            unsent: Vec::new(),
            received: Vec::new(),
            last: (0, 0),
            next_send: Instant::now(),
        };
        let mut end = None;
        loop {
            let stopping = self.shared.stopping.load(Ordering::Relaxed);
            if stopping {
                let end = *end.get_or_insert_with(|| Instant::now() + drain);
                if flow.open.is_empty() || Instant::now() >= end {
                    return Ok(());
                }
            }
            let free = match self.pace {
                Pace::InTurn(_) => flow.open.is_empty(),
                Pace::Every(_) => flow.open.len() < MAX_OPEN,
            };
            if !stopping && free && Instant::now() >= flow.next_send {
                self.request(&mut flow);
            }
            self.send(&mut flow).map_err(broke)?;
            let wait = if stopping || !free {
                Duration::from_millis(100)
            } else {
                flow.next_send.saturating_duration_since(Instant::now())
            };
            let mut wanted = PollFlags::POLLIN;
            if !flow.unsent.is_empty() {
                wanted |= PollFlags::POLLOUT;
            }
            // Rounded up: a wait of 0 ms would be a busy loop.
            let wait_ms = wait.as_micros().div_ceil(1000).min(100) as u16;
            let mut fds = [PollFd::new(self.stream.as_fd(), wanted)];
            match poll(&mut fds, PollTimeout::from(wait_ms)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(format!("poll: {e}")),
            }
            self.receive(&mut flow)?;
        }
    }

    fn request(&self, flow: &mut Flow) {
        flow.number += 1;
        let mut payload = format!("request {} of {:#x} ", flow.number, flow.id).into_bytes();
        payload.resize(PAYLOAD_BYTES, b'a' + (flow.number % 26) as u8);
        let request = Request {
            kind: Kind::Testify,
            conn: flow.id,
            number: flow.number,
            seen_counter: flow.last.0,
            seen_stamp_ns: flow.last.1,
            payload_len: payload.len() as u32,
            payload_crc: crc32fast::hash(&payload),
        };
        flow.unsent.extend_from_slice(&request.encode());
        flow.unsent.extend_from_slice(&payload);
        flow.open.push_back(request.payload_len);
        if let Pace::Every(interval) = self.pace {
            // What was missed while too much was open is not made up for.
            flow.next_send = (flow.next_send + interval).max(Instant::now());
        }
        self.shared.book().conns[self.index].sent = flow.number;
    }

    fn send(&mut self, flow: &mut Flow) -> std::io::Result<()> {
        while !flow.unsent.is_empty() {
            match self.stream.write(&flow.unsent) {
                Ok(n) => drop(flow.unsent.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn receive(&mut self, flow: &mut Flow) -> Result<(), String> {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err("the guest closed it".to_owned()),
            Ok(n) => flow.received.extend_from_slice(&buffer[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(e) => return Err(format!("{e} ({:?})", e.kind())),
        }
        let now_ms = self.shared.now_ms();
        let mut at = 0;
        while flow.received.len() - at >= HEADER_BYTES {
            let mut head = [0; HEADER_BYTES];
            head.copy_from_slice(&flow.received[at..at + HEADER_BYTES]);
            at += HEADER_BYTES;
            let answer = Answer::decode(&head).map_err(|e| e.0.to_owned())?;
            let payload_len = flow.open.pop_front().unwrap_or(0);
            self.shared.book().answer(
                self.index,
                Noted {
                    answer,
                    payload_len,
                },
                now_ms,
            )?;
            flow.last = (answer.counter, answer.stamp_ns);
            if let Pace::InTurn(think) = self.pace {
                flow.next_send = Instant::now() + think;
            }
        }
        flow.received.drain(..at);
        Ok(())
    }
}
