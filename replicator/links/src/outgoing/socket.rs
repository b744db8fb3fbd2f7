//! A connection from the right address, within a given time.

use crate::conn::LinkError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

/// Connects, from a given local address where one is named.
pub(super) fn connect_socket(
    from: Option<IpAddr>,
    to: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream, LinkError> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(ip) = from {
        socket.bind(&SocketAddr::new(ip, 0).into())?;
    }
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(nix::errno::Errno::EINPROGRESS as i32) => {
            let ms = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], ms) {
                Ok(0) => return Err(LinkError::Timeout(timeout)),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
            if let Some(e) = socket.take_error()? {
                return Err(e.into());
            }
        }
        Err(e) => return Err(e.into()),
    }
    Ok(socket.into())
}
