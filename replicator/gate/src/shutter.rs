//! Swallows everything that comes out of the guest's tap after our socket has had its copy, so
//! that it can reach neither the host's own stack (which would answer ARP for any of its addresses)
//! nor, by an admin's slip, a bridge.
//!
//! A two-instruction BPF program at the ingress hook of the interface, which stands after AF_PACKET
//! and before everything else. It stays with the interface, not with this process: it must work
//! above all while we are dead.

use crate::bpf::{self, Hook, insn};
use crate::iface::IfName;
use std::io;

const NAME: &bpf::Name = b"havm_shutter\0\0\0\0";

/// `return TC_ACT_SHOT`.
static PROGRAM: [u64; 2] = [insn(0xb7, 0, 0, 0, 2), insn(0x95, 0, 0, 0, 0)];

/// Puts the shutter on `dev`, once.
pub(crate) fn close(dev: &IfName) -> io::Result<()> {
    let ifindex = dev.index().ok_or(io::ErrorKind::NotFound)?;
    if bpf::attached(ifindex, Hook::Ingress, NAME)? {
        return Ok(());
    }
    bpf::attach(ifindex, Hook::Ingress, &bpf::load(&PROGRAM, NAME)?)
}
