//! The egress gate of one guest NIC: what the guest sends is held, epoch by epoch, until the
//! standby has acknowledged the epoch. What the guest receives flows freely.
//!
//! ```text
//!   guest ── QEMU ── hvgN (tap, in no bridge) ══ AF_PACKET ══[ gate ]══ hvbN (tap fd) ── bridge ── LAN
//!                                                   out ──> held, epoch by epoch ──> write
//!                                                   send <──────────────────────── in
//! ```
//!
//! Both sides carry virtio-net headers, so that checksum and segmentation offload survive: a TCP
//! stream crosses the gate in frames of up to 64 KiB (seen: 5 times the throughput).
//!
//! Input needs no holding: where the kernel can (Linux 6.6), it takes a short cut inside the kernel,
//! on and off with the gate ([`shortcut`]).
//!
//! `hvbN` is not persistent: if this process dies, it is gone, and nothing of the guest reaches the
//! LAN. `hvgN` outlives us, because QEMU keeps it; whatever it emits is swallowed before the host's
//! own network stack sees it ([`shutter`]), and the host never speaks on it.
//!
//! States of a gate:
//!
//! ```text
//!            ┌────────────── hold(stream, term, first) ──────────────┐
//!            v                                                       │
//!   closed ──┴─> holding ── barrier(n): open epoch n+1 ──> holding   │
//!     ^            │   └─── release(acked n): frames of 1..=n go out │
//!     │            └── pass(keep_held) ──> passing ──────────────────┘
//!     └──── close() from anywhere; nothing passes in either direction
//! ```
//!
//! A frame tagged with a later epoch than its own is safe (it waits longer); an earlier one would
//! not be. Every tag is therefore taken at the moment when the frame is read, under the lock that
//! `barrier` takes too: what is read before the barrier was sent before it.

mod announce;
mod bpf;
mod counters;
mod error;
mod fair;
mod forward;
mod gate;
mod iface;
mod packet;
mod pump;
mod queue;
mod sched;
mod shortcut;
mod shutter;
mod spec;
mod tap;
mod vlan;

pub use counters::Counters;
pub use error::GateError;
pub use gate::{Gate, Held, State};
pub use spec::{Limits, NicSpec};
pub use tap::remove_guest_tap;
