//! The guest's side: AF_PACKET sockets on its tap, with virtio-net headers (packet(7)).
//!
//! One socket receives what the guest sends, another sends to the guest. The receiving one ignores
//! what the host sends; the sending one skips the queueing discipline, and what the tap's bounded
//! queue does not take is dropped there: sending never blocks, however long QEMU stands still.

use crate::error::{GateError, last};
use crate::iface::IfName;
use crate::vlan;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const PACKET_AUXDATA: libc::c_int = 8;
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_QDISC_BYPASS: libc::c_int = 20;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const PACKET_STATISTICS: libc::c_int = 6;
const TP_STATUS_CSUMNOTREADY: u32 = 1 << 3;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// Bytes of a virtio-net header without the count of merged buffers.
pub(crate) const VNET_HDR: usize = 10;

/// How much unread output the kernel keeps for us, bytes of its own accounting.
const RECEIVE_BUFFER: libc::c_int = 8 << 20;
const SEND_BUFFER: libc::c_int = 4 << 20;

fn option<T>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: `value` is read for exactly its size.
    let r = unsafe {
        let p = (value as *const T).cast();
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            p,
            size_of::<T>() as libc::socklen_t,
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A packet socket that is not bound yet, and so gets nothing.
fn socket(dev: &IfName) -> Result<OwnedFd, GateError> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: plain system call; its result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(last("open a packet socket", dev.as_str()));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(fd: &OwnedFd, dev: &IfName, protocol: u16) -> Result<(), GateError> {
    let index = dev
        .index()
        .ok_or_else(|| last("find the interface", dev.as_str()))?;
    // SAFETY: plain data, for which all zeroes is valid.
    let mut a: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    a.sll_family = libc::AF_PACKET as u16;
    a.sll_protocol = protocol.to_be();
    a.sll_ifindex = index;
    // SAFETY: `a` is a whole sockaddr_ll that lives over the call.
    let r = unsafe {
        let p = (&raw const a).cast();
        libc::bind(
            fd.as_raw_fd(),
            p,
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if r < 0 {
        Err(last("bind to the interface", dev.as_str()))
    } else {
        Ok(())
    }
}

/// What became of an attempt to read a frame.
pub(crate) enum Got {
    /// A frame, header first, at this place of the buffer.
    Frame { start: usize, len: usize },
    /// There is none.
    Nothing,
    /// One that cannot be used; it is gone.
    Unusable,
}

/// Reads what the guest sends.
pub(crate) struct Receiver {
    fd: OwnedFd,
    hdr_len: usize,
}

/// `struct tpacket_auxdata`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct AuxData {
    status: u32,
    len: u32,
    snaplen: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

impl Receiver {
    /// A receiver on `dev`. Frames carry virtio-net headers where the kernel can and `vnet` asks.
    pub fn open(dev: &IfName, vnet: bool) -> Result<Receiver, GateError> {
        let fd = socket(dev)?;
        let sys = |what| {
            move |source| GateError::Sys {
                what,
                dev: dev.as_str().to_owned(),
                source,
            }
        };
        let mut hdr_len = 0;
        if vnet {
            match option(&fd, libc::SOL_PACKET, PACKET_VNET_HDR, &1i32) {
                Ok(()) => hdr_len = VNET_HDR,
                Err(e) => {
                    tracing::warn!(dev = dev.as_str(), %e, "no virtio-net headers: the gate is slow, and the guest's offloads must be off")
                }
            }
        }
        option(&fd, libc::SOL_PACKET, PACKET_AUXDATA, &1i32).map_err(sys("ask for VLAN tags"))?;
        option(&fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1i32)
            .map_err(sys("ignore what the host sends (Linux 4.20)"))?;
        option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER)
            .map_err(sys("size the receive buffer"))?;
        bind(&fd, dev, libc::ETH_P_ALL as u16)?;
        Ok(Receiver { fd, hdr_len })
    }

    /// Bytes of the header before each frame: 10, or 0 where there is none.
    pub fn hdr_len(&self) -> usize {
        self.hdr_len
    }

    /// Reads one frame into `buf`, without waiting.
    pub fn receive(&self, buf: &mut [u8]) -> io::Result<Got> {
        let room = &mut buf[vlan::TAG_LEN..];
        let mut iov = libc::iovec {
            iov_base: room.as_mut_ptr().cast(),
            iov_len: room.len(),
        };
        let mut control = [0u64; 8];
        // SAFETY: plain data, for which all zeroes is valid.
        let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
        m.msg_iov = &raw mut iov;
        m.msg_iovlen = 1;
        m.msg_control = control.as_mut_ptr().cast();
        m.msg_controllen = size_of_val(&control);
        // SAFETY: iov and control describe live buffers with their true lengths.
        let n = unsafe {
            libc::recvmsg(
                self.fd.as_raw_fd(),
                &raw mut m,
                libc::MSG_TRUNC | libc::MSG_DONTWAIT,
            )
        };
        if n < 0 {
            let e = io::Error::last_os_error();
            return match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(Got::Nothing),
                // A segmentation type that a virtio-net header cannot express: the frame is gone.
                Some(libc::EINVAL) => Ok(Got::Unusable),
                _ => Err(e),
            };
        }
        let len = n as usize;
        if m.msg_flags & libc::MSG_TRUNC != 0 || len > room.len() || len < self.hdr_len + 14 {
            return Ok(Got::Unusable);
        }
        let aux = aux_data(&m);
        if self.hdr_len == 0 && aux.status & TP_STATUS_CSUMNOTREADY != 0 {
            return Ok(Got::Unusable); // its checksum was left to a header that we do not have
        }
        if aux.status & TP_STATUS_VLAN_VALID == 0 {
            return Ok(Got::Frame {
                start: vlan::TAG_LEN,
                len,
            });
        }
        let tpid = if aux.status & TP_STATUS_VLAN_TPID_VALID != 0 {
            aux.vlan_tpid
        } else {
            0x8100
        };
        let whole = &mut buf[..vlan::TAG_LEN + len];
        if vlan::insert(whole, self.hdr_len, tpid, aux.vlan_tci) {
            Ok(Got::Frame {
                start: 0,
                len: len + vlan::TAG_LEN,
            })
        } else {
            Ok(Got::Unusable)
        }
    }

    /// Frames that the kernel dropped because they were not fetched, since the last call.
    pub fn overflowed(&self) -> u64 {
        let mut stats = [0u32; 2];
        let mut len = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes into `stats`.
        let r = unsafe {
            let p = stats.as_mut_ptr().cast();
            let fd = self.fd.as_raw_fd();
            libc::getsockopt(fd, libc::SOL_PACKET, PACKET_STATISTICS, p, &raw mut len)
        };
        if r < 0 { 0 } else { u64::from(stats[1]) }
    }
}

fn aux_data(m: &libc::msghdr) -> AuxData {
    // SAFETY: `m` is as recvmsg left it, its control buffer still live; the CMSG macros stay within
    // msg_controllen, and the payload is copied out only where its length says that it is there.
    unsafe {
        let mut c = libc::CMSG_FIRSTHDR(m);
        while !c.is_null() {
            let want = libc::CMSG_LEN(size_of::<AuxData>() as u32) as usize;
            let h = &*c;
            if (h.cmsg_level, h.cmsg_type) == (libc::SOL_PACKET, PACKET_AUXDATA)
                && h.cmsg_len >= want
            {
                return libc::CMSG_DATA(c).cast::<AuxData>().read_unaligned();
            }
            c = libc::CMSG_NXTHDR(m, c);
        }
    }
    AuxData::default()
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends to the guest.
pub(crate) struct Sender(OwnedFd);

impl Sender {
    /// A sender on `dev`; `vnet` as the receiver has it.
    pub fn open(dev: &IfName, vnet: bool) -> Result<Sender, GateError> {
        let fd = socket(dev)?;
        let sys = |what| {
            move |source| GateError::Sys {
                what,
                dev: dev.as_str().to_owned(),
                source,
            }
        };
        if vnet {
            option(&fd, libc::SOL_PACKET, PACKET_VNET_HDR, &1i32)
                .map_err(sys("ask for virtio-net headers"))?;
        }
        option(&fd, libc::SOL_PACKET, PACKET_QDISC_BYPASS, &1i32)
            .map_err(sys("skip the queueing discipline"))?;
        option(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER)
            .map_err(sys("size the send buffer"))?;
        bind(&fd, dev, 0)?; // protocol 0: it receives nothing
        Ok(Sender(fd))
    }

    /// Sends one frame, header first, or fails at once.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: `frame` is read for its length.
        let n = unsafe {
            let p = frame.as_ptr().cast();
            libc::send(self.0.as_raw_fd(), p, frame.len(), libc::MSG_DONTWAIT)
        };
        if n < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}
