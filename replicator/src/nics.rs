//! All NICs of the guest behind one gate: what is done to one is done to each.

use anyhow::{Context, Result};
use havm_core::ids::{EpochNo, StreamId, Term};
use havm_core::order::Counters;
use havm_core::spec;
use havm_gate::{Gate, Limits, NicSpec};
use havm_wire::acked::AckedEpoch;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a frame on an ordinary LAN, without header.
const MTU_BYTES: u32 = 1500;
/// Memory for held frames that a gate needs at least, bytes.
const MIN_HELD_BYTES: usize = 256 << 10;
/// RARP frames after a promotion: the first is what moves the switches, the others are for lost ones.
const ANNOUNCEMENTS: u32 = 5;

/// The gates.
#[derive(Clone)]
pub struct Nics(Arc<Vec<Gate>>);

impl Nics {
    /// Makes the devices of all NICs; closed.
    ///
    /// # Errors
    /// Names the NIC.
    pub fn open(specs: &[spec::NicSpec], qemu_uid: u32, output_limit_mib: u64) -> Result<Nics> {
        let per_nic = (output_limit_mib << 20) / specs.len().max(1) as u64;
        let limits = Limits {
            held_bytes: usize::try_from(per_nic)
                .unwrap_or(usize::MAX)
                .max(MIN_HELD_BYTES),
            ..Limits::default()
        };
        let open = |s: &spec::NicSpec| {
            let nic = NicSpec::from_spec(s, qemu_uid, MTU_BYTES)?;
            let gate = Gate::open(&nic, limits).with_context(|| format!("NIC {}", s.mac))?;
            if !gate.has_offloads() {
                tracing::warn!(
                    mac = s.mac,
                    "no virtio-net headers on this host: the NIC is slow"
                );
            }
            Ok(gate)
        };
        Ok(Nics(Arc::new(
            specs.iter().map(open).collect::<Result<_>>()?,
        )))
    }

    /// Has `wake` called when a first frame waits for a barrier.
    pub fn on_output(&self, wake: impl Fn() + Clone + Send + Sync + 'static) {
        self.0.iter().for_each(|g| g.on_output(wake.clone()));
    }

    /// Holds output from epoch `first` of this stream on.
    pub fn hold(&self, stream: StreamId, term: Term, first: EpochNo) {
        self.0.iter().for_each(|g| g.hold(stream, term, first));
    }

    /// See [`Gate::barrier`].
    pub fn barrier(&self, closing: EpochNo) {
        self.0.iter().for_each(|g| g.barrier(closing));
    }

    /// See [`Gate::release`].
    pub fn release(&self, acked: AckedEpoch) {
        for g in self.0.iter() {
            g.release(acked);
        }
    }

    /// Opens. What a primary itself has held goes out first.
    pub fn pass(&self, keep_held: bool) {
        for g in self.0.iter() {
            g.pass(keep_held);
        }
    }

    /// Closes both directions.
    pub fn close(&self) {
        self.0.iter().for_each(Gate::close);
    }

    /// Drops what is held.
    pub fn discard(&self) {
        for g in self.0.iter() {
            g.discard();
        }
    }

    /// Some gate is full: the vCPUs should stand.
    pub fn is_full(&self) -> bool {
        self.0.iter().any(Gate::is_full)
    }

    /// Some frame waits that only a barrier and an ack can let out.
    pub fn output_waits(&self) -> bool {
        self.0.iter().any(|g| g.wait_for_output(Duration::ZERO))
    }

    /// Tells the switches where the guest lives now: at once, and a few times more in the background.
    pub fn announce(&self) {
        self.0.iter().for_each(|g| {
            g.announce();
        });
        let nics = self.clone();
        let again = move || {
            for i in 1..ANNOUNCEMENTS {
                std::thread::sleep(Duration::from_millis(50 << i));
                nics.0.iter().for_each(|g| {
                    g.announce();
                });
            }
        };
        if let Err(e) = std::thread::Builder::new()
            .name("announce".into())
            .spawn(again)
        {
            tracing::warn!(error = %e, "the MAC is announced once only");
        }
    }

    /// Adds what the gates counted.
    pub fn count(&self, c: &mut Counters) {
        for g in self.0.iter() {
            let n = g.counters();
            c.held_frames += g.held().frames as u64;
            c.released_frames += n.released_frames;
            c.dropped_frames += n.discarded + n.overflowed + n.closed_dropped;
            c.input_frames += n.in_frames;
            c.input_dropped += n.in_dropped;
        }
    }
}
