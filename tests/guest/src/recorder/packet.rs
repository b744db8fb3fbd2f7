//! A raw packet socket on one interface. All `unsafe` of the recorder is here.

use anyhow::{Context, Result};
use nix::errno::Errno;
use std::ffi::{CString, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Room for what comes while the recorder does not run.
const BUFFER_BYTES: c_int = 64 << 20;

/// A socket that gets every frame of an interface.
pub struct PacketSocket {
    fd: OwnedFd,
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl PacketSocket {
    /// Opens it; needs root.
    pub fn open(interface: &str) -> Result<PacketSocket> {
        let open = || -> io::Result<PacketSocket> {
            let name = CString::new(interface).map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: a NUL-terminated string.
            let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
            if index == 0 {
                return Err(io::Error::last_os_error());
            }
            let all = (libc::ETH_P_ALL as u16).to_be();
            // SAFETY: no memory is passed; the fd is ours alone.
            let fd = unsafe {
                let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
                OwnedFd::from_raw_fd(check(libc::socket(
                    libc::AF_PACKET,
                    kind,
                    c_int::from(all),
                ))?)
            };
            // SAFETY: sockaddr_ll is plain numbers, all zeros is a valid value of it.
            let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            at.sll_family = libc::AF_PACKET as u16;
            at.sll_protocol = all;
            at.sll_ifindex = index as c_int;
            // SAFETY: the address and its size belong together.
            check(unsafe {
                libc::bind(
                    fd.as_raw_fd(),
                    (&raw const at).cast(),
                    size_of_val(&at) as u32,
                )
            })?;
            let socket = PacketSocket { fd };
            socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &BUFFER_BYTES)?;
            let wait = libc::timeval {
                tv_sec: 0,
                tv_usec: 100_000,
            };
            socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
            Ok(socket)
        };
        open().with_context(|| format!("recording {interface}"))
    }

    fn set<T>(&self, level: c_int, option: c_int, value: &T) -> io::Result<()> {
        // SAFETY: the value is a live object of the size given.
        check(unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast::<c_void>(),
                size_of::<T>() as u32,
            )
        })?;
        Ok(())
    }

    /// The next frame that came in (those that go out are skipped); none when nothing came for a
    /// tenth of a second, or one that was skipped.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        // SAFETY: sockaddr_ll is plain numbers, all zeros is a valid value of it.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut from_len = size_of_val(&from) as u32;
        // SAFETY: buffer and address are live for the call and their sizes are given.
        let got = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
                (&raw mut from).cast(),
                &raw mut from_len,
            )
        };
        if got < 0 {
            return match Errno::last() {
                Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN => Ok(None),
                e => Err(e.into()),
            };
        }
        let outgoing = from.sll_pkttype == libc::PACKET_OUTGOING;
        Ok((!outgoing).then_some(got as usize))
    }

    /// Frames that the kernel dropped for want of room since the last call.
    pub fn dropped(&self) -> u64 {
        const PACKET_STATISTICS: c_int = 6; // linux/if_packet.h
        let mut counts = [0u32; 2]; // struct tpacket_stats: packets, drops
        let mut len = size_of_val(&counts) as u32;
        // SAFETY: the kernel writes at most `len` bytes.
        let result = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_STATISTICS,
                counts.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result == 0 { u64::from(counts[1]) } else { 0 }
    }
}
