//! Signs of life, and the lack of them.
//!
//! A thread of its own, run before normal threads where the system allows it: the thread that
//! beats must not be the thread that works, or load looks like death. It
//! - sends a sign of life over each link that is idle,
//! - reports silence when *no* link was heard for `silent_after`, and life when one is heard again,
//! - ends a link that alone was silent for `link_dead_after`,
//! - rings the links when a frame is late on another.
//!
//! ```text
//!   unknown ──first link up──> alive <──────heard──────┐
//!                                └──nothing heard──> silent
//! ```
//! When this thread itself woke up late, this host stood still: the peer may have spoken all the
//! while, so silence is counted anew from then on.

use crate::link::{Link, now_us};
use crate::sys;
use havm_wire::hello::Position;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// Timers of a stream's links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    /// An idle link gives a sign of life this often.
    pub beat_every: Duration,
    /// Nothing heard over any link for this long is silence.
    pub silent_after: Duration,
    /// A link that was not heard for this long is given up and connected anew.
    pub link_dead_after: Duration,
    /// A frame not received for this long is also sent over an idle link.
    pub late_after: Duration,
    /// For connecting and for the handshake.
    pub connect_timeout: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Timers {
            beat_every: Duration::from_millis(20),
            silent_after: Duration::from_millis(150),
            link_dead_after: Duration::from_millis(400),
            late_after: Duration::from_millis(20),
            connect_timeout: Duration::from_secs(2),
        }
    }
}

impl Timers {
    /// The default, made for another time of silence.
    pub fn for_silence(silent_after: Duration) -> Self {
        let d = Timers::default();
        Timers {
            beat_every: d
                .beat_every
                .min(silent_after / 5)
                .max(Duration::from_millis(1)),
            silent_after,
            link_dead_after: d.link_dead_after.max(silent_after * 2),
            ..d
        }
    }
}

/// What the beat thread looks at.
#[derive(Default)]
pub(crate) struct Look {
    /// The links that are up.
    pub links: Vec<Arc<Link>>,
    pub position: Position,
    /// When a frame is late that another link could carry as well.
    pub late_at_us: Option<u64>,
}

/// What the beat thread needs from the stream.
pub(crate) trait Beating: Send + Sync {
    /// None where a worker holds the stream just now: it may not get the processor for long, and
    /// this thread must not wait for it.
    fn look(&self) -> Option<Look>;
    /// When a link came up or was heard that is gone by now, microseconds; 0 for never.
    fn heard_before_us(&self) -> u64;
    fn silent(&self, silent: bool);
}

/// Stops a beat thread, and others that sleep.
pub(crate) struct Stop(EventFd);

impl Stop {
    pub fn new() -> io::Result<Self> {
        Ok(Stop(EventFd::from_flags(
            EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
        )?))
    }

    pub fn stop(&self) {
        // Never read, so every sleeper sees it. Full means that it rings already.
        let _ = self.0.write(1);
    }

    /// Sleeps; true when it is over.
    pub fn sleep(&self, how_long: Duration) -> bool {
        self.sleep_or_hear(how_long, &[])
    }

    /// The same, but wakes also when one of the sockets can be read.
    pub fn sleep_or_hear(&self, how_long: Duration, sockets: &[Arc<TcpStream>]) -> bool {
        let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![wait(self.0.as_fd())];
        fds.extend(sockets.iter().map(|s| wait(s.as_fd())));
        match ppoll(&mut fds, Some(TimeSpec::from_duration(how_long)), None) {
            Ok(_) => fds[0].any().unwrap_or(false),
            Err(nix::errno::Errno::EINTR) => false,
            Err(e) => {
                // It cannot sleep in any better way.
                tracing::error!("poll failed: {e}");
                std::thread::sleep(how_long);
                false
            }
        }
    }

    /// The same as a descriptor, for those who poll themselves.
    pub fn bell(&self) -> &EventFd {
        &self.0
    }
}

/// The thread: until stopped.
pub(crate) fn run(side: &dyn Beating, timers: &Timers, stop: &Stop) {
    if let Err(e) = sys::run_first(2) {
        tracing::debug!("the beat thread runs with normal priority: {e}");
    }
    let us = |d: Duration| d.as_micros() as u64;
    let (every, silent_after) = (us(timers.beat_every), us(timers.silent_after));
    let dead_after = us(timers.link_dead_after);
    // Alive: Some(when something was heard last). Silent or unknown: none.
    let mut alive: Option<u64> = None;
    // Nothing older counts as silence: set when this thread was late.
    let mut grace_from = now_us();
    let mut wanted = now_us();
    let mut seen = Look::default();
    loop {
        let now = now_us();
        if now.saturating_sub(wanted) > silent_after / 2 {
            grace_from = now;
        }
        // What was seen last will do for once.
        if let Some(look) = side.look() {
            seen = look;
        }
        let links = &seen.links;
        let mut next = now + every;
        for link in links {
            link.beat(seen.position, every);
        }
        let before = Some(side.heard_before_us()).filter(|h| *h > 0);
        let links_heard = links
            .iter()
            .map(|l| l.heard_us(now.saturating_sub(silent_after)));
        if let Some(h) = links_heard
            .max()
            .max(before)
            .filter(|h| h + silent_after > now)
        {
            if alive.is_none() {
                side.silent(false);
            }
            alive = Some(h);
        }
        if let Some(last) = alive {
            let since = last.max(grace_from);
            if since + silent_after <= now {
                side.silent(true);
                alive = None;
            } else {
                next = next.min(since + silent_after);
            }
        }
        for link in links {
            let since = link
                .heard_us(now.saturating_sub(dead_after))
                .max(grace_from);
            if since + dead_after <= now {
                link.close(&format!("nothing heard for {} ms", dead_after / 1000));
            }
        }
        if let Some(late) = seen.late_at_us {
            if late <= now {
                links.iter().for_each(|l| {
                    l.wake();
                });
                next = next.min(now + us(timers.late_after) / 2);
            } else {
                next = next.min(late);
            }
        }
        wanted = next.max(now + 500);
        let lanes: Vec<_> = links.iter().filter_map(|l| l.lane.socket()).collect();
        if stop.sleep_or_hear(Duration::from_micros(wanted - now), &lanes) {
            return;
        }
    }
}
