//! Swallows everything that comes out of the guest's tap after our socket has had its copy, so
//! that it can reach neither the host's own stack (which would answer ARP for any of its addresses)
//! nor, by an admin's slip, a bridge.
//!
//! A two-instruction BPF program at the ingress hook of the interface (TCX, Linux 6.6), which
//! stands after AF_PACKET and before everything else. It stays with the interface, not with this
//! process: it must work above all while we are dead.

use crate::iface::IfName;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
const NAME: &[u8; 16] = b"havm_shutter\0\0\0\0";

/// `r0 = TC_ACT_SHOT; exit`, as two 64-bit BPF instructions.
static PROGRAM: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];

/// `union bpf_attr`, as words: each request below says which fields it fills.
#[repr(C, align(8))]
struct Attr([u32; 32]);

impl Attr {
    fn new() -> Self {
        Attr([0; 32])
    }
    /// Writes a pointer at byte offset `at`.
    fn pointer<T>(&mut self, at: usize, p: *const T) {
        let v = p as u64;
        self.0[at / 4] = v as u32;
        self.0[at / 4 + 1] = (v >> 32) as u32;
    }
    fn call(&mut self, command: libc::c_int) -> io::Result<i32> {
        // SAFETY: the attribute block is 128 zero-padded bytes of which the kernel reads what the
        // command defines; every pointer in it was made from a reference that outlives the call.
        let r = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), 128usize) };
        if r < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(r as i32)
        }
    }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: called only with a descriptor that bpf(2) has just returned.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn load() -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut a = Attr::new();
    a.0[0] = BPF_PROG_TYPE_SCHED_CLS;
    a.0[1] = PROGRAM.len() as u32;
    a.pointer(8, PROGRAM.as_ptr());
    a.pointer(16, license.as_ptr());
    for (w, b) in a.0[12..16].iter_mut().zip(NAME.as_chunks::<4>().0) {
        *w = u32::from_ne_bytes(*b); // prog_name, at byte 48
    }
    a.call(BPF_PROG_LOAD).map(owned)
}

/// Whether an earlier process put ours there.
fn present(ifindex: i32) -> io::Result<bool> {
    let mut ids = [0u32; 64];
    let mut a = Attr::new();
    a.0[0] = ifindex as u32;
    a.0[1] = BPF_TCX_INGRESS;
    a.pointer(16, ids.as_mut_ptr());
    a.0[6] = ids.len() as u32;
    a.call(BPF_PROG_QUERY)?;
    let n = (a.0[6] as usize).min(ids.len());
    Ok(ids[..n].iter().any(|id| named_ours(*id).unwrap_or(false)))
}

fn named_ours(id: u32) -> io::Result<bool> {
    let mut a = Attr::new();
    a.0[0] = id;
    let fd = owned(a.call(BPF_PROG_GET_FD_BY_ID)?);
    // struct bpf_prog_info: the name stands at byte 64.
    let mut info = [0u8; 80];
    let mut a = Attr::new();
    a.0[0] = fd.as_raw_fd() as u32;
    a.0[1] = info.len() as u32;
    a.pointer(8, info.as_mut_ptr());
    a.call(BPF_OBJ_GET_INFO_BY_FD)?;
    Ok(info[64..80] == NAME[..])
}

/// Puts the shutter on `dev`, once.
pub(crate) fn close(dev: &IfName) -> io::Result<()> {
    let ifindex = dev.index().ok_or(io::ErrorKind::NotFound)?;
    if present(ifindex)? {
        return Ok(());
    }
    let program = load()?;
    let mut a = Attr::new();
    a.0[0] = ifindex as u32;
    a.0[1] = program.as_raw_fd() as u32;
    a.0[2] = BPF_TCX_INGRESS;
    a.call(BPF_PROG_ATTACH).map(drop)
}
