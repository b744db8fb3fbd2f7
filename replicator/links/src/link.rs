//! A connection that carries the stream: the thread that works on it, and what others see of it.
//!
//! One thread per link reads, decrypts, encrypts and writes. It sleeps in `poll` on its socket and
//! on an eventfd; whoever has something to send wakes one sleeping link. The beat thread
//! ([`crate::beat`]) borrows the connection for a sign of life when nothing was sent for a while.

use crate::conn::{Conn, LinkError};
use crate::lane::BeatLane;
use havm_wire::hello::{LinkFrame, Position};
use havm_wire::raw::RawFrame;
use havm_wire::sender::Outbound;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Instant;

/// Bytes queued before they are sent: enough to keep the cipher and the socket busy.
const FILL_BYTES: usize = 64 << 10;
/// Reads in a row before it is looked whether something is to be sent.
const READS: usize = 16;
/// A position is told at the latest after this many bytes, bytes.
const TELL_BYTES: usize = 128 << 10;

/// Microseconds since this process first asked.
pub(crate) fn now_us() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_micros() as u64
}

/// A poisoned lock means that a thread of ours panicked, which it reported; the data behind our
/// locks is whole at every point where that can happen.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the calling thread run sooner than normal ones (nice -10): for threads on the way of an
/// epoch or its ack, which held output waits for. Without CAP_SYS_NICE nothing changes.
pub fn run_sooner() {
    if let Err(e) = crate::sys::run_sooner() {
        tracing::debug!("a thread of the stream keeps its normal priority: {e}");
    }
}

/// The same, if it is free.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Traffic of one link since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub sent_bytes: AtomicU64,
    pub received_bytes: AtomicU64,
    pub resent_frames: AtomicU64,
    pub resent_bytes: AtomicU64,
    pub connects: AtomicU64,
}

/// Traffic of one link since the start, encrypted bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// The link carries the stream now.
    pub up: bool,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Frames that had been given to a link before.
    pub resent_frames: u64,
    /// Their bytes.
    pub resent_bytes: u64,
    /// How often it was connected.
    pub connects: u64,
}

impl Counters {
    pub fn read(&self, up: bool) -> LinkCounters {
        LinkCounters {
            up,
            sent_bytes: self.sent_bytes.load(SeqCst),
            received_bytes: self.received_bytes.load(SeqCst),
            resent_frames: self.resent_frames.load(SeqCst),
            resent_bytes: self.resent_bytes.load(SeqCst),
            connects: self.connects.load(SeqCst),
        }
    }
}

/// What a link's thread needs from the stream that it carries. `gen_id` names the connection: one
/// that was replaced gets and delivers nothing more.
pub(crate) trait Side: Send + Sync {
    /// The frames that `link` should send now, until they have `bytes` together.
    fn take(&self, link: usize, gen_id: u64, bytes: usize) -> Vec<Outbound>;
    fn has_next(&self, link: usize, gen_id: u64) -> bool;
    fn deliver(&self, link: usize, gen_id: u64, frames: Vec<RawFrame>) -> Result<(), LinkError>;
    fn position(&self) -> Position;
    /// Taken once: the consumer freed enough to be told soon.
    fn take_tell(&self) -> bool;
}

/// Frames of `next` until they have `bytes` together.
pub(crate) fn take_some(bytes: usize, mut next: impl FnMut() -> Option<Outbound>) -> Vec<Outbound> {
    let mut frames = Vec::new();
    let mut filled = 0;
    while filled < bytes
        && let Some(out) = next()
    {
        filled += out.frame.wire_bytes();
        frames.push(out);
    }
    frames
}

/// A connection, seen from all threads.
pub(crate) struct Link {
    pub index: usize,
    pub gen_id: u64,
    conn: Mutex<Conn>,
    sock: TcpStream,
    wake: EventFd,
    asleep: AtomicBool,
    heard_us: AtomicU64,
    spoke_us: AtomicU64,
    closed: Mutex<Option<String>>,
    counters: Arc<Counters>,
    /// Its second connection.
    pub lane: BeatLane,
}

impl Link {
    pub fn new(
        index: usize,
        gen_id: u64,
        conn: Conn,
        counters: Arc<Counters>,
    ) -> Result<Arc<Self>, LinkError> {
        let sock = conn.socket()?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(io::Error::from)?;
        counters.connects.fetch_add(1, SeqCst);
        Ok(Arc::new(Link {
            index,
            gen_id,
            conn: Mutex::new(conn),
            sock,
            wake,
            asleep: AtomicBool::new(false),
            heard_us: AtomicU64::new(now_us()),
            spoke_us: AtomicU64::new(now_us()),
            closed: Mutex::new(None),
            counters,
            lane: BeatLane::default(),
        }))
    }

    /// Ends the link from any thread; its own thread returns with this reason.
    pub fn close(&self, why: &str) {
        lock(&self.closed).get_or_insert_with(|| why.to_owned());
        let _ = self.sock.shutdown(Shutdown::Both);
        self.ring();
    }

    /// Wakes its thread if that sleeps. True if it did.
    pub fn wake(&self) -> bool {
        let asleep = self.asleep.swap(false, SeqCst);
        if asleep {
            self.ring();
        }
        asleep
    }

    /// Does the link's work in the caller's thread, if its own sleeps: for a small frame that is
    /// waited for, it saves a change of threads. True if it did, or woke the thread instead.
    pub fn send_now(&self, side: &dyn Side) -> bool {
        if !self.asleep.swap(false, SeqCst) {
            return false;
        }
        let free = try_lock(&self.conn).is_some_and(|c| !c.is_blocked());
        let sent = if free {
            self.send_what_is_there(side)
        } else {
            Ok(true)
        };
        if let Err(why) = &sent {
            self.close(&why.to_string());
        }
        // The thread still sleeps as before; from here on others ring it again. It has to look
        // itself where the socket is full, and where more came just now.
        self.asleep.store(true, SeqCst);
        if !matches!(sent, Ok(false)) || side.has_next(self.index, self.gen_id) {
            self.wake();
        }
        true
    }

    fn ring(&self) {
        // Full means that it rings already.
        let _ = self.wake.write(1);
    }

    /// When something was last heard, now at the latest where unread bytes wait in the socket:
    /// then it is this host that is late, not the peer.
    pub fn heard_us(&self, silent_before_us: u64) -> u64 {
        let heard = self.last_heard_us();
        if heard < silent_before_us && matches!(self.sock.peek(&mut [0]), Ok(1..)) {
            return now_us();
        }
        heard
    }

    /// When it was last heard on either connection, without a look into the socket.
    pub fn last_heard_us(&self) -> u64 {
        self.heard_us.load(SeqCst).max(self.lane.heard_us())
    }

    /// For the beat thread, which never waits here: speaks where nothing was said for `every_us`,
    /// on both connections, and hears what the peer says on the second.
    pub fn beat(&self, position: Position, every_us: u64) {
        let mut said = self.lane.exchange(position, every_us);
        // Data connections too: the position frees the peer's memory. Who works on it speaks itself.
        if self.spoke_us.load(SeqCst) + every_us <= now_us()
            && let Some(mut conn) = try_lock(&self.conn)
        {
            self.spoke_us.store(now_us(), SeqCst);
            let done = match conn.is_blocked() {
                true => conn.flush().map(drop).map_err(LinkError::from),
                false => {
                    say_position(&mut conn, position).and_then(|()| Ok(conn.flush().map(drop)?))
                }
            };
            self.count_sent(&mut conn);
            said = said.and(done);
        }
        if let Err(why) = said {
            self.close(&why.to_string());
            // At once: the beat thread polls this socket, and it stays readable.
            self.lane.close();
        }
    }

    fn count_sent(&self, conn: &mut Conn) {
        let n = std::mem::take(&mut conn.sent_bytes);
        self.counters.sent_bytes.fetch_add(n, SeqCst);
        if n > 0 {
            self.spoke_us.store(now_us(), SeqCst);
        }
    }

    /// Carries the stream until the link fails; the reason.
    pub fn run(&self, side: &dyn Side) -> LinkError {
        run_sooner();
        let error = match self.work(side) {
            Ok(never) => match never {},
            Err(e) => e,
        };
        let _ = self.sock.shutdown(Shutdown::Both);
        self.lane.close();
        match lock(&self.closed).take() {
            Some(why) => LinkError::Closed(why),
            None => error,
        }
    }

    fn work(&self, side: &dyn Side) -> Result<std::convert::Infallible, LinkError> {
        let mut told = Position::default();
        let mut tell = true;
        let early = lock(&self.conn).take_early();
        side.deliver(self.index, self.gen_id, early)?;
        loop {
            let blocked = self.send(side, &mut told, tell)?;
            tell = false;
            let readable = self.sleep(side, blocked)?;
            if lock(&self.closed).is_some() {
                return Err(LinkError::Closed(String::new()));
            }
            if readable {
                tell = self.receive(side)?;
            }
            tell |= side.take_tell();
        }
    }

    /// Sends what there is to send. True when the socket is full.
    fn send(&self, side: &dyn Side, told: &mut Position, tell: bool) -> Result<bool, LinkError> {
        let position = Some(side.position()).filter(|p| tell && p != told);
        let mut conn = lock(&self.conn);
        if let Some(position) = position {
            say_position(&mut conn, position)?;
            *told = position;
        }
        let all = conn.flush()?;
        self.count_sent(&mut conn);
        drop(conn);
        if all {
            self.send_what_is_there(side)
        } else {
            Ok(true)
        }
    }

    /// Sends frames until there are none, or the socket is full (true).
    fn send_what_is_there(&self, side: &dyn Side) -> Result<bool, LinkError> {
        loop {
            // Taken before the connection is locked: who holds that lock must not wait for the
            // stream's, which lends no priority.
            let frames = side.take(self.index, self.gen_id, FILL_BYTES);
            let mut conn = lock(&self.conn);
            for out in &frames {
                conn.queue(&out.frame, out.seq)?;
            }
            let all = conn.flush()?;
            self.count_sent(&mut conn);
            drop(conn);
            for out in frames.iter().filter(|out| out.again) {
                let bytes = out.frame.wire_bytes() as u64;
                self.counters.resent_frames.fetch_add(1, SeqCst);
                self.counters.resent_bytes.fetch_add(bytes, SeqCst);
            }
            if !all || frames.is_empty() {
                return Ok(!all);
            }
        }
    }

    /// Waits until there is something to do. True when the socket can be read.
    fn sleep(&self, side: &dyn Side, blocked: bool) -> Result<bool, LinkError> {
        let mut flags = PollFlags::POLLIN;
        let mut timeout = PollTimeout::NONE;
        if blocked {
            flags |= PollFlags::POLLOUT;
        } else {
            // From here on whoever queues a frame rings; what was queued before is seen here.
            self.asleep.store(true, SeqCst);
            if side.has_next(self.index, self.gen_id) {
                timeout = PollTimeout::ZERO;
            }
        }
        let mut fds = [
            PollFd::new(self.sock.as_fd(), flags),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
        ];
        let polled = poll(&mut fds, timeout);
        self.asleep.store(false, SeqCst);
        match polled {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
        let events = |i: usize| fds[i].revents().unwrap_or(PollFlags::empty());
        let (sock, rung) = (events(0), events(1));
        if rung.contains(PollFlags::POLLIN) {
            let _ = self.wake.read();
        }
        Ok(sock.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR))
    }

    /// Reads and delivers. True when it is time to tell the peer where we stand.
    fn receive(&self, side: &dyn Side) -> Result<bool, LinkError> {
        let mut bytes = 0;
        for _ in 0..READS {
            let mut frames = Vec::new();
            let read = lock(&self.conn).read(&mut frames);
            // What came whole before an error counts.
            let n = read.as_ref().copied().unwrap_or(0);
            if n > 0 {
                self.heard_us.store(now_us(), SeqCst);
                self.counters.received_bytes.fetch_add(n as u64, SeqCst);
            }
            if !frames.is_empty() {
                side.deliver(self.index, self.gen_id, frames)?;
            }
            read?;
            bytes += n;
            if n == 0 || bytes >= TELL_BYTES {
                break;
            }
        }
        Ok(true)
    }
}

fn say_position(conn: &mut Conn, position: Position) -> Result<(), LinkError> {
    conn.queue(&LinkFrame::Position(position).encode()?, 0)
}
