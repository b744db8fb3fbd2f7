//! The monitor connection itself.

use crate::error::QmpError;
use crate::event::{self, Event};
use crate::socket::{LineError, LineSocket, deadline_in};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How many events wait at most for somebody to take them; beyond, the oldest are dropped and
/// counted in [`Qmp::lost_events`].
pub const MAX_EVENTS: usize = 4096;

/// How many replies of other tickets are kept while one is waited for.
const MAX_PARKED: usize = 8;

/// A command in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a submitted command's reply has to be waited for"]
pub struct Ticket {
    id: u64,
    name: &'static str,
}

/// QEMU's version as the greeting gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Major, such as 10.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Micro.
    pub micro: u32,
    /// The distribution's package string; may be empty.
    pub package: String,
}

/// One connection to a QMP monitor.
pub struct Qmp {
    socket: LineSocket,
    path: String,
    timeout: Duration,
    pid: u32,
    version: Version,
    next_id: u64,
    /// Messages received so far.
    seq: u64,
    reply_seq: u64,
    events: VecDeque<Event>,
    lost_events: u64,
    /// Replies that came while another ticket was waited for.
    parked: VecDeque<(u64, Outcome)>,
    /// Set by garbage or EOF: nothing more can be had from this connection.
    broken: Option<Broken>,
    line: Vec<u8>,
}

#[derive(Clone)]
enum Broken {
    Closed,
    Protocol(String),
}

/// What one line was.
enum Message {
    Event,
    Reply(Option<u64>, Outcome),
}

/// What a reply said; an error as its class and description.
type Outcome = Result<Value, (String, String)>;

impl Qmp {
    /// Connects, reads the greeting and leaves capability negotiation. `timeout` bounds this and, by
    /// default, each later command.
    ///
    /// # Errors
    /// [`QmpError::Io`] if the socket cannot be reached, [`QmpError::Timeout`] if nothing greets (a
    /// monitor serves one client at a time), [`QmpError::Protocol`] if it is no QMP monitor.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Qmp, QmpError> {
        let name = path.display().to_string();
        let io = |source| QmpError::Io {
            path: name.clone(),
            source,
        };
        let socket = LineSocket::connect(path).map_err(io)?;
        let Some(pid) = socket.peer_pid().map_err(io)? else {
            let what = "its process is not in this pid namespace".to_owned();
            return Err(QmpError::Protocol { path: name, what });
        };
        let mut qmp = Qmp {
            socket,
            path: name.clone(),
            timeout,
            pid,
            version: Version {
                major: 0,
                minor: 0,
                micro: 0,
                package: String::new(),
            },
            next_id: 1,
            seq: 0,
            reply_seq: 0,
            events: VecDeque::with_capacity(64),
            lost_events: 0,
            parked: VecDeque::with_capacity(MAX_PARKED),
            broken: None,
            line: Vec::with_capacity(4096),
        };
        qmp.greet(deadline_in(timeout))?;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    fn greet(&mut self, deadline: Instant) -> Result<(), QmpError> {
        let line = match self.socket.line(deadline) {
            Ok(line) => serde_json::from_slice::<Value>(line).map_err(|e| e.to_string()),
            Err(e) => return Err(self.line_error(e, "its greeting")),
        };
        let greeting = line.map_err(|e| self.protocol(format!("bad greeting: {e}")))?;
        let Some(v) = greeting.get("QMP").and_then(|q| q.get("version")) else {
            return Err(self.protocol("the greeting has no QMP version".into()));
        };
        let num = |k: &str| {
            let n = v.get("qemu").and_then(|q| q.get(k)).and_then(Value::as_u64);
            n.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
        };
        let package = v
            .get("package")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        self.version = Version {
            major: num("major"),
            minor: num("minor"),
            micro: num("micro"),
            package,
        };
        Ok(())
    }

    /// The pid of the process that opened the monitor socket, normally QEMU. (From SO_PEERCRED; a
    /// listening socket that QEMU inherited names the process that made it instead.)
    pub fn peer_pid(&self) -> u32 {
        self.pid
    }

    /// QEMU's version.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The socket for `poll`: readable when events may have come, or QEMU has gone. Call
    /// [`Qmp::poll_events`] then; also check [`Qmp::take_events`] after each command, since events that
    /// came along with a reply are in the queue already and no longer make the socket readable.
    pub fn raw_fd(&self) -> RawFd {
        self.socket.raw_fd()
    }

    /// How long a command may take unless told otherwise.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Runs a command and waits for its reply, at most the connection's timeout. `args` is an object,
    /// or null for none. Returns QEMU's `return` value.
    ///
    /// # Errors
    /// [`QmpError::Command`] if QEMU refused; [`QmpError::Closed`] if it is gone; [`QmpError::Timeout`].
    pub fn execute(&mut self, cmd: &str, args: Value) -> Result<Value, QmpError> {
        self.execute_within(cmd, args, self.timeout)
    }

    /// [`Qmp::execute`] with a timeout of its own.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_within(
        &mut self,
        cmd: &str,
        args: Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = deadline_in(timeout);
        let id = self.send(cmd, &args, None, deadline)?;
        self.reply(id, cmd, deadline, timeout)
    }

    /// Sends a command without waiting. Wait for its [`Ticket`] later, in any order; QEMU runs
    /// commands one after another. At most 8 may be in flight (QEMU's queue).
    ///
    /// # Errors
    /// As [`Qmp::execute`], without refusals.
    pub fn submit(&mut self, cmd: &'static str, args: &Value) -> Result<Ticket, QmpError> {
        let id = self.send(cmd, args, None, deadline_in(self.timeout))?;
        Ok(Ticket { id, name: cmd })
    }

    /// Waits for a submitted command's reply, at most the connection's timeout.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn wait(&mut self, ticket: Ticket) -> Result<Value, QmpError> {
        self.reply(
            ticket.id,
            ticket.name,
            deadline_in(self.timeout),
            self.timeout,
        )
    }

    /// Stops the vCPUs. When it returns, every earlier disk write has been answered.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn stop(&mut self) -> Result<(), QmpError> {
        let ticket = self.submit("stop", &Value::Null)?;
        self.wait(ticket).map(drop)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn cont(&mut self) -> Result<(), QmpError> {
        let ticket = self.submit("cont", &Value::Null)?;
        self.wait(ticket).map(drop)
    }

    /// Whether the vCPUs run, and QEMU's word for the state (`running`, `paused`, `inmigrate`...).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn run_state(&mut self) -> Result<(bool, String), QmpError> {
        let v = self.execute("query-status", Value::Null)?;
        let status = v
            .get("status")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        Ok((
            v.get("running").and_then(Value::as_bool).unwrap_or(false),
            status,
        ))
    }

    /// Runs a command of the human monitor and returns what it printed, with `\n` line ends.
    ///
    /// # Errors
    /// As [`Qmp::execute`]. The human monitor reports its own errors as text.
    pub fn human(&mut self, cmd: &str) -> Result<String, QmpError> {
        let v = self.execute("human-monitor-command", json!({ "command-line": cmd }))?;
        match v {
            Value::String(s) => Ok(s.replace("\r\n", "\n")),
            _ => Err(self.protocol("human-monitor-command returned no text".into())),
        }
    }

    /// Gives QEMU a descriptor under a name (`getfd`), to be used as `fd:NAME`.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn send_fd(&mut self, name: &str, fd: impl AsFd) -> Result<(), QmpError> {
        let args = json!({ "fdname": name });
        self.execute_with_fd("getfd", args, fd.as_fd()).map(drop)
    }

    /// Adds a descriptor to a new fd set; its number N makes it usable as `/dev/fdset/N`. `opaque`
    /// is a label that `query-fdsets` shows.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn add_fd(&mut self, fd: impl AsFd, opaque: &str) -> Result<u64, QmpError> {
        let v = self.execute_with_fd("add-fd", json!({ "opaque": opaque }), fd.as_fd())?;
        match v.get("fdset-id").and_then(Value::as_u64) {
            Some(n) => Ok(n),
            None => Err(self.protocol("add-fd returned no fdset-id".into())),
        }
    }

    /// Takes a descriptor set away from QEMU again.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn remove_fd(&mut self, fdset: u64) -> Result<(), QmpError> {
        self.execute("remove-fd", json!({ "fdset-id": fdset }))
            .map(drop)
    }

    fn execute_with_fd(
        &mut self,
        cmd: &str,
        args: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let deadline = deadline_in(self.timeout);
        let id = self.send(cmd, &args, Some(fd), deadline)?;
        self.reply(id, cmd, deadline, self.timeout)
    }

    /// Reads what has come without waiting. Returns how many events are queued.
    ///
    /// # Errors
    /// [`QmpError::Closed`] when QEMU has gone, [`QmpError::Protocol`] for garbage; queued events can still
    /// be taken.
    pub fn poll_events(&mut self) -> Result<usize, QmpError> {
        let now = Instant::now();
        loop {
            match self.next_message(now, "events") {
                Ok(Message::Event) => {}
                // Late replies to commands that had timed out, or whose ticket waits.
                Ok(Message::Reply(id, result)) => self.park(id, result),
                Err(QmpError::Timeout { .. }) => return Ok(self.events.len()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes all queued events, oldest first. Reads nothing.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    /// The oldest event, waiting at most `timeout` for one; `None` if none came.
    ///
    /// # Errors
    /// As [`Qmp::poll_events`].
    pub fn wait_event(&mut self, timeout: Duration) -> Result<Option<Event>, QmpError> {
        let deadline = deadline_in(timeout);
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.next_message(deadline, "an event") {
                Ok(Message::Event) => {}
                Ok(Message::Reply(id, result)) => self.park(id, result),
                Err(QmpError::Timeout { .. }) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    /// Queued events, oldest first, left in the queue.
    pub fn queued_events(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }

    /// The place of the last awaited reply in the stream of messages, see [`Event::seq`].
    pub fn reply_seq(&self) -> u64 {
        self.reply_seq
    }

    /// How many events were dropped because nobody took them.
    pub fn lost_events(&self) -> u64 {
        self.lost_events
    }

    fn send(
        &mut self,
        cmd: &str,
        args: &Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<u64, QmpError> {
        self.check_usable()?;
        let id = self.next_id;
        self.next_id += 1;
        self.line.clear();
        let written = (|| {
            self.line.extend_from_slice(b"{\"execute\":");
            serde_json::to_writer(&mut self.line, cmd)?;
            if !args.is_null() {
                self.line.extend_from_slice(b",\"arguments\":");
                serde_json::to_writer(&mut self.line, args)?;
            }
            writeln!(self.line, ",\"id\":{id}}}")
        })();
        if let Err(source) = written {
            return Err(QmpError::Io {
                path: self.path.clone(),
                source,
            });
        }
        // A line sent in part leaves QEMU waiting for its rest: the connection is spoilt then.
        let line = std::mem::take(&mut self.line);
        let sent = self.socket.send(&line, fd, deadline);
        self.line = line;
        match sent {
            Ok(()) => Ok(id),
            Err(LineError::Timeout) => {
                self.broken = Some(Broken::Protocol(format!("it takes no more input ({cmd})")));
                Err(QmpError::Timeout {
                    command: cmd.to_owned(),
                    waited: self.timeout,
                })
            }
            Err(e) => Err(self.line_error(e, cmd)),
        }
    }

    fn reply(
        &mut self,
        id: u64,
        cmd: &str,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let outcome = loop {
            if let Some(i) = self.parked.iter().position(|(p, _)| *p == id) {
                match self.parked.remove(i) {
                    Some((_, outcome)) => break outcome,
                    None => continue,
                }
            }
            match self.next_message(deadline, cmd) {
                Ok(Message::Event) => {}
                Ok(Message::Reply(got, outcome))
                    if got == Some(id) || (got.is_none() && outcome.is_err()) =>
                {
                    break outcome;
                }
                Ok(Message::Reply(got, outcome)) => self.park(got, outcome),
                Err(QmpError::Timeout { command, .. }) => {
                    return Err(QmpError::Timeout {
                        command,
                        waited: timeout,
                    });
                }
                Err(e) => return Err(e),
            }
        };
        self.reply_seq = self.seq;
        outcome.map_err(|(class, desc)| QmpError::Command {
            command: cmd.to_owned(),
            class,
            desc,
        })
    }

    fn park(&mut self, id: Option<u64>, outcome: Outcome) {
        let Some(id) = id else { return };
        if self.parked.len() == MAX_PARKED {
            self.parked.pop_front();
        }
        self.parked.push_back((id, outcome));
    }

    /// Reads one message; events go to the queue.
    fn next_message(&mut self, deadline: Instant, what: &str) -> Result<Message, QmpError> {
        self.check_usable()?;
        let parsed = match self.socket.line(deadline) {
            Ok(line) => serde_json::from_slice::<Value>(line).map_err(|e| e.to_string()),
            Err(e) => return Err(self.line_error(e, what)),
        };
        let mut msg = parsed.map_err(|e| self.protocol(format!("not JSON: {e}")))?;
        self.seq += 1;
        if msg.get("event").is_some() {
            let Some(event) = event::parse(self.seq, &mut msg) else {
                return Err(self.protocol("an event without a name".into()));
            };
            if self.events.len() == MAX_EVENTS {
                self.events.pop_front();
                self.lost_events += 1;
            }
            self.events.push_back(event);
            return Ok(Message::Event);
        }
        let id = msg.get("id").and_then(Value::as_u64);
        if let Some(error) = msg.get("error") {
            let text = |k| {
                error
                    .get(k)
                    .and_then(Value::as_str)
                    .unwrap_or("?")
                    .to_owned()
            };
            return Ok(Message::Reply(id, Err((text("class"), text("desc")))));
        }
        match msg.get_mut("return") {
            Some(v) => Ok(Message::Reply(id, Ok(v.take()))),
            None => Err(self.protocol("a message that is no event, reply or error".into())),
        }
    }

    fn check_usable(&self) -> Result<(), QmpError> {
        match &self.broken {
            None => Ok(()),
            Some(Broken::Closed) => Err(QmpError::Closed {
                path: self.path.clone(),
            }),
            Some(Broken::Protocol(what)) => Err(QmpError::Protocol {
                path: self.path.clone(),
                what: what.clone(),
            }),
        }
    }

    fn protocol(&mut self, what: String) -> QmpError {
        self.broken = Some(Broken::Protocol(what.clone()));
        QmpError::Protocol {
            path: self.path.clone(),
            what,
        }
    }

    fn line_error(&mut self, e: LineError, what: &str) -> QmpError {
        match e {
            LineError::Closed => {
                self.broken = Some(Broken::Closed);
                QmpError::Closed {
                    path: self.path.clone(),
                }
            }
            LineError::TooLong => self.protocol("a line of more than 8 MiB".into()),
            LineError::Timeout => QmpError::Timeout {
                command: what.to_owned(),
                waited: self.timeout,
            },
            LineError::Io(source) => QmpError::Io {
                path: self.path.clone(),
                source,
            },
        }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
