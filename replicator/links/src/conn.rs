//! One TLS connection over a non-blocking socket: frames in, frames out.

use crate::sys;
use crate::tls;
use havm_wire::DecodeError;
use havm_wire::hello::{LinkFrame, LinkFrameError};
use havm_wire::raw::{Encoded, RawFrame, Splitter, TooLarge};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use std::io::{self, BufRead, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Frames up to this size share TLS records with their neighbours, bytes.
const SMALL_BYTES: usize = 4096;
/// Fullest a shared record gets: TLS allows 16 KiB.
const RECORD_BYTES: usize = 16 << 10;
/// The kernel takes more only while less than this waits in it unsent, bytes.
const UNSENT_BYTES: u32 = 256 << 10;

/// Why a link failed. The stream goes on over the others, and the link is tried again.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket or TLS.
    #[error("{}", tls::explain_io(.0))]
    Io(#[from] io::Error),
    /// TLS.
    #[error("{}", tls::explain(.0))]
    Tls(#[from] rustls::Error),
    /// Bytes that are no frames.
    #[error("the peer sent a malformed frame: {0}")]
    Decode(#[from] DecodeError),
    /// The handshake of the stream.
    #[error("the peer's handshake is not usable: {0}")]
    Handshake(#[from] LinkFrameError),
    /// A frame of ours over the bounds.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// Nothing came in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The peer does not take the stream.
    #[error("refused by the peer (version {version}): {why}")]
    Refused {
        /// Its version.
        version: u32,
        /// For good.
        forever: bool,
        /// Its reason.
        why: String,
    },
    /// This end closed it.
    #[error("{0}")]
    Closed(String),
    /// It breaks the rules of the stream: no reconnect mends that.
    #[error("{0}")]
    StreamBroken(String),
}

/// A connection.
pub(crate) struct Conn {
    tls: Connection,
    sock: TcpStream,
    splitter: Splitter,
    small: Vec<u8>,
    /// Frames that came with the answer to the handshake.
    early: Vec<RawFrame>,
    /// All bytes given to the socket.
    pub sent_bytes: u64,
}

impl Conn {
    pub fn client(sock: TcpStream, config: Arc<ClientConfig>) -> Result<Self, LinkError> {
        let tls = ClientConnection::new(config, tls::server_name())?;
        Self::new(sock, tls.into())
    }

    pub fn server(sock: TcpStream, config: Arc<ServerConfig>) -> Result<Self, LinkError> {
        Self::new(sock, ServerConnection::new(config)?.into())
    }

    fn new(sock: TcpStream, mut tls: Connection) -> Result<Self, LinkError> {
        sock.set_nonblocking(true)?;
        sock.set_nodelay(true)?;
        if let Err(e) = sys::limit_unsent(&sock, UNSENT_BYTES) {
            tracing::debug!("cannot limit unsent bytes of a link: {e}");
        }
        // Bounded by the caller: a frame is queued only when the one before has left.
        tls.set_buffer_limit(None);
        Ok(Conn {
            tls,
            sock,
            splitter: Splitter::default(),
            small: Vec::with_capacity(RECORD_BYTES),
            early: Vec::new(),
            sent_bytes: 0,
        })
    }

    /// The socket, for those who wait for it, look into it or end it without the lock.
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.sock.try_clone()
    }

    /// Completes the TLS handshake.
    pub fn handshake(&mut self, deadline: Instant) -> Result<(), LinkError> {
        while self.tls.is_handshaking() {
            if self.tls.wants_write() {
                self.flush()?;
            }
            if !self.tls.is_handshaking() {
                break;
            }
            self.wait(deadline)?;
            if self.tls.wants_read() {
                self.fill()?;
            }
        }
        self.flush()?;
        Ok(())
    }

    /// Sends a link's own frame, all of it.
    pub fn say(&mut self, frame: &LinkFrame, deadline: Instant) -> Result<(), LinkError> {
        self.queue(&frame.encode()?, 0)?;
        while !self.flush()? {
            self.wait(deadline)?;
        }
        Ok(())
    }

    /// Waits for one link's own frame; what came right behind it is for [`Conn::take_early`].
    pub fn hear(&mut self, deadline: Instant) -> Result<LinkFrame, LinkError> {
        loop {
            let mut frames = Vec::new();
            self.drain(&mut frames)?;
            if !frames.is_empty() {
                self.early = frames.split_off(1);
                return Ok(LinkFrame::decode(&frames[0])?);
            }
            self.wait(deadline)?;
            self.fill()?;
        }
    }

    /// Frames that came with the last one heard.
    pub fn take_early(&mut self) -> Vec<RawFrame> {
        std::mem::take(&mut self.early)
    }

    fn wait(&self, deadline: Instant) -> Result<(), LinkError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut flags = PollFlags::POLLIN;
        if self.tls.wants_write() {
            flags |= PollFlags::POLLOUT;
        }
        let ms = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.sock.as_fd(), flags)], ms) {
            Ok(0) => Err(LinkError::Timeout(left)),
            Ok(_) | Err(nix::errno::Errno::EINTR) if !left.is_zero() => Ok(()),
            Ok(_) | Err(nix::errno::Errno::EINTR) => Err(LinkError::Timeout(left)),
            Err(e) => Err(io::Error::from(e).into()),
        }
    }

    /// Takes a frame to be sent with number `seq`; [`Conn::flush`] sends it.
    pub fn queue(&mut self, frame: &Encoded, seq: u64) -> Result<(), LinkError> {
        let header = frame.header(seq);
        if self.small.len() + header.len() + frame.payload().len() > RECORD_BYTES {
            self.seal_small()?;
        }
        self.small.extend_from_slice(&header);
        if frame.payload().len() <= SMALL_BYTES {
            self.small.extend_from_slice(frame.payload());
            return Ok(());
        }
        // Fill the record that the header opened, then whole records from the frame itself.
        let head = (RECORD_BYTES - self.small.len()).min(frame.payload().len());
        self.small.extend_from_slice(&frame.payload()[..head]);
        self.seal_small()?;
        self.tls.writer().write_all(&frame.payload()[head..])?;
        Ok(())
    }

    fn seal_small(&mut self) -> io::Result<()> {
        if !self.small.is_empty() {
            self.tls.writer().write_all(&self.small)?;
            self.small.clear();
        }
        Ok(())
    }

    /// Bytes wait for the socket.
    pub fn is_blocked(&self) -> bool {
        self.tls.wants_write()
    }

    /// Sends what is queued, as far as the socket takes it. True when all went out.
    pub fn flush(&mut self) -> io::Result<bool> {
        self.seal_small()?;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.sock) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.sent_bytes += n as u64,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Reads once; the frames that became whole are appended. How many bytes came: 0 when
    /// there is nothing to read now.
    pub fn read(&mut self, frames: &mut Vec<RawFrame>) -> Result<usize, LinkError> {
        let n = self.fill()?;
        self.drain(frames)?;
        Ok(n)
    }

    fn fill(&mut self) -> Result<usize, LinkError> {
        match self.tls.read_tls(&mut self.sock) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the peer closed the connection",
            )
            .into()),
            Ok(n) => {
                if let Err(e) = self.tls.process_new_packets() {
                    // The alert tells the other end why.
                    let _ = self.tls.write_tls(&mut self.sock);
                    return Err(e.into());
                }
                Ok(n)
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(0)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn drain(&mut self, frames: &mut Vec<RawFrame>) -> Result<(), LinkError> {
        let mut reader = self.tls.reader();
        loop {
            let n = match reader.fill_buf() {
                Ok([]) => break,
                Ok(bytes) => {
                    self.splitter.push(bytes, |f| frames.push(f))?;
                    bytes.len()
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            };
            reader.consume(n);
        }
        Ok(())
    }
}
