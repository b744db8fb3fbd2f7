//! What does not change while the process lives: the spec, the node's identity, disks and NICs.

use crate::disks::Disks;
use crate::nics::Nics;
use crate::primary::Cmd;
use anyhow::{Context, Result};
use havm_core::ids::{GuestName, LifeId, StreamId, Term};
use havm_core::spec::{Ack, Spec};
use havm_links::beat::Timers;
use havm_links::identity::{Fingerprint, Identity};
use havm_links::incoming::{Expect, Incoming, IncomingSpec};
use havm_qmp::Qmp;
use std::io::Read;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of the stream on their way.
pub(super) const WINDOW_BYTES: usize = 64 << 20;
/// How long the monitor of a QEMU that is there may take to answer.
const MONITOR_PATIENCE: Duration = Duration::from_secs(5);

/// See the module.
pub struct Env {
    pub(super) spec: Spec,
    pub(super) identity: Identity,
    pub(super) peer: Fingerprint,
    pub(super) disks: Disks,
    pub(super) nics: Nics,
    /// Wakes the guest's thread when output waits for a barrier.
    pub(super) wake: Arc<Mutex<Option<Sender<Cmd>>>>,
}

impl Env {
    /// Loads the identity and opens disks and NICs.
    ///
    /// # Errors
    /// Names what is missing and the remedy.
    pub fn open(spec: Spec) -> Result<(Env, Vec<String>)> {
        let identity = Identity::load(&spec.identity_dir.join("identity.pem"))?;
        let peer = spec
            .peer_fingerprint
            .parse()
            .context("the peer's fingerprint in the spec")?;
        let (disks, warnings) = Disks::open(&spec)?;
        let nics = Nics::open(&spec.nics, spec.qemu_uid, spec.settings.output_limit_mib)?;
        let wake: Arc<Mutex<Option<Sender<Cmd>>>> = Arc::default();
        let waker = wake.clone();
        nics.on_output(move || {
            if let Some(w) = &*waker.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = w.send(Cmd::Wake);
            }
        });
        Ok((
            Env {
                spec,
                identity,
                peer,
                disks,
                nics,
                wake,
            },
            warnings,
        ))
    }

    /// Serves the disks.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn serve(&self) -> Result<()> {
        self.disks.serve()
    }

    pub(super) fn guest(&self) -> &GuestName {
        &self.spec.guest
    }

    pub(super) fn timers(&self) -> Timers {
        Timers::for_silence(Duration::from_millis(self.spec.settings.stream_silent_ms))
    }

    pub(super) fn ack_disk(&self) -> bool {
        self.spec.settings.ack == Ack::Disk
    }

    /// A QEMU lives at the monitor's socket.
    pub fn has_guest(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.spec.qmp_socket).is_ok()
    }

    pub(super) fn monitor(&self) -> Result<Qmp, String> {
        Qmp::connect(&self.spec.qmp_socket, MONITOR_PATIENCE).map_err(|e| {
            format!(
                "the guest's monitor at {}: {e}",
                self.spec.qmp_socket.display()
            )
        })
    }

    pub(super) fn listen(
        &self,
        term: Term,
        my_life: LifeId,
        peer_life: Option<LifeId>,
    ) -> Result<Incoming, String> {
        let (first, last) = self.spec.port_range;
        Incoming::listen(IncomingSpec {
            identity: self.identity.clone(),
            peer: self.peer,
            bind: self.spec.links.iter().map(|l| l.local).collect(),
            ports: first..=last,
            expect: Expect {
                guest: self.guest().clone(),
                term: Some(term),
                my_life: Some(my_life),
                peer_life,
            },
            window_bytes: WINDOW_BYTES,
            timers: self.timers(),
        })
        .map_err(|e| format!("listen for the primary: {e}"))
    }

    pub(super) fn remove_devices(&self) {
        for n in &self.spec.nics {
            if let Err(e) = havm_gate::remove_guest_tap(&n.guest_tap) {
                tracing::warn!(tap = n.guest_tap, error = %e, "removing the guest's tap");
            }
        }
    }
}

/// A new stream id, from the system's randomness.
pub(super) fn random_stream() -> Result<StreamId, String> {
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut id))
        .map_err(|e| format!("read /dev/urandom: {e}"))?;
    Ok(StreamId(id))
}
