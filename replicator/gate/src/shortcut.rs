//! Input by a short cut: what the bridge sends to its tap is handed to the guest's tap inside the
//! kernel, without a copy and without waking a thread.
//!
//! Input needs no holding, only an on and off. So a small BPF program stands at the egress hook of
//! the bridge's tap and redirects, or drops while the gate is closed. It goes away with that tap.
//! Where the kernel has no such hook (before Linux 6.6), frames reach the tap as usual and the
//! input thread carries them.

use crate::bpf::{self, Cells, Hook, insn};
use crate::iface::IfName;
use std::io;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

const NAME: &bpf::Name = b"havm_input\0\0\0\0\0\0";

/// The words of the shared map.
const OPEN: usize = 0;
const FRAMES: usize = 1;
const BYTES: usize = 2;
const DROPPED: usize = 3;

/// The short cut of one gate.
pub(crate) struct Shortcut(Cells<4>);

/// ```text
/// if !map.open { map.dropped += 1; return TC_ACT_SHOT }
/// map.frames += 1; map.bytes += skb.len; return bpf_redirect(guest, 0)
/// ```
fn program(map: i32, guest: i32) -> [u64; 16] {
    const ADD: u8 = 0xdb; // lock *(u64 *)(dst + off) += src
    [
        insn(0xbf, 6, 1, 0, 0),   // r6 = skb
        insn(0x18, 1, 2, 0, map), // r1 = the map's value (two words)
        insn(0, 0, 0, 0, 0),
        insn(0x79, 2, 1, 0, 0), // r2 = open
        insn(0xb7, 3, 0, 0, 1), // r3 = 1
        insn(0x15, 2, 0, 7, 0), // if r2 == 0 goto the drop
        insn(ADD, 1, 3, 8 * FRAMES as i16, 0),
        insn(0x61, 3, 6, 0, 0), // r3 = skb.len
        insn(ADD, 1, 3, 8 * BYTES as i16, 0),
        insn(0xb7, 1, 0, 0, guest),
        insn(0xb7, 2, 0, 0, 0),
        insn(0x85, 0, 0, 0, 23), // bpf_redirect(r1, r2)
        insn(0x95, 0, 0, 0, 0),
        insn(ADD, 1, 3, 8 * DROPPED as i16, 0),
        insn(0xb7, 0, 0, 0, 2), // TC_ACT_SHOT
        insn(0x95, 0, 0, 0, 0),
    ]
}

impl Shortcut {
    /// Sets it up, closed.
    pub fn new(bridge_tap: &IfName, guest_tap: &IfName) -> io::Result<Shortcut> {
        let missing = io::ErrorKind::NotFound;
        let from = bridge_tap.index().ok_or(missing)?;
        let to = guest_tap.index().ok_or(missing)?;
        let cells = Cells::new(NAME)?;
        let program = bpf::load(&program(cells.fd(), to), NAME)?;
        bpf::attach(from, Hook::Egress, &program)?;
        Ok(Shortcut(cells))
    }

    /// Opens or closes. A frame that is on its way through another processor at this very moment
    /// may still get through.
    pub fn set(&self, open: bool) {
        self.0.get()[OPEN].store(u64::from(open), SeqCst);
    }

    /// Frames and bytes given to the guest, and frames dropped.
    pub fn counts(&self) -> (u64, u64, u64) {
        let c = self.0.get();
        (
            c[FRAMES].load(Relaxed),
            c[BYTES].load(Relaxed),
            c[DROPPED].load(Relaxed),
        )
    }
}
