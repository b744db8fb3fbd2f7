//! Raw frames for a test, VLAN tags included.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

pub struct Raw(OwnedFd);

impl Raw {
    /// A raw socket on an interface of the calling thread's namespace.
    pub fn open(dev: &str) -> Raw {
        let name = std::ffi::CString::new(dev).expect("a name");
        // SAFETY: plain system calls on live values; results are checked.
        unsafe {
            let all = (libc::ETH_P_ALL as u16).to_be();
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0);
            assert!(fd >= 0);
            let fd = OwnedFd::from_raw_fd(fd);
            let one = 1i32;
            let r = libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_PACKET,
                8,
                (&raw const one).cast(),
                4,
            );
            assert_eq!(r, 0, "PACKET_AUXDATA");
            let mut a: libc::sockaddr_ll = std::mem::zeroed();
            a.sll_family = libc::AF_PACKET as u16;
            a.sll_protocol = all;
            a.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let len = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd.as_raw_fd(), (&raw const a).cast(), len), 0);
            Raw(fd)
        }
    }

    pub fn send(&self, frame: &[u8]) {
        // SAFETY: `frame` is read for its length.
        let n = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(n, frame.len() as isize);
    }

    /// The VLAN tag of the next frame of this EtherType (looked for behind the tag), if one comes.
    pub fn tag_of(&self, ethertype: u16, within: Duration) -> Option<u16> {
        let end = Instant::now() + within;
        let mut buf = [0u8; 2048];
        while Instant::now() < end {
            let mut control = [0u64; 8];
            let mut iov = libc::iovec {
                iov_base: buf.as_mut_ptr().cast(),
                iov_len: buf.len(),
            };
            // SAFETY: all zeroes is a valid msghdr; its parts point at live buffers.
            let (n, tag) = unsafe {
                let mut m: libc::msghdr = std::mem::zeroed();
                m.msg_iov = &raw mut iov;
                m.msg_iovlen = 1;
                m.msg_control = control.as_mut_ptr().cast();
                m.msg_controllen = size_of_val(&control);
                let n = libc::recvmsg(self.0.as_raw_fd(), &raw mut m, 0);
                // struct tpacket_auxdata: status u32 at 0, vlan_tci u16 at 16.
                let c = libc::CMSG_FIRSTHDR(&raw const m);
                let mut tag = None;
                if n > 0 && !c.is_null() {
                    let aux: [u8; 20] = libc::CMSG_DATA(c).cast::<[u8; 20]>().read_unaligned();
                    if aux[0] & 0x10 != 0 {
                        tag = Some(u16::from_ne_bytes([aux[16], aux[17]]));
                    }
                }
                (n, tag)
            };
            if n < 14 {
                std::thread::sleep(Duration::from_millis(2));
            } else if buf[12..14] == [0x81, 0] && buf[16..18] == ethertype.to_be_bytes() {
                return Some(u16::from_be_bytes([buf[14], buf[15]]));
            } else if buf[12..14] == ethertype.to_be_bytes() {
                return tag;
            }
        }
        None
    }
}
