//! The line-oriented socket under the monitor: bounded lines, deadlines, descriptors sent along.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, MsgFlags, getsockopt, recv, sendmsg, sockopt::PeerCredentials,
};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest line accepted. The longest that QEMU sends in earnest (`info mtree`, schemas) stay
/// below 1 MiB.
pub const MAX_LINE_BYTES: usize = 8 * 1024 * 1024;

const READ_BYTES: usize = 64 * 1024;

/// Why no line came.
#[derive(Debug)]
pub(crate) enum LineError {
    Closed,
    Timeout,
    TooLong,
    Io(std::io::Error),
}

pub(crate) struct LineSocket {
    stream: UnixStream,
    buf: Vec<u8>,
    /// Start of the unread bytes in `buf`.
    start: usize,
    /// End of the unread bytes in `buf`.
    end: usize,
    /// Up to here no newline was found.
    searched: usize,
}

impl LineSocket {
    pub(crate) fn connect(path: &Path) -> std::io::Result<LineSocket> {
        let stream = UnixStream::connect(path)?;
        Ok(LineSocket {
            stream,
            buf: vec![0; READ_BYTES],
            start: 0,
            end: 0,
            searched: 0,
        })
    }

    /// The pid of the process that listens, as our pid namespace sees it; `None` if it does not.
    pub(crate) fn peer_pid(&self) -> std::io::Result<Option<u32>> {
        let cred = getsockopt(&self.stream, PeerCredentials)?;
        Ok(u32::try_from(cred.pid()).ok().filter(|p| *p != 0))
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Sends all of `line`, with `fd` along with its first byte.
    pub(crate) fn send(
        &mut self,
        mut line: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), LineError> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        while !line.is_empty() {
            let raw = fd.map(|f| [f.as_raw_fd()]);
            let rights = raw.as_ref().map(|r| [ControlMessage::ScmRights(r)]);
            let control: &[ControlMessage<'_>] = rights.as_ref().map_or(&[], |r| &r[..]);
            match sendmsg::<()>(self.raw_fd(), &[IoSlice::new(line)], control, flags, None) {
                Ok(0) => return Err(LineError::Closed),
                Ok(n) => {
                    line = &line[n..];
                    fd = None;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, deadline)?,
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => {
                    return Err(LineError::Closed);
                }
                Err(e) => return Err(LineError::Io(e.into())),
            }
        }
        Ok(())
    }

    /// The next whole line, without its newline; waits until `deadline` at most. What is already
    /// there is returned even if the deadline has passed.
    pub(crate) fn line(&mut self, deadline: Instant) -> Result<&[u8], LineError> {
        loop {
            let fresh = &self.buf[self.searched..self.end];
            if let Some(i) = fresh.iter().position(|b| *b == b'\n') {
                let (from, to) = (self.start, self.searched + i);
                self.start = to + 1;
                self.searched = self.start;
                return Ok(&self.buf[from..to]);
            }
            self.searched = self.end;
            if self.end - self.start > MAX_LINE_BYTES {
                return Err(LineError::TooLong);
            }
            self.fill(deadline)?;
        }
    }

    fn fill(&mut self, deadline: Instant) -> Result<(), LineError> {
        if self.start == self.end {
            (self.start, self.end, self.searched) = (0, 0, 0);
        } else if self.end == self.buf.len() && self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.searched -= self.start;
            self.start = 0;
        }
        if self.end == self.buf.len() {
            self.buf.resize(self.buf.len() * 2, 0);
        }
        loop {
            let fd = self.stream.as_raw_fd();
            // A first try without poll: a reply that is there already costs one system call.
            match recv(fd, &mut self.buf[self.end..], MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(LineError::Closed),
                Ok(n) => {
                    self.end += n;
                    return Ok(());
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, deadline)?,
                Err(Errno::ECONNRESET | Errno::ENOTCONN) => return Err(LineError::Closed),
                Err(e) => return Err(LineError::Io(e.into())),
            }
        }
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> Result<(), LineError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LineError::Timeout);
            }
            // Rounded up, so that the last millisecond is not a busy loop.
            let ms = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
            let timeout = PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.stream.as_fd(), what)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(LineError::Io(e.into())),
            }
        }
    }
}

/// The farthest deadline that makes sense; keeps `Instant` arithmetic from overflowing.
pub(crate) fn deadline_in(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(Duration::from_secs(86_400))
}
