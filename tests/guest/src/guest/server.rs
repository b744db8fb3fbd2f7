//! Answers requests. A thread a connection; records are written by all of them at once.
//!
//! The counter is taken and the answer sent under one lock, so that answers leave the guest in the
//! order of their counters.

use super::disk::Log;
use super::memory::Memory;
use super::{init, say, sys};
use crate::proto::{
    self, Answer, ECHO_PORT, Kind, NO_RECORD, PORT, Record, Request, Verdict, read_request,
};
use crate::report::{Ask, ConnSeen, MAX_DUMP_RECORDS, Seen};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Connections served at the same time.
const MAX_CONNECTIONS: usize = 128;
/// A client that does not take an answer for this long loses its connection: it holds the lock.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// How many of a connection's last answers are remembered one by one: a client may have that many
/// requests under way.
const REMEMBERED: usize = 512;

#[derive(Default)]
struct History {
    counter: u64,
    answers: u64,
    unknown_history: u64,
    conns: HashMap<u64, Conn>,
}

#[derive(Default)]
struct Conn {
    seen: ConnSeen,
    /// Counter and stamp of the last answers.
    last: VecDeque<(u64, u64)>,
}

impl Conn {
    /// The answer that a client names as its last was really given. Before the first answer it
    /// names none.
    fn knows(&self, named: (u64, u64)) -> bool {
        let still_none = named == (0, 0) && self.seen.answers < REMEMBERED as u64;
        still_none || self.last.contains(&named)
    }

    fn remember(&mut self, answer: &Answer) {
        self.seen = ConnSeen {
            conn: answer.conn,
            answers: self.seen.answers + 1,
            number: answer.number,
            counter: answer.counter,
            stamp_ns: answer.stamp_ns,
            chain: answer.chain(self.seen.chain),
        };
        self.last.push_back((answer.counter, answer.stamp_ns));
        if self.last.len() > REMEMBERED {
            self.last.pop_front();
        }
    }
}

/// All that the connections share.
pub struct Server {
    log: Option<Log>,
    memory: Memory,
    boot: u32,
    history: Mutex<History>,
}

impl Server {
    /// A server over this log (none: a guest without a disk) and memory.
    pub fn new(log: Option<Log>, memory: Memory) -> Arc<Server> {
        let boot = log
            .as_ref()
            .map_or(sys::monotonic_ns() as u32 | 1, Log::boot);
        Arc::new(Server {
            log,
            memory,
            boot,
            history: Mutex::new(History::default()),
        })
    }

    /// Serves both ports for ever; returns only when they cannot be opened.
    pub fn serve(self: Arc<Server>) -> io::Result<()> {
        let echo = UdpSocket::bind(("0.0.0.0", ECHO_PORT))?;
        std::thread::spawn(move || echo_all(&echo));
        let listener = TcpListener::bind(("0.0.0.0", PORT))?;
        say("ready");
        self.accept(&listener)
    }

    /// Serves connections of a listener.
    pub fn accept(self: Arc<Server>, listener: &TcpListener) -> io::Result<()> {
        let open = Arc::new(());
        loop {
            let (stream, from) = listener.accept()?;
            if Arc::strong_count(&open) > MAX_CONNECTIONS {
                say(&format!("{from}: too many connections"));
                continue;
            }
            let (server, place) = (self.clone(), open.clone());
            std::thread::spawn(move || {
                if let Err(e) = server.connection(stream) {
                    say(&format!("{from}: {e}"));
                }
                drop(place);
            });
        }
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn connection(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        let mut from = io::BufReader::new(stream.try_clone()?);
        loop {
            let (request, payload) = match read_request(&mut from) {
                Ok(r) => r,
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(e) => return Err(e),
            };
            match request.kind {
                Kind::Testify => self.testify(&mut stream, &request, &payload)?,
                Kind::Control => self.control(&mut stream, &request, &payload)?,
            }
        }
    }

    fn testify(&self, stream: &mut TcpStream, request: &Request, payload: &[u8]) -> io::Result<()> {
        let _at_work = init::AT_WORK.read().unwrap_or_else(PoisonError::into_inner);
        let stamp_ns = sys::monotonic_ns();
        let mut answer = Answer {
            kind: Kind::Testify,
            verdict: Verdict::Ok,
            conn: request.conn,
            number: request.number,
            counter: 0,
            record: NO_RECORD,
            stamp_ns,
            boot: self.boot,
            payload_len: 0,
            payload_crc: request.payload_crc,
        };
        if let Some(log) = &self.log {
            let record = Record {
                seq: 0,
                conn: request.conn,
                number: request.number,
                stamp_ns,
                boot: self.boot,
                payload_crc: request.payload_crc,
                payload_len: request.payload_len,
            };
            match log.append(record, payload) {
                Ok(written) => answer.record = written.seq,
                Err(e) => {
                    say(&format!("record: {e}"));
                    answer.verdict = Verdict::DiskError;
                }
            }
        }
        let mut history = self.history();
        history.counter += 1;
        history.answers += 1;
        answer.counter = history.counter;
        let conn = history.conns.entry(request.conn).or_default();
        let known = conn.knows((request.seen_counter, request.seen_stamp_ns));
        conn.remember(&answer);
        if !known {
            history.unknown_history += 1;
            answer.verdict = Verdict::UnknownHistory;
        }
        stream.write_all(&answer.encode())
    }

    fn control(&self, stream: &mut TcpStream, request: &Request, payload: &[u8]) -> io::Result<()> {
        let (verdict, body, then) = match serde_json::from_slice::<Ask>(payload) {
            Ok(ask) => self.ask(ask),
            Err(e) => (Verdict::BadRequest, e.to_string().into_bytes(), None),
        };
        let answer = Answer {
            kind: Kind::Control,
            verdict,
            conn: request.conn,
            number: request.number,
            counter: 0,
            record: NO_RECORD,
            stamp_ns: sys::monotonic_ns(),
            boot: self.boot,
            payload_len: body.len() as u32,
            payload_crc: crc32fast::hash(&body),
        };
        let mut bytes = answer.encode().to_vec();
        bytes.extend_from_slice(&body);
        stream.write_all(&bytes)?;
        if let Some(then) = then {
            // The answer should be out before the machine ends.
            std::thread::sleep(Duration::from_millis(200));
            then();
        }
        Ok(())
    }

    fn ask(&self, ask: Ask) -> (Verdict, Vec<u8>, Option<fn()>) {
        let json = |v: serde_json::Result<Vec<u8>>| match v {
            Ok(bytes) => (Verdict::Ok, bytes, None),
            Err(e) => (Verdict::BadRequest, e.to_string().into_bytes(), None),
        };
        let done = |r: Result<(), String>| match r {
            Ok(()) => (Verdict::Ok, b"{}".to_vec(), None),
            Err(e) => (Verdict::BadRequest, e.into_bytes(), None),
        };
        match ask {
            Ask::Seen => json(serde_json::to_vec(&self.seen())),
            Ask::Conns => {
                let history = self.history();
                let conns: Vec<&ConnSeen> = history.conns.values().map(|c| &c.seen).collect();
                json(serde_json::to_vec(&conns))
            }
            Ask::Check => {
                self.memory.check_all();
                json(serde_json::to_vec(&self.seen()))
            }
            Ask::Dirty {
                mib_per_s,
                working_mib,
            } => done(self.memory.dirty(mib_per_s, working_mib)),
            Ask::Burst { mib } => done(self.memory.burst(mib)),
            Ask::Dump { from, count } => match &self.log {
                None => (Verdict::BadRequest, b"the guest has no disk".to_vec(), None),
                Some(log) => match log.dump(from, count.min(MAX_DUMP_RECORDS)) {
                    Ok(bytes) => (Verdict::Ok, bytes, None),
                    Err(e) => (Verdict::DiskError, e.to_string().into_bytes(), None),
                },
            },
            Ask::Poweroff => (Verdict::Ok, b"{}".to_vec(), Some(init::power_off)),
            Ask::Reboot => (Verdict::Ok, b"{}".to_vec(), Some(init::reboot)),
        }
    }

    fn seen(&self) -> Seen {
        let history = self.history();
        Seen {
            boot: self.boot,
            uptime_ms: sys::monotonic_ns() / 1_000_000,
            answers: history.answers,
            counter: history.counter,
            conns: history.conns.len() as u64,
            unknown_history: history.unknown_history,
            disk: self.log.as_ref().map(Log::seen),
            memory: self.memory.seen(),
        }
    }
}

fn echo_all(socket: &UdpSocket) {
    let mut datagram = [0u8; 2048];
    loop {
        match socket.recv_from(&mut datagram) {
            // A reply that cannot be sent is a lost datagram: the sender counts those.
            Ok((n, from)) => drop(socket.send_to(&datagram[..n], from)),
            Err(e) => {
                say(&format!("echo: {e}"));
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

const _: () = assert!(MAX_DUMP_RECORDS as usize * proto::HEADER_BYTES <= proto::MAX_PAYLOAD_BYTES);
