//! The few requests of bpf(2) that the gate needs: load a program, attach it to an interface's
//! ingress or egress (TCX, Linux 6.6), make a small map that both sides see.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;

const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const MAP_TYPE_ARRAY: u32 = 2;
const F_MMAPABLE: u32 = 1 << 10;

/// A program's name as the kernel shows it.
pub(crate) type Name = [u8; 16];

/// Where a program is attached.
#[derive(Clone, Copy)]
pub(crate) enum Hook {
    /// What comes in from the interface, after packet sockets and before all else.
    Ingress = 46,
    /// What goes out to the interface.
    Egress = 47,
}

/// One instruction.
pub(crate) const fn insn(op: u8, dst: u8, src: u8, off: i16, imm: i32) -> u64 {
    op as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (off as u16 as u64) << 16
        | (imm as u32 as u64) << 32
}

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
    fn name(&mut self, at: usize, name: &Name) {
        for (w, b) in self.0[at / 4..].iter_mut().zip(name.as_chunks::<4>().0) {
            *w = u32::from_ne_bytes(*b);
        }
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

/// Loads a traffic-control program.
pub(crate) fn load(program: &[u64], name: &Name) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut a = Attr::new();
    a.0[0] = PROG_TYPE_SCHED_CLS;
    a.0[1] = program.len() as u32;
    a.pointer(8, program.as_ptr());
    a.pointer(16, license.as_ptr());
    a.name(48, name);
    a.call(PROG_LOAD).map(owned)
}

/// Attaches a program; it stays as long as the interface does.
pub(crate) fn attach(ifindex: i32, hook: Hook, program: &OwnedFd) -> io::Result<()> {
    let mut a = Attr::new();
    a.0[0] = ifindex as u32;
    a.0[1] = program.as_raw_fd() as u32;
    a.0[2] = hook as u32;
    a.call(PROG_ATTACH).map(drop)
}

/// Whether a program of this name is attached.
pub(crate) fn attached(ifindex: i32, hook: Hook, name: &Name) -> io::Result<bool> {
    let mut ids = [0u32; 64];
    let mut a = Attr::new();
    a.0[0] = ifindex as u32;
    a.0[1] = hook as u32;
    a.pointer(16, ids.as_mut_ptr());
    a.0[6] = ids.len() as u32;
    a.call(PROG_QUERY)?;
    let n = (a.0[6] as usize).min(ids.len());
    Ok(ids[..n]
        .iter()
        .any(|id| name_of(*id).is_ok_and(|n| n == *name)))
}

fn name_of(id: u32) -> io::Result<Name> {
    let mut a = Attr::new();
    a.0[0] = id;
    let fd = owned(a.call(PROG_GET_FD_BY_ID)?);
    // struct bpf_prog_info: the name stands at byte 64.
    let mut info = [0u8; 80];
    let mut a = Attr::new();
    a.0[0] = fd.as_raw_fd() as u32;
    a.0[1] = info.len() as u32;
    a.pointer(8, info.as_mut_ptr());
    a.call(OBJ_GET_INFO_BY_FD)?;
    let mut name = [0; 16];
    name.copy_from_slice(&info[64..80]);
    Ok(name)
}

/// `N` numbers that a program and this process share.
pub(crate) struct Cells<const N: usize> {
    fd: OwnedFd,
    at: *mut [AtomicU64; N],
}

// SAFETY: the mapping is shared memory of atomics, valid until drop.
unsafe impl<const N: usize> Send for Cells<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Sync for Cells<N> {}

impl<const N: usize> Cells<N> {
    const BYTES: usize = N * size_of::<u64>();

    pub fn new(name: &Name) -> io::Result<Self> {
        let mut a = Attr::new();
        a.0[0] = MAP_TYPE_ARRAY;
        a.0[1] = 4;
        a.0[2] = Self::BYTES as u32;
        a.0[3] = 1;
        a.0[4] = F_MMAPABLE;
        a.name(28, name);
        let fd = owned(a.call(MAP_CREATE)?);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of a map whose value is BYTES long; nothing is replaced.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::BYTES,
                prot,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Cells { fd, at: at.cast() })
    }

    /// The numbers.
    pub fn get(&self) -> &[AtomicU64; N] {
        // SAFETY: mapped, aligned to a page, N words long, and only ever used as atomics here; the
        // program's side uses atomic additions and whole-word reads.
        unsafe { &*self.at }
    }

    /// The map's descriptor, for a program that is being loaded.
    pub fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

impl<const N: usize> Drop for Cells<N> {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length; no reference outlives `self`.
        unsafe { libc::munmap(self.at.cast(), Self::BYTES) };
    }
}
