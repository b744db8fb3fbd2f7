//! One connection after negotiation: workers that take turns at receiving.

use super::handshake::{Agreed, CONTEXT_ID, bad};
use super::proto::*;
use crate::blocks::BLOCK_BYTES;
use crate::disk::Disk;
use crate::error::Result as DiskResult;
use crate::sys;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes fetched from the socket at once: several small requests in one system call.
const RX_BYTES: usize = 32 * 1024;

/// The largest buffer that a worker keeps for its next request.
const KEEP_BYTES: usize = 2 << 20;

/// A connection shared by its workers.
#[derive(Debug)]
pub(super) struct Conn {
    disk: Arc<Disk>,
    stream: UnixStream,
    agreed: Agreed,
    rx: Mutex<Rx>,
    tx: Mutex<()>,
}

#[derive(Debug)]
struct Rx {
    buf: Vec<u8>,
    at: usize,
    closed: bool,
}

impl Conn {
    pub(super) fn new(disk: Arc<Disk>, stream: UnixStream, agreed: Agreed) -> Self {
        let rx = Rx {
            buf: Vec::with_capacity(RX_BYTES),
            at: 0,
            closed: false,
        };
        Conn {
            disk,
            stream,
            agreed,
            rx: Mutex::new(rx),
            tx: Mutex::new(()),
        }
    }

    /// Serves until the client leaves or breaks the protocol; run by several threads.
    pub(super) fn work(&self) {
        let mut data = Vec::new();
        let mut out = Vec::new();
        loop {
            // One huge request must not pin its size for the life of the connection.
            for buf in [&mut data, &mut out] {
                if buf.capacity() > KEEP_BYTES {
                    *buf = Vec::new();
                }
            }
            let done = match self.receive(&mut data) {
                Ok(Some(r)) => self.answer(r, &mut data, &mut out),
                Ok(None) => return,
                Err(e) => Err(e),
            };
            if let Err(e) = done {
                // The other workers wake up with an end of file.
                if self.hang_up() && e.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::warn!(error = %e, "disk client broke off");
                }
                return;
            }
        }
    }

    /// True for the first who says so.
    fn hang_up(&self) -> bool {
        // Both directions end: a worker in the middle of a reply must not wait for ever either.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let mut rx = self.rx.lock().unwrap_or_else(PoisonError::into_inner);
        !std::mem::replace(&mut rx.closed, true)
    }

    /// The next request; a write's data goes into `data`. None at an orderly end.
    fn receive(&self, data: &mut Vec<u8>) -> io::Result<Option<Request>> {
        let mut rx = self.rx.lock().unwrap_or_else(PoisonError::into_inner);
        if rx.closed {
            return Ok(None);
        }
        let mut head = [0u8; REQUEST_BYTES];
        if !rx.head(&self.stream, &mut head)? {
            rx.closed = true;
            return Ok(None);
        }
        let r = Request::decode(&head).ok_or_else(|| bad("wrong request magic"))?;
        match r.kind {
            cmd::DISC => {
                rx.closed = true;
                return Ok(None);
            }
            cmd::WRITE if r.len > MAX_REQUEST => return Err(bad("a write over 32 MiB")),
            cmd::WRITE => {
                if data.capacity() == 0 {
                    *data = self.disk.buffer(r.len as usize);
                }
                rx.payload(&self.stream, data, r.len as usize)?;
            }
            _ => (),
        }
        Ok(Some(r))
    }

    fn answer(&self, r: Request, data: &mut Vec<u8>, out: &mut Vec<u8>) -> io::Result<()> {
        let fua = r.flags & cmd::FLAG_FUA != 0;
        let len = u64::from(r.len);
        if !r.flags_ok() {
            return self.status(r, libc::EINVAL as u32);
        }
        let done: DiskResult<()> = match r.kind {
            cmd::READ => return self.read(r, out),
            cmd::BLOCK_STATUS => return self.block_status(r),
            cmd::WRITE => self.disk.write(r.offset, data, fua),
            cmd::FLUSH => self.disk.flush(),
            cmd::TRIM => self.disk.zero(r.offset, len, true, fua),
            cmd::WRITE_ZEROES => {
                self.disk
                    .zero(r.offset, len, r.flags & cmd::FLAG_NO_HOLE == 0, fua)
            }
            _ => return self.status(r, libc::EINVAL as u32),
        };
        self.status(r, done.map_or_else(|e| logged(&e), |()| 0))
    }

    fn read(&self, r: Request, out: &mut Vec<u8>) -> io::Result<()> {
        if r.len > MAX_REQUEST {
            return self.status(r, libc::EINVAL as u32);
        }
        // Head and data in one buffer, so that one system call sends both.
        let head_len = if self.agreed.structured { 28 } else { 16 };
        let len = r.len as usize;
        if out.len() < head_len + len {
            out.resize(head_len + len, 0);
        }
        let all = &mut out[..head_len + len];
        if let Err(e) = self.disk.read(r.offset, &mut all[head_len..]) {
            return self.status(r, logged(&e));
        }
        if self.agreed.structured {
            let (kind, n) = if len == 0 {
                (chunk::NONE, 0)
            } else {
                (chunk::OFFSET_DATA, r.len + 8)
            };
            all[..20].copy_from_slice(&chunk_head(kind, r.cookie, n));
            all[20..28].copy_from_slice(&r.offset.to_be_bytes());
            let n = if len == 0 { 20 } else { all.len() };
            return self.send(&all[..n]);
        }
        all[..16].copy_from_slice(&simple_reply(0, r.cookie));
        self.send(all)
    }

    /// base:allocation: holes from the file system, in whole blocks so that the answer stays short.
    fn block_status(&self, r: Request) -> io::Result<()> {
        let end = r
            .offset
            .checked_add(u64::from(r.len))
            .filter(|e| *e <= self.disk.size());
        let (true, Some(end)) = (self.agreed.allocation && r.len > 0, end) else {
            return self.status(r, libc::EINVAL as u32);
        };
        const MAX_EXTENTS: usize = 1024;
        let one = r.flags & cmd::FLAG_REQ_ONE != 0;
        let mut body = CONTEXT_ID.to_be_bytes().to_vec();
        let mut at = r.offset;
        let mut extents = 0;
        let mut put = |body: &mut Vec<u8>, len: u64, state: u32| {
            body.extend_from_slice(&(len as u32).to_be_bytes());
            body.extend_from_slice(&state.to_be_bytes());
            extents += 1;
            one || extents >= MAX_EXTENTS
        };
        while at < end {
            let data = match self.disk.next_data(at, end) {
                Ok(d) => d.unwrap_or(end..end),
                Err(e) => return self.status(r, logged(&e)),
            };
            if data.start > at && put(&mut body, data.start - at, STATE_HOLE_ZERO) {
                break;
            }
            // Small holes are not worth an extent.
            let stop = data.end.next_multiple_of(BLOCK_BYTES).clamp(data.end, end);
            if stop > data.start && put(&mut body, stop - data.start, 0) {
                break;
            }
            at = stop.max(data.start);
        }
        let mut out = chunk_head(chunk::BLOCK_STATUS, r.cookie, body.len() as u32).to_vec();
        out.extend_from_slice(&body);
        self.send(&out)
    }

    /// An answer without data: done, or an error number.
    fn status(&self, r: Request, error: u32) -> io::Result<()> {
        if !self.agreed.structured || error == 0 && !matches!(r.kind, cmd::READ | cmd::BLOCK_STATUS)
        {
            return self.send(&simple_reply(error, r.cookie));
        }
        let mut out = chunk_head(chunk::ERROR, r.cookie, 6).to_vec();
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(&0u16.to_be_bytes());
        self.send(&out)
    }

    fn send(&self, all: &[u8]) -> io::Result<()> {
        let _turn = self.tx.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.stream).write_all(all)
    }
}

fn logged(e: &crate::error::DiskError) -> u32 {
    tracing::debug!(error = %e, "disk request failed");
    e.errno()
}

impl Rx {
    /// A request's head; false at an end of file between requests.
    fn head(&mut self, s: &UnixStream, head: &mut [u8; REQUEST_BYTES]) -> io::Result<bool> {
        let have = self.buf.len() - self.at;
        if have < REQUEST_BYTES {
            self.buf.drain(..self.at);
            self.at = 0;
            while self.buf.len() < REQUEST_BYTES {
                if sys::recv_some(s.as_fd(), &mut self.buf, RX_BYTES)? == 0 {
                    return if self.buf.is_empty() {
                        Ok(false)
                    } else {
                        Err(io::ErrorKind::UnexpectedEof.into())
                    };
                }
            }
        }
        head.copy_from_slice(&self.buf[self.at..self.at + REQUEST_BYTES]);
        self.at += REQUEST_BYTES;
        Ok(true)
    }

    /// A write's data: what is here already, then the rest straight from the socket.
    fn payload(&mut self, s: &UnixStream, data: &mut Vec<u8>, len: usize) -> io::Result<()> {
        data.clear();
        data.reserve_exact(len);
        let here = len.min(self.buf.len() - self.at);
        data.extend_from_slice(&self.buf[self.at..self.at + here]);
        self.at += here;
        sys::recv_until(s.as_fd(), data, len)
    }
}
