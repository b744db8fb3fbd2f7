//! The primary's end of a stream: one connection per link, kept up for as long as this lives.
//!
//! ```text
//!  per link:  connecting ──Welcome──> up ──fails──> waiting (50 ms, doubling to 500 ms) ──> connecting
//!  stream:    open ──refused for good | peer forgot | rules broken──> broken
//! ```
//! [`Outgoing::send`] queues a frame and returns; it blocks only while the window is full.

mod socket;
mod spec;

use crate::beat::{self, Beating, Look, Stop};
use crate::conn::{Conn, LinkError};
use crate::link::{Counters, Link, LinkCounters, Side, lock, now_us, take_some, try_lock};
use crate::tls::{ALPN_DATA, Trust, client_config};
use havm_wire::back::Back;
use havm_wire::frame::Frame;
use havm_wire::hello::{Lane, LinkFrame, Position};
use havm_wire::raw::{Encoded, RawFrame};
use havm_wire::receiver::Reorder;
use havm_wire::sender::{Outbound, StripeSender};
use havm_wire::version;
use rustls::ClientConfig;
use socket::connect_socket;
pub use spec::{OutEvent, OutgoingError, OutgoingSpec, SendError};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What may be queued before the peer told its window, bytes.
const UNWELCOMED_BYTES: usize = 64 << 10;
/// Bytes of the standby's messages that wait for their consumer.
const BACK_WINDOW_BYTES: usize = 16 << 20;
/// Events other than messages that wait for their consumer; beyond, the oldest are dropped.
const MAX_EVENTS: usize = 1024;
/// Frames up to this size are sent by the thread that queues them, bytes.
const SMALL_BYTES: usize = 4096;
/// Different reasons told while a link cannot be connected.
const MAX_TOLD: usize = 8;
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_LAST: Duration = Duration::from_millis(500);

struct State {
    tx: StripeSender,
    rx: Reorder,
    events: VecDeque<OutEvent>,
    broken: Option<String>,
    links: Vec<Option<Arc<Link>>>,
    next_gen: u64,
    /// Which link is woken next.
    turn: usize,
}

/// What a standby says that takes the stream.
struct Welcomed {
    position: Position,
    window_bytes: u64,
    session: [u8; 16],
}

struct Hub {
    spec: OutgoingSpec,
    tls: Arc<ClientConfig>,
    state: Mutex<State>,
    room: Condvar,
    news: Condvar,
    closed: AtomicBool,
    stop: Stop,
    tell: AtomicBool,
    /// See [`Beating::heard_before_us`].
    heard_us: AtomicU64,
    counters: Vec<Arc<Counters>>,
}

/// A stream to the standby.
pub struct Outgoing {
    hub: Arc<Hub>,
}

impl Outgoing {
    /// Starts to connect; returns at once. [`OutEvent::LinkUp`] tells when a link is up.
    pub fn connect(spec: OutgoingSpec) -> Result<Self, OutgoingError> {
        let n = spec.links.len();
        if n == 0 {
            return Err(OutgoingError::NoLinks);
        }
        let trust = Trust::Pinned(vec![spec.peer]);
        let tls = client_config(&spec.identity, &trust, ALPN_DATA)?;
        let late_us = spec.timers.late_after.as_micros() as u64;
        let hub = Arc::new(Hub {
            tls,
            state: Mutex::new(State {
                tx: StripeSender::new(UNWELCOMED_BYTES.min(spec.window_bytes), late_us),
                rx: Reorder::new(BACK_WINDOW_BYTES),
                events: VecDeque::new(),
                broken: None,
                links: vec![None; n],
                next_gen: 1,
                turn: 0,
            }),
            room: Condvar::new(),
            news: Condvar::new(),
            closed: AtomicBool::new(false),
            stop: Stop::new()?,
            tell: AtomicBool::new(false),
            heard_us: AtomicU64::new(0),
            counters: (0..n).map(|_| Arc::default()).collect(),
            spec,
        });
        // Dropped, it ends the threads that were started before one could not be.
        let out = Outgoing { hub: hub.clone() };
        for i in 0..n {
            let hub = hub.clone();
            let thread = std::thread::Builder::new().name(format!("havm-out-{i}"));
            thread.spawn(move || hub.keep_link(i))?;
        }
        let thread = std::thread::Builder::new().name("havm-out-beat".into());
        thread.spawn(move || beat::run(&*hub, &hub.spec.timers, &hub.stop))?;
        Ok(out)
    }

    /// Queues a frame. Blocks while the window is full, at most `patience`.
    pub fn send(&self, frame: Encoded, patience: Duration) -> Result<(), SendError> {
        let hub = &*self.hub;
        let full = |s: &mut State| {
            s.broken.is_none() && !hub.closed.load(SeqCst) && !s.tx.has_room(frame.wire_bytes())
        };
        let (mut state, waited) = hub
            .room
            .wait_timeout_while(lock(&hub.state), patience, full)
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = &state.broken {
            return Err(SendError::Broken(why.clone()));
        }
        if hub.closed.load(SeqCst) {
            return Err(SendError::Closed);
        }
        if waited.timed_out() && !state.tx.has_room(frame.wire_bytes()) {
            return Err(SendError::TimedOut(patience));
        }
        let small = frame.payload().len() <= SMALL_BYTES;
        state.tx.push(frame);
        let links = state.wakeable();
        drop(state);
        // The first link that has nothing to do takes it; busy ones look before they sleep.
        links
            .iter()
            .any(|l| if small { l.send_now(hub) } else { l.wake() });
        Ok(())
    }

    /// The next event, in the order in which they happened; none within `timeout`.
    pub fn event(&self, timeout: Duration) -> Option<OutEvent> {
        let hub = &*self.hub;
        let deadline = Instant::now() + timeout;
        let mut state = lock(&hub.state);
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            if let Some(raw) = state.rx.pop() {
                hub.tell.store(true, SeqCst);
                match Back::decode(&raw) {
                    Ok(back) => return Some(OutEvent::Back(back)),
                    Err(e) => hub.break_stream(&mut state, e.to_string()),
                }
                continue;
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

    /// Bytes queued or on their way that the standby's consumer has not taken yet.
    pub fn held_bytes(&self) -> usize {
        lock(&self.hub.state).tx.held_bytes()
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

    /// Lets go whoever waits in [`Outgoing::send`]: it and all later calls fail.
    pub fn abort(&self) {
        self.hub.close("closed on this side");
    }

    /// Says goodbye, waits (at most `patience`) until the standby received everything, and ends
    /// all links.
    pub fn close(self, reason: &str, patience: Duration) {
        let deadline = Instant::now() + patience;
        let bye = Frame::Bye {
            reason: reason.into(),
        }
        .encode();
        if bye.is_ok_and(|bye| self.send(bye, patience).is_ok()) {
            let mut state = lock(&self.hub.state);
            let was_up = state.is_up();
            while !state.tx.is_received() && state.broken.is_none() {
                let left = deadline.saturating_duration_since(Instant::now());
                // A peer that leaves upon the goodbye may not tell that it received it.
                if left.is_zero() || (was_up && !state.is_up()) {
                    break;
                }
                let waited = self.hub.room.wait_timeout(state, left);
                (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Drop for Outgoing {
    /// Ends all links at once. A thread that is just connecting follows when that ends; it sends
    /// nothing of the stream any more.
    fn drop(&mut self) {
        self.abort();
    }
}

impl State {
    fn event(&mut self, event: OutEvent) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Links to try to wake, the one whose turn it is first.
    fn wakeable(&mut self) -> Vec<Arc<Link>> {
        let n = self.links.len();
        self.turn = (self.turn + 1) % n;
        (0..n)
            .filter_map(|i| self.links[(self.turn + i) % n].clone())
            .collect()
    }

    fn is_up(&self) -> bool {
        self.links.iter().any(Option::is_some)
    }

    fn is_current(&self, link: usize, gen_id: u64) -> bool {
        self.links
            .get(link)
            .and_then(Option::as_ref)
            .is_some_and(|l| l.gen_id == gen_id)
    }

    /// New frames go over another link while this one is not heard, if another one is.
    fn is_doubtful(&self, link: usize, now_us: u64, after_us: u64) -> bool {
        let stale = |l: &Arc<Link>| l.last_heard_us() + after_us < now_us;
        let links = || self.links.iter().flatten();
        links().any(|l| l.index == link && stale(l))
            && links().any(|l| l.index != link && !stale(l))
    }
}

impl Hub {
    fn close(&self, why: &str) {
        self.closed.store(true, SeqCst);
        self.stop.stop();
        let state = lock(&self.state);
        state.links.iter().flatten().for_each(|l| l.close(why));
        self.room.notify_all();
        self.news.notify_all();
    }

    fn break_stream(&self, state: &mut State, why: String) {
        if state.broken.is_none() {
            state.broken = Some(why.clone());
            state.event(OutEvent::Broken(why.clone()));
            state.links.iter().flatten().for_each(|l| l.close(&why));
            self.room.notify_all();
            self.news.notify_all();
        }
    }

    /// A link that missed three signs of life gets nothing new while another one is heard.
    fn doubtful_us(&self) -> u64 {
        self.spec.timers.beat_every.as_micros() as u64 * 3
    }

    fn is_over(&self) -> bool {
        self.closed.load(SeqCst) || lock(&self.state).broken.is_some()
    }

    /// A link's thread.
    fn keep_link(&self, index: usize) {
        let mut backoff = BACKOFF_FIRST;
        // Reasons told since the link was up last.
        let mut told: Vec<String> = Vec::new();
        while !self.is_over() {
            match self.connect_link(index) {
                Ok(link) => {
                    backoff = BACKOFF_FIRST;
                    told.clear();
                    let why = link.run(self);
                    self.link_down(index, &why);
                    tracing::debug!(index, "link failed: {why}");
                }
                Err(why) => {
                    let mut state = lock(&self.state);
                    if let LinkError::StreamBroken(why)
                    | LinkError::Refused {
                        forever: true, why, ..
                    } = &why
                    {
                        self.break_stream(&mut state, why.clone());
                    }
                    let text = why.to_string();
                    let is_new = told.len() < MAX_TOLD && !told.contains(&text);
                    if is_new && !self.closed.load(SeqCst) {
                        state.event(OutEvent::LinkDown(index, text.clone()));
                        self.news.notify_all();
                        told.push(text);
                    }
                    drop(state);
                    if self.stop.sleep(backoff) {
                        return;
                    }
                    backoff = (backoff * 2).min(BACKOFF_LAST);
                    continue;
                }
            }
            if self.stop.sleep(BACKOFF_FIRST) {
                return;
            }
        }
    }

    /// Connects and says hello; the connection, and where the standby stands.
    fn greet(&self, index: usize, lane: Lane) -> Result<(Conn, Welcomed), LinkError> {
        let timeout = self.spec.timers.connect_timeout;
        let deadline = Instant::now() + timeout;
        let (from, to) = self.spec.links[index];
        let mut conn = Conn::client(connect_socket(from, to, timeout)?, self.tls.clone())?;
        conn.handshake(deadline)?;
        let position = lock(&self.state).rx.position();
        let hello = self.spec.hello.clone();
        conn.say(
            &LinkFrame::Hello {
                hello,
                position,
                lane,
            },
            deadline,
        )?;
        // The standby's replicator may have to be asked first: it says so by closing, or by an
        // answer later than the socket's own deadline.
        let deadline = Instant::now() + timeout + Duration::from_secs(2);
        match conn.hear(deadline)? {
            LinkFrame::Welcome {
                position,
                window_bytes,
                session,
            } => Ok((
                conn,
                Welcomed {
                    position,
                    window_bytes,
                    session,
                },
            )),
            LinkFrame::Refused {
                version,
                forever,
                why,
            } => {
                let (forever, why) = match version::check(version) {
                    Ok(()) => (forever, why),
                    Err(e) => (true, e.to_string()),
                };
                Err(LinkError::Refused {
                    version,
                    forever,
                    why,
                })
            }
            _ => Err(LinkError::StreamBroken(
                "the peer did not answer the hello".into(),
            )),
        }
    }

    fn connect_link(&self, index: usize) -> Result<Arc<Link>, LinkError> {
        let (conn, welcomed) = self.greet(index, Lane::Data)?;
        let (beats, _) = self.greet(index, Lane::Beat)?;
        let mut state = lock(&self.state);
        if self.closed.load(SeqCst) {
            return Err(LinkError::Closed("closed on this side".into()));
        }
        let gen_id = state.next_gen;
        state.next_gen += 1;
        let link = Link::new(index, gen_id, conn, self.counters[index].clone())?;
        link.lane.attach(beats)?;
        state
            .tx
            .link_up(welcomed.session, welcomed.position, now_us())
            .map_err(|e| LinkError::StreamBroken(e.to_string()))?;
        let window = usize::try_from(welcomed.window_bytes).unwrap_or(usize::MAX);
        state.tx.set_window(self.spec.window_bytes.min(window));
        state.links[index] = Some(link.clone());
        self.heard_us.fetch_max(now_us(), SeqCst);
        state.event(OutEvent::LinkUp(index));
        drop(state);
        self.room.notify_all();
        self.news.notify_all();
        Ok(link)
    }

    fn link_down(&self, index: usize, why: &LinkError) {
        let mut state = lock(&self.state);
        if let Some(link) = state.links[index].take() {
            self.heard_us.fetch_max(link.last_heard_us(), SeqCst);
        }
        state.tx.link_down(index);
        if let LinkError::StreamBroken(why) = why {
            self.break_stream(&mut state, why.clone());
        }
        state.event(OutEvent::LinkDown(index, why.to_string()));
        for link in state.links.iter().flatten() {
            link.wake();
        }
        self.room.notify_all();
        self.news.notify_all();
    }
}

impl Side for Hub {
    fn take(&self, link: usize, gen_id: u64, bytes: usize) -> Vec<Outbound> {
        let now = now_us();
        let mut state = lock(&self.state);
        if !state.is_current(link, gen_id) || state.is_doubtful(link, now, self.doubtful_us()) {
            return Vec::new();
        }
        take_some(bytes, || state.tx.next(link, now))
    }

    fn has_next(&self, link: usize, gen_id: u64) -> bool {
        let now = now_us();
        let state = lock(&self.state);
        state.is_current(link, gen_id)
            && !state.is_doubtful(link, now, self.doubtful_us())
            && state.tx.has_next(link, now)
    }

    fn deliver(&self, link: usize, gen_id: u64, frames: Vec<RawFrame>) -> Result<(), LinkError> {
        let mut state = lock(&self.state);
        if !state.is_current(link, gen_id) {
            return Err(LinkError::Closed("replaced".into()));
        }
        for frame in frames {
            if !LinkFrame::is_kind(frame.header.kind) {
                let ready = state.rx.push(frame);
                if ready.map_err(|e| LinkError::StreamBroken(e.to_string()))? {
                    self.news.notify_all();
                }
                continue;
            }
            let LinkFrame::Position(position) = LinkFrame::decode(&frame)? else {
                return Err(LinkError::StreamBroken("a second handshake".into()));
            };
            let freed = state.tx.on_position(position, now_us());
            if freed.map_err(|e| LinkError::StreamBroken(e.to_string()))? || state.tx.is_received()
            {
                self.room.notify_all();
            }
        }
        Ok(())
    }

    fn position(&self) -> Position {
        lock(&self.state).rx.position()
    }

    fn take_tell(&self) -> bool {
        self.tell.swap(false, SeqCst)
    }
}

impl Beating for Hub {
    fn look(&self) -> Option<Look> {
        let state = try_lock(&self.state)?;
        let links = state.links.iter().flatten().cloned().collect();
        let several = state.links.iter().flatten().count() > 1;
        let late_at_us = several.then(|| state.tx.late_at_us()).flatten();
        Some(Look {
            links,
            position: state.rx.position(),
            late_at_us,
        })
    }
    fn heard_before_us(&self) -> u64 {
        self.heard_us.load(SeqCst)
    }
    fn silent(&self, silent: bool) {
        lock(&self.state).event(if silent {
            OutEvent::Silent
        } else {
            OutEvent::Alive
        });
        self.news.notify_all();
    }
}
