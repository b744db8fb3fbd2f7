//! Ports to listen on.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::AsFd;

/// No port could be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The system refused.
    #[error("cannot listen on {addr}: {source}; is the address configured on this host?")]
    Bind {
        /// Address and last port tried.
        addr: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// Nothing to bind to.
    #[error("no replication link is configured: there is no address to listen on")]
    NoAddress,
}

/// Listens on each address, at the first free port of the range.
pub(crate) fn bind_all(
    addresses: &[IpAddr],
    ports: &RangeInclusive<u16>,
) -> Result<Vec<TcpListener>, ListenError> {
    if addresses.is_empty() {
        return Err(ListenError::NoAddress);
    }
    addresses.iter().map(|ip| bind_one(*ip, ports)).collect()
}

fn bind_one(ip: IpAddr, ports: &RangeInclusive<u16>) -> Result<TcpListener, ListenError> {
    let mut last = None;
    for port in ports.clone() {
        let addr = SocketAddr::new(ip, port);
        match TcpListener::bind(addr) {
            Ok(listener) => {
                let made = listener.set_nonblocking(true).map(|()| listener);
                return made.map_err(|source| ListenError::Bind { addr, source });
            }
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                last = Some(ListenError::Bind { addr, source });
            }
            Err(source) => return Err(ListenError::Bind { addr, source }),
        }
    }
    Err(last.unwrap_or(ListenError::NoAddress))
}

/// The next connection; none when the bell rang or the connection is gone already.
pub(crate) fn accept(
    listener: &TcpListener,
    bell: &EventFd,
) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
    match poll(
        &mut [wait(listener.as_fd()), wait(bell.as_fd())],
        PollTimeout::NONE,
    ) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(e.into()),
    }
    match listener.accept() {
        Ok(accepted) => Ok(Some(accepted)),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}
