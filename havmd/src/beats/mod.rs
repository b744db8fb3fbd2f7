//! Heartbeats on every link, and the verdict about the peer's host.
//!
//! ```text
//!   sender thread   (FIFO) ── every interval, absolute timer ──> one beat a link
//!   receiver thread (FIFO) <── datagrams with kernel time ── judge (session.rs) -> Detector
//!                          └── only changes ──> the daemon
//! ```
//! Both threads do nothing else: the daemon may be as busy as it likes. They share one small lock
//! that no other thread takes; what the daemon wants to see is copied out by the receiver.

mod packet;
mod rt;
mod session;
mod socket;

pub use packet::{FLAG_LEAVING, FLAG_READY};
pub use rt::{Scheduling, monotonic};
pub use session::LinkCounters;
pub use socket::BeatLink;

use crate::identity_store::PairKey;
use crate::random;
use havm_core::detector::{Detector, DetectorSettings};
use havm_core::event::Peer;
use havm_core::ids::NodeId;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use packet::{BEAT_BYTES, DirectionKey, Packet};
use session::Sessions;
use socket::LinkSocket;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the address of a link that is not there is tried again.
const REOPEN: Duration = Duration::from_millis(200);
/// Datagrams taken from one socket in a row; a flood must not keep a FIFO thread on the CPU.
const BATCH: usize = 64;
/// The pause after a full batch.
const FLOOD_PAUSE: Duration = Duration::from_millis(1);
/// How old what [`Beats::snapshot`] shows may be.
const PUBLISH: Duration = Duration::from_millis(50);

/// What to beat, and with whom.
#[derive(Debug, Clone)]
pub struct BeatSettings {
    /// This node.
    pub node: NodeId,
    /// The peer.
    pub peer: NodeId,
    /// The key that only both have.
    pub key: PairKey,
    /// The links, in the order of both nodes' config; at most 255.
    pub links: Vec<BeatLink>,
    /// Interval and thresholds.
    pub detector: DetectorSettings,
}

/// What the daemon is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeatEvent {
    /// The verdict about the peer's host changed, at that instant of [`monotonic`].
    Verdict {
        /// The verdict.
        peer: Peer,
        /// When it was reached.
        at: Duration,
    },
    /// The peer's daemon has started (anew).
    PeerSession {
        /// Its random number.
        session: u64,
    },
    /// The peer's flags changed, see [`FLAG_READY`].
    PeerFlags {
        /// The new ones.
        flags: u8,
    },
    /// A link became silent, or is heard again.
    Link {
        /// Its place in the config.
        link: usize,
        /// It is heard.
        up: bool,
    },
}

/// What a link shows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LinkSnapshot {
    /// Its beats came within the detection time.
    pub up: bool,
    /// Smoothed round trip time, microseconds.
    pub rtt_us: Option<u64>,
    /// How long ago the last beat came.
    pub heard_ago: Option<Duration>,
    /// Counters.
    pub counters: LinkCounters,
}

/// What all links show, at most some 50 ms old.
#[derive(Debug, Clone, PartialEq)]
pub struct BeatSnapshot {
    /// The verdict about the peer's host.
    pub peer: Peer,
    /// The peer's flags, from its last beat.
    pub peer_flags: u8,
    /// The peer's session.
    pub peer_session: Option<u64>,
    /// The links, in the order of the config.
    pub links: Vec<LinkSnapshot>,
    /// How punctual the threads may be.
    pub scheduling: Scheduling,
    /// The latest that a beat was sent after its time, since the start.
    pub latest_send: Duration,
}

struct Shared {
    settings: BeatSettings,
    session: u64,
    flags: AtomicU8,
    stop: AtomicBool,
    latest_send_us: AtomicU64,
    /// Of the two threads only.
    inner: Mutex<Inner>,
    /// For everyone; the receiver only tries to lock it.
    shown: Mutex<BeatSnapshot>,
}

struct Inner {
    sessions: Sessions,
    sockets: Vec<Option<Arc<LinkSocket>>>,
}

/// The running heartbeats; they end when this is dropped.
pub struct Beats {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Beats {
    /// Starts to beat and to listen. `tell` is called on the receiver's thread: it must not block.
    pub fn start(
        settings: BeatSettings,
        tell: impl FnMut(BeatEvent) + Send + 'static,
    ) -> io::Result<Self> {
        rt::lock_memory();
        // 0 means "no session" on the wire.
        let session = u64::from_le_bytes(random::bytes()?).max(1);
        let links = settings.links.len();
        if links > usize::from(u8::MAX) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "too many links",
            ));
        }
        let shared = Arc::new(Shared {
            session,
            flags: AtomicU8::new(0),
            stop: AtomicBool::new(false),
            latest_send_us: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                sessions: Sessions::new(session, links),
                sockets: settings.links.iter().map(|l| open(l, false)).collect(),
            }),
            shown: Mutex::new(BeatSnapshot {
                peer: Peer::Suspect,
                peer_flags: 0,
                peer_session: None,
                links: vec![LinkSnapshot::default(); links],
                scheduling: Scheduling::Normal,
                latest_send: Duration::ZERO,
            }),
            settings,
        });
        let mut beats = Beats {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        let for_sender = shared.clone();
        let thread = |name: &str| {
            std::thread::Builder::new()
                .name(name.into())
                .stack_size(256 * 1024)
        };
        beats
            .threads
            .push(thread("havm-beat-send").spawn(move || send_loop(&for_sender))?);
        beats
            .threads
            .push(thread("havm-beat-recv").spawn(move || Receiver::new(&shared, tell).run())?);
        Ok(beats)
    }

    /// This start's random number.
    pub fn session(&self) -> u64 {
        self.shared.session
    }

    /// What the next beats say of this node: [`FLAG_READY`], [`FLAG_LEAVING`].
    pub fn set_flags(&self, flags: u8) {
        self.shared.flags.store(flags, Ordering::Relaxed);
    }

    /// What the links show.
    pub fn snapshot(&self) -> BeatSnapshot {
        let mut shown = lock(&self.shared.shown).clone();
        shown.latest_send =
            Duration::from_micros(self.shared.latest_send_us.load(Ordering::Relaxed));
        shown
    }
}

impl Drop for Beats {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            // A panic in there was printed when it happened.
            let _ = t.join();
        }
    }
}

fn open(link: &BeatLink, again: bool) -> Option<Arc<LinkSocket>> {
    match LinkSocket::open(link) {
        Ok(s) => Some(Arc::new(s)),
        Err(e) => {
            if !again {
                tracing::warn!(local = %link.local, "no heartbeats on this link yet: {e}; is its card there and its address set? It is tried again");
            }
            None
        }
    }
}

fn send_loop(shared: &Shared) {
    let scheduling = rt::be_punctual();
    if scheduling != Scheduling::Fifo {
        tracing::warn!(
            ?scheduling,
            "heartbeats run without real-time priority: false alarms are possible on a busy host (run havmd as root, or allow it CAP_SYS_NICE)"
        );
    }
    let key = DirectionKey::new(&shared.settings.key, shared.settings.node);
    let interval = shared
        .settings
        .detector
        .interval
        .max(Duration::from_millis(1));
    let mut seqs = vec![0u64; shared.settings.links.len()];
    let mut due = rt::monotonic();
    while !shared.stop.load(Ordering::Relaxed) {
        for (link, seq) in seqs.iter_mut().enumerate() {
            let now = rt::monotonic();
            let (socket, echo) = {
                let inner = lock(&shared.inner);
                let socket = inner.sockets.get(link).cloned().flatten();
                (socket, inner.sessions.echo(link, now))
            };
            *seq += 1;
            let packet = Packet {
                // Fewer than 256: checked at the start.
                link: link as u8,
                flags: shared.flags.load(Ordering::Relaxed),
                session: shared.session,
                seq: *seq,
                sent: now,
                echo,
            };
            let sent = socket.is_some_and(|s| s.send(&packet.encode(&key)).is_ok());
            let mut inner = lock(&shared.inner);
            if let Some(c) = inner.sessions.counters(link) {
                if sent {
                    c.sent += 1;
                } else {
                    c.send_errors += 1;
                }
            }
        }
        due += interval;
        let now = rt::monotonic();
        if now > due + interval {
            // We were not run for a while: go on from here, no burst.
            due = now;
        }
        rt::sleep_until(due);
        let late = rt::monotonic().saturating_sub(due);
        let late = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
        shared.latest_send_us.fetch_max(late, Ordering::Relaxed);
    }
}

struct Receiver<'a, F> {
    shared: &'a Shared,
    tell: F,
    key: DirectionKey,
    detector: Detector,
    scheduling: Scheduling,
    flags: Option<u8>,
    links_up: Vec<bool>,
    reopen_at: Duration,
    publish_at: Duration,
}

impl<'a, F: FnMut(BeatEvent)> Receiver<'a, F> {
    fn new(shared: &'a Shared, tell: F) -> Self {
        let s = &shared.settings;
        Receiver {
            shared,
            tell,
            key: DirectionKey::new(&s.key, s.peer),
            detector: Detector::new(s.detector, s.links.len()),
            scheduling: Scheduling::Normal,
            flags: None,
            links_up: vec![false; s.links.len()],
            reopen_at: Duration::ZERO,
            publish_at: Duration::ZERO,
        }
    }

    fn run(mut self) {
        self.scheduling = rt::be_punctual();
        // The detector's first poll starts its clock.
        self.tick();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let sockets = self.sockets();
            self.wait(&sockets);
            let mut flood = false;
            for (link, socket) in sockets.iter().enumerate() {
                if let Some(socket) = socket {
                    flood |= self.drain(link, socket);
                }
            }
            self.tick();
            if flood {
                rt::sleep_until(rt::monotonic() + FLOOD_PAUSE);
            }
        }
    }

    /// The open sockets; those that could not be opened are tried again now and then.
    fn sockets(&mut self) -> Vec<Option<Arc<LinkSocket>>> {
        let sockets = lock(&self.shared.inner).sockets.clone();
        let now = rt::monotonic();
        if sockets.iter().all(Option::is_some) || now < self.reopen_at {
            return sockets;
        }
        self.reopen_at = now + REOPEN;
        let links = self.shared.settings.links.iter().zip(sockets);
        let sockets: Vec<_> = links.map(|(l, s)| s.or_else(|| open(l, true))).collect();
        lock(&self.shared.inner).sockets = sockets.clone();
        sockets
    }

    fn wait(&self, sockets: &[Option<Arc<LinkSocket>>]) {
        let mut fds: Vec<PollFd> = sockets
            .iter()
            .flatten()
            .map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN))
            .collect();
        let left = self
            .detector
            .next_deadline()
            .saturating_sub(rt::monotonic());
        // An interrupted or refused poll is only an early look at the sockets.
        if ppoll(&mut fds, Some(TimeSpec::from_duration(left)), None).is_err() {
            rt::sleep_until(rt::monotonic() + FLOOD_PAUSE);
        }
    }

    /// Takes what waits; whether there may be more.
    fn drain(&mut self, link: usize, socket: &LinkSocket) -> bool {
        // One byte more than a beat, so that a longer datagram is not taken for one.
        let mut buffer = [0; BEAT_BYTES + 1];
        for _ in 0..BATCH {
            // Errors here are a peer's "port unreachable" and the like: nothing came.
            let Ok(Some(a)) = socket.receive(&mut buffer) else {
                return false;
            };
            let bytes = buffer.get(..a.len).unwrap_or_default();
            let packet = a
                .from_peer
                .then(|| Packet::decode(bytes, &self.key))
                .flatten();
            let accepted = lock(&self.shared.inner).sessions.judge(link, packet, a.at);
            let Some(accepted) = accepted else { continue };
            self.detector.beat(link, accepted.beat, a.at);
            if accepted.new_session {
                let session = accepted.beat.session;
                (self.tell)(BeatEvent::PeerSession { session });
            }
            if self.flags.replace(accepted.flags) != Some(accepted.flags) {
                let flags = accepted.flags;
                (self.tell)(BeatEvent::PeerFlags { flags });
            }
        }
        true
    }

    fn tick(&mut self) {
        let now = rt::monotonic();
        let (peer, new) = self.detector.poll(now);
        if new {
            (self.tell)(BeatEvent::Verdict { peer, at: now });
        }
        let mut links_changed = false;
        for link in 0..self.links_up.len() {
            let heard = self
                .detector
                .links()
                .get(link)
                .is_some_and(|l| l.heard.is_some());
            let up = heard && !self.detector.link_lost(link, now);
            if self.links_up[link] != up {
                self.links_up[link] = up;
                links_changed = true;
                (self.tell)(BeatEvent::Link { link, up });
            }
        }
        if new || links_changed || now >= self.publish_at {
            self.publish(peer, now);
        }
    }

    fn publish(&mut self, peer: Peer, now: Duration) {
        self.publish_at = now + PUBLISH;
        let Ok(mut shown) = self.shared.shown.try_lock() else {
            return;
        };
        let mut inner = lock(&self.shared.inner);
        shown.peer = peer;
        shown.scheduling = self.scheduling;
        shown.peer_flags = self.flags.unwrap_or(0);
        shown.peer_session = inner.sessions.peer();
        for (i, l) in shown.links.iter_mut().enumerate() {
            if let (Some(view), Some(c)) =
                (self.detector.links().get(i), inner.sessions.counters(i))
            {
                *l = LinkSnapshot {
                    up: self.links_up[i],
                    rtt_us: view.rtt_us,
                    heard_ago: view.heard.map(|h| now.saturating_sub(h)),
                    counters: *c,
                };
            }
        }
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
