//! The one place with `unsafe`: receiving into memory that was not zeroed first.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Receives what there is, appending until the vector has at most `upto` bytes. 0 is end of file.
pub(crate) fn recv_some(fd: BorrowedFd<'_>, buf: &mut Vec<u8>, upto: usize) -> io::Result<usize> {
    let have = buf.len();
    let want = upto.saturating_sub(have);
    buf.reserve(want);
    let room = &mut buf.spare_capacity_mut()[..want];
    loop {
        // SAFETY: `room` is writable memory of `room.len()` bytes that the vector owns; the kernel
        // writes at most that many bytes into it and reads none of it.
        let n = unsafe { libc::recv(fd.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
        if n >= 0 {
            // SAFETY: recv initialised the first `n` bytes after the old length, and
            // `n <= room.len()`, so the new length is within the capacity.
            unsafe { buf.set_len(have + n as usize) };
            return Ok(n as usize);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// Receives until the vector has `len` bytes. `UnexpectedEof` when the peer closes before.
pub(crate) fn recv_until(fd: BorrowedFd<'_>, buf: &mut Vec<u8>, len: usize) -> io::Result<()> {
    while buf.len() < len {
        if recv_some(fd, buf, len)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}
