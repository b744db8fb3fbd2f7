//! A link's UDP socket, with the kernel's own time of each datagram's arrival.

use super::rt;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::sockopt::{Priority, ReceiveTimestampns};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt};
use nix::sys::time::TimeSpec;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// Both ends of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeatLink {
    /// This node's address and port.
    pub local: SocketAddr,
    /// The peer's.
    pub peer: SocketAddr,
}

/// An open socket of a link.
#[derive(Debug)]
pub struct LinkSocket {
    socket: UdpSocket,
    peer: SocketAddr,
}

/// A datagram.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// How many bytes of the buffer it filled.
    pub len: usize,
    /// It came from the peer's address.
    pub from_peer: bool,
    /// When the kernel had it, by the monotonic clock.
    pub at: Duration,
}

impl LinkSocket {
    /// Opens it. Fails while the address is not there (a link without its card): try again later.
    pub fn open(link: &BeatLink) -> io::Result<Self> {
        let socket = UdpSocket::bind(link.local)?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, ReceiveTimestampns, &true)?;
        // Ahead of bulk data in the card's queue, where the system lets us.
        let _ = setsockopt(&socket, Priority, &6);
        Ok(LinkSocket {
            socket,
            peer: link.peer,
        })
    }

    /// Sends without waiting.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.socket.send_to(bytes, self.peer).map(drop)
    }

    /// The next datagram that waits; `None` when none does.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Arrival>> {
        let mut control = cmsg_space!(libc::timespec);
        let mut parts = [IoSliceMut::new(buffer)];
        let fd = self.socket.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut control), flags) {
            Err(Errno::EAGAIN) => return Ok(None),
            other => other?,
        };
        let mut stamp = None;
        if let Ok(messages) = message.cmsgs() {
            for m in messages {
                if let ControlMessageOwned::ScmTimestampns(t) = m {
                    stamp = Some(t);
                }
            }
        }
        // A datagram that is longer than the buffer is cut, and fails its authentication.
        Ok(Some(Arrival {
            len: message.bytes,
            from_peer: message
                .address
                .is_some_and(|a| ip(&a) == Some(self.peer.ip())),
            at: arrival(stamp),
        }))
    }
}

impl AsFd for LinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// From the wall clock to the monotonic one, by how long ago it was. A wall clock that was set in
/// between must not move an arrival by more than it can really have waited.
fn arrival(stamp: Option<TimeSpec>) -> Duration {
    let now = rt::monotonic();
    let Some(stamp) = stamp else { return now };
    let waited = rt::realtime().saturating_sub(Duration::from(stamp));
    if waited < Duration::from_secs(1) {
        now.saturating_sub(waited)
    } else {
        now
    }
}

fn ip(a: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = a
        .as_sockaddr_in()
        .map(|a| SocketAddrV4::from(*a).ip().to_owned().into());
    v4.or_else(|| {
        a.as_sockaddr_in6()
            .map(|a| SocketAddrV6::from(*a).ip().to_owned().into())
    })
}
