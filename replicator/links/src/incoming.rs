//! The standby's end: listens on one port per link and receives one stream at a time.
//!
//! ```text
//!  no stream ──hello: NewStream──> offered ──accept──> receiving ──another hello: NewStream──> offered (the old goes on)
//!                                     └─refuse──> the peer is told, and told again when it comes back
//! ```
//! Only the pinned peer gets as far as a hello. A hello that is offered waits; the peer tries again
//! when it is not answered in time, so [`Incoming::accept`] may come late.

mod spec;

use crate::beat::{self, Beating, Look, Stop};
use crate::conn::{Conn, LinkError};
use crate::link::{Counters, Link, LinkCounters, Side, lock, now_us, take_some, try_lock};
use crate::listen::{self};
use crate::tls::{ALPN_DATA, Trust, server_config};
use havm_core::ids::StreamId;
use havm_wire::back::Back;
use havm_wire::hello::{Lane, LinkFrame, Position, StreamHello};
use havm_wire::raw::RawFrame;
use havm_wire::receiver::Reorder;
use havm_wire::sender::{Outbound, Repeater};
use havm_wire::version::WIRE_VERSION;
use rustls::ServerConfig;
pub use spec::{Expect, In, IncomingError, IncomingSpec, ReplyError};
use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Connections that are not authenticated yet; more are closed at once.
const MAX_STRANGERS: usize = 32;
/// Bytes of our messages that wait for the primary.
const BACK_WINDOW_BYTES: usize = 16 << 20;
/// The consumer's progress is told at the latest after this many bytes.
const TELL_BYTES: usize = 256 << 10;
/// Streams that were refused, and are remembered.
const MAX_REFUSED: usize = 16;
/// Events that wait for their consumer; beyond, the oldest are dropped.
const MAX_EVENTS: usize = 1024;

struct Session {
    hello: StreamHello,
    id: [u8; 16],
    rx: Reorder,
    tx: Repeater,
    untold_bytes: usize,
}

struct State {
    expect: Expect,
    session: Option<Session>,
    offered: Option<StreamHello>,
    refused: VecDeque<(StreamId, String)>,
    events: VecDeque<In>,
    links: Vec<Option<Arc<Link>>>,
    next_gen: u64,
}

struct Hub {
    spec: IncomingSpec,
    tls: Arc<ServerConfig>,
    ports: Vec<SocketAddr>,
    state: Mutex<State>,
    news: Condvar,
    /// An offered stream was decided, or all is over.
    decided: Condvar,
    closed: AtomicBool,
    stop: Stop,
    tell: AtomicBool,
    /// See [`Beating::heard_before_us`].
    heard_us: AtomicU64,
    strangers: AtomicUsize,
    counters: Vec<Arc<Counters>>,
}

/// Receives streams from the peer.
pub struct Incoming {
    hub: Arc<Hub>,
}

impl Incoming {
    /// Listens.
    pub fn listen(spec: IncomingSpec) -> Result<Self, IncomingError> {
        let tls = server_config(&spec.identity, &Trust::Pinned(vec![spec.peer]), ALPN_DATA)?;
        let listeners = listen::bind_all(&spec.bind, &spec.ports)?;
        let n = listeners.len();
        let ports = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()?;
        let hub = Arc::new(Hub {
            tls,
            ports,
            state: Mutex::new(State {
                expect: spec.expect.clone(),
                session: None,
                offered: None,
                refused: VecDeque::new(),
                events: VecDeque::new(),
                links: vec![None; n],
                next_gen: 1,
            }),
            news: Condvar::new(),
            decided: Condvar::new(),
            closed: AtomicBool::new(false),
            stop: Stop::new()?,
            tell: AtomicBool::new(false),
            heard_us: AtomicU64::new(0),
            strangers: AtomicUsize::new(0),
            counters: (0..n).map(|_| Arc::default()).collect(),
            spec,
        });
        // Dropped, it ends the threads that were started before one could not be.
        let incoming = Incoming { hub: hub.clone() };
        for (i, listener) in listeners.into_iter().enumerate() {
            let hub = hub.clone();
            let thread = std::thread::Builder::new().name(format!("havm-listen-{i}"));
            thread.spawn(move || hub.accept_all(i, &listener))?;
        }
        let thread = std::thread::Builder::new().name("havm-in-beat".into());
        thread.spawn(move || beat::run(&*hub, &hub.spec.timers, &hub.stop))?;
        Ok(incoming)
    }

    /// Where it listens, one address a link.
    pub fn ports(&self) -> &[SocketAddr] {
        &self.hub.ports
    }

    /// Changes what may come. A stream that is being received and no longer fits is ended.
    pub fn expect(&self, expect: Expect) {
        let mut state = lock(&self.hub.state);
        state.expect = expect;
        let unfit = state.session.as_ref().and_then(|s| state.unfit(&s.hello));
        if let Some(why) = unfit {
            state.end_session(&why);
        }
        self.hub.decided.notify_all();
    }

    /// Takes the stream on: from its first frame, with nothing left of the one before. False where
    /// it is no longer offered.
    pub fn accept(&self, stream: StreamId) -> bool {
        let mut state = lock(&self.hub.state);
        let Some(hello) = state.offered.take_if(|h| h.stream == stream) else {
            return false;
        };
        let Ok(id) = session_id() else {
            // No randomness: the system is broken; the peer tries again.
            return false;
        };
        if let Some(old) = state.session.as_ref().map(|s| s.hello.stream) {
            state.remember_refused(old, "replaced by a newer stream");
        }
        state.end_session("replaced by a newer stream");
        state.session = Some(Session {
            hello,
            id,
            rx: Reorder::new(self.hub.spec.window_bytes),
            tx: Repeater::new(self.hub.spec.bind.len(), BACK_WINDOW_BYTES),
            untold_bytes: 0,
        });
        self.hub.decided.notify_all();
        true
    }

    /// Refuses a stream for good, offered or being received.
    pub fn refuse(&self, stream: StreamId, why: &str) {
        let mut state = lock(&self.hub.state);
        state.remember_refused(stream, why);
        state.offered.take_if(|h| h.stream == stream);
        if state
            .session
            .as_ref()
            .is_some_and(|s| s.hello.stream == stream)
        {
            state.end_session(why);
        }
        self.hub.decided.notify_all();
    }

    /// The next event or frame; none within `timeout`. Events come before frames.
    pub fn recv(&self, timeout: Duration) -> Option<In> {
        let hub = &*self.hub;
        let deadline = Instant::now() + timeout;
        let mut state = lock(&hub.state);
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            if let Some(session) = &mut state.session
                && let Some(frame) = session.rx.pop()
            {
                session.untold_bytes += frame.payload.len();
                if session.untold_bytes >= TELL_BYTES.min(hub.spec.window_bytes / 4) {
                    session.untold_bytes = 0;
                    hub.tell.store(true, SeqCst);
                    state.links.iter().flatten().any(|l| l.wake());
                }
                return Some(In::Frame(frame));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            (state, _) = hub
                .news
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sends a message to the primary, over every link that is up or comes up. Never blocks.
    pub fn reply(&self, back: &Back) -> Result<(), ReplyError> {
        let frame = back.encode()?;
        let mut state = lock(&self.hub.state);
        let session = state.session.as_mut().ok_or(ReplyError::NoStream)?;
        session
            .tx
            .push(frame)
            .map_err(|e| ReplyError::Full(e.to_string()))?;
        let links: Vec<Arc<Link>> = state.links.iter().flatten().cloned().collect();
        drop(state);
        for link in links {
            link.send_now(&*self.hub);
        }
        Ok(())
    }

    /// Links that carry the stream now.
    pub fn links_up(&self) -> usize {
        lock(&self.hub.state).links.iter().flatten().count()
    }

    /// Traffic per link.
    pub fn counters(&self) -> Vec<LinkCounters> {
        let state = lock(&self.hub.state);
        self.hub
            .counters
            .iter()
            .zip(&state.links)
            .map(|(c, l)| c.read(l.is_some()))
            .collect()
    }
}

impl Drop for Incoming {
    /// Ends all links and gives the ports back.
    fn drop(&mut self) {
        let hub = &*self.hub;
        hub.closed.store(true, SeqCst);
        hub.stop.stop();
        lock(&hub.state).end_session("closed on this side");
        hub.decided.notify_all();
    }
}

fn session_id() -> io::Result<[u8; 16]> {
    use std::io::Read;
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}

impl State {
    fn event(&mut self, event: In) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn remember_refused(&mut self, stream: StreamId, why: &str) {
        self.refused.retain(|(s, _)| *s != stream);
        if self.refused.len() >= MAX_REFUSED {
            self.refused.pop_front();
        }
        self.refused.push_back((stream, why.to_owned()));
    }

    fn end_session(&mut self, why: &str) {
        self.session = None;
        for link in self.links.iter_mut().filter_map(Option::take) {
            link.close(why);
        }
    }

    /// Why this hello is not what is expected.
    fn unfit(&self, hello: &StreamHello) -> Option<String> {
        let e = &self.expect;
        if hello.guest != e.guest {
            return Some(format!(
                "this port is for guest {}, not {}",
                e.guest, hello.guest
            ));
        }
        if e.term.is_some_and(|t| t != hello.term) {
            return Some(format!(
                "the stream is of term {}, expected is {}",
                hello.term,
                e.term.unwrap_or_default()
            ));
        }
        if e.my_life.is_some_and(|l| l != hello.peer_life) {
            return Some("the stream is meant for another life of this copy".into());
        }
        if e.peer_life.is_some_and(|l| l != hello.my_life) {
            return Some("the stream comes from another life of the guest".into());
        }
        self.refused
            .iter()
            .find(|(s, _)| *s == hello.stream)
            .map(|(_, why)| why.clone())
    }

    fn is_current(&self, link: usize, gen_id: u64) -> bool {
        self.links
            .get(link)
            .and_then(Option::as_ref)
            .is_some_and(|l| l.gen_id == gen_id)
    }
}

impl Hub {
    fn accept_all(self: &Arc<Self>, index: usize, listener: &TcpListener) {
        loop {
            let accepted = listen::accept(listener, self.stop.bell());
            if self.closed.load(SeqCst) {
                return;
            }
            let (sock, from) = match accepted {
                Ok(Some(a)) => a,
                Ok(None) => continue,
                Err(e) => {
                    tracing::warn!(index, "cannot accept a connection: {e}");
                    // Out of descriptors, most likely: some time may free some.
                    if self.stop.sleep(Duration::from_millis(50)) {
                        return;
                    }
                    continue;
                }
            };
            if self.strangers.fetch_add(1, SeqCst) >= MAX_STRANGERS {
                self.strangers.fetch_sub(1, SeqCst);
                tracing::warn!(index, %from, "too many connections wait for a handshake: closed");
                continue;
            }
            let hub = self.clone();
            let thread = std::thread::Builder::new().name(format!("havm-in-{index}"));
            if let Err(e) = thread.spawn(move || hub.serve(index, sock, from)) {
                self.strangers.fetch_sub(1, SeqCst);
                tracing::warn!(index, "cannot start a thread for a connection: {e}");
            }
        }
    }

    /// A connection's thread.
    fn serve(&self, index: usize, sock: TcpStream, from: SocketAddr) {
        let met = self.meet(index, sock);
        self.strangers.fetch_sub(1, SeqCst);
        let link = match met {
            Ok(Some(link)) => link,
            Ok(None) => return,
            Err(why) => {
                tracing::warn!(index, %from, "connection refused: {why}");
                return;
            }
        };
        let why = link.run(self);
        self.heard_us.fetch_max(link.last_heard_us(), SeqCst);
        let mut state = lock(&self.state);
        if !state.is_current(index, link.gen_id) {
            return;
        }
        state.links[index] = None;
        if let LinkError::StreamBroken(why) = &why {
            if let Some(s) = &state.session {
                let stream = s.hello.stream;
                state.remember_refused(stream, why);
            }
            state.end_session(why);
            state.event(In::Broken(why.clone()));
        }
        state.event(In::LinkDown(index, why.to_string()));
        self.news.notify_all();
    }

    /// Handshake and hello; the link that now carries the stream, unless it was a lane of beats.
    fn meet(&self, index: usize, sock: TcpStream) -> Result<Option<Arc<Link>>, LinkError> {
        let timeout = self.spec.timers.connect_timeout;
        let deadline = Instant::now() + timeout;
        let mut conn = Conn::server(sock, self.tls.clone())?;
        conn.handshake(deadline)?;
        let (hello, position, lane) = match conn.hear(deadline) {
            Ok(LinkFrame::Hello {
                hello,
                position,
                lane,
            }) => (hello, position, lane),
            Ok(_) => {
                return Err(LinkError::StreamBroken(
                    "it did not start with a hello".into(),
                ));
            }
            Err(LinkError::Handshake(e)) => {
                return Err(self.turn_away(&mut conn, e.to_string()));
            }
            Err(e) => return Err(e),
        };
        let state = lock(&self.state);
        let mut state = match self.admit(state, &hello) {
            Ok(state) => state,
            Err(LinkError::Refused { why, .. }) => return Err(self.turn_away(&mut conn, why)),
            Err(e) => return Err(e),
        };
        let gen_id = state.next_gen;
        state.next_gen += 1;
        let carrier = state.links[index].clone();
        let Some(session) = &mut state.session else {
            return Err(LinkError::Closed("no stream".into()));
        };
        let welcome = LinkFrame::Welcome {
            position: session.rx.position(),
            window_bytes: self.spec.window_bytes as u64,
            session: session.id,
        };
        // Fits the empty socket buffer: this does not wait while the lock is held.
        conn.say(&welcome, Instant::now() + Duration::from_millis(100))?;
        if lane == Lane::Beat {
            // The peer makes it right after the link that it belongs to.
            let gone = || LinkError::Closed("its link is gone already".into());
            return carrier.ok_or_else(gone)?.lane.attach(conn).map(|()| None);
        }
        let up = session.tx.link_up(index, position);
        up.map_err(|e| LinkError::StreamBroken(e.to_string()))?;
        let link = Link::new(index, gen_id, conn, self.counters[index].clone())?;
        if let Some(old) = state.links[index].replace(link.clone()) {
            old.close("replaced by a new connection of the peer");
        }
        self.heard_us.fetch_max(now_us(), SeqCst);
        state.event(In::LinkUp(index));
        self.news.notify_all();
        Ok(Some(link))
    }

    /// Waits until this hello is the stream being received.
    fn admit<'a>(
        &'a self,
        mut state: std::sync::MutexGuard<'a, State>,
        hello: &StreamHello,
    ) -> Result<std::sync::MutexGuard<'a, State>, LinkError> {
        let patience = self.spec.timers.connect_timeout;
        let deadline = Instant::now() + patience;
        loop {
            if self.closed.load(SeqCst) {
                return Err(LinkError::Closed("closed on this side".into()));
            }
            let mut refused = state.unfit(hello);
            if let Some(s) = state
                .session
                .as_ref()
                .filter(|s| s.hello.stream == hello.stream)
            {
                if s.hello == *hello && refused.is_none() {
                    return Ok(state);
                }
                refused.get_or_insert("the stream changed its term or lives".into());
            }
            if let Some(why) = refused {
                return Err(LinkError::Refused {
                    version: WIRE_VERSION,
                    forever: true,
                    why,
                });
            }
            if state.offered.as_ref() != Some(hello) {
                state.offered = Some(hello.clone());
                state.event(In::NewStream(hello.clone()));
                self.news.notify_all();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::Timeout(patience));
            }
            (state, _) = self
                .decided
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn turn_away(&self, conn: &mut Conn, why: String) -> LinkError {
        let refused = LinkFrame::Refused {
            version: WIRE_VERSION,
            forever: true,
            why: why.clone(),
        };
        // If it does not get through, the peer tries again and is told then.
        let _ = conn.say(&refused, Instant::now() + Duration::from_millis(500));
        LinkError::Closed(why)
    }
}

impl Side for Hub {
    fn take(&self, link: usize, gen_id: u64, bytes: usize) -> Vec<Outbound> {
        let mut state = lock(&self.state);
        if !state.is_current(link, gen_id) {
            return Vec::new();
        }
        match &mut state.session {
            Some(session) => take_some(bytes, || session.tx.next(link)),
            None => Vec::new(),
        }
    }

    fn has_next(&self, link: usize, gen_id: u64) -> bool {
        let state = lock(&self.state);
        state.is_current(link, gen_id)
            && state.session.as_ref().is_some_and(|s| s.tx.has_next(link))
    }

    fn deliver(&self, link: usize, gen_id: u64, frames: Vec<RawFrame>) -> Result<(), LinkError> {
        let mut state = lock(&self.state);
        if !state.is_current(link, gen_id) {
            return Err(LinkError::Closed("replaced".into()));
        }
        let Some(session) = &mut state.session else {
            return Err(LinkError::Closed("no stream".into()));
        };
        let mut ready = false;
        for frame in frames {
            if !LinkFrame::is_kind(frame.header.kind) {
                let pushed = session.rx.push(frame);
                ready |= pushed.map_err(|e| LinkError::StreamBroken(e.to_string()))?;
                continue;
            }
            let LinkFrame::Position(position) = LinkFrame::decode(&frame)? else {
                return Err(LinkError::StreamBroken("a second handshake".into()));
            };
            let told = session.tx.on_position(position);
            told.map_err(|e| LinkError::StreamBroken(e.to_string()))?;
        }
        if ready {
            self.news.notify_all();
        }
        Ok(())
    }

    fn position(&self) -> Position {
        lock(&self.state).position()
    }

    fn take_tell(&self) -> bool {
        self.tell.swap(false, SeqCst)
    }
}

impl State {
    fn position(&self) -> Position {
        self.session
            .as_ref()
            .map_or_else(Position::default, |s| s.rx.position())
    }
}

impl Beating for Hub {
    fn look(&self) -> Option<Look> {
        let state = try_lock(&self.state)?;
        let links = state.links.iter().flatten().cloned().collect();
        // What goes back goes over every link anyway: nothing is late.
        Some(Look {
            links,
            position: state.position(),
            late_at_us: None,
        })
    }
    fn heard_before_us(&self) -> u64 {
        self.heard_us.load(SeqCst)
    }
    fn silent(&self, silent: bool) {
        lock(&self.state).event(if silent { In::Silent } else { In::Alive });
        self.news.notify_all();
    }
}
