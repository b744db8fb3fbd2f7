//! A whole epoch: the last round while the guest runs, the pause, and the sending behind it.

use super::{CAPTURE_FAILED, Worker};
use havm_core::ids::EpochNo;
use havm_qmp::{EventKind, Qmp};
use std::time::{Duration, Instant};

/// Pages that a round takes at most while the guest runs; the pause takes the rest.
const ROUND_PAGES: usize = 64 * 1024;

impl Worker {
    /// Closes the epoch and sends it. `resume`: the vCPUs go on behind the pause.
    pub(super) fn epoch(&mut self, resume: bool, shutdown: bool) -> Result<EpochNo, String> {
        let started = Instant::now();
        let Some(session) = self.session.as_mut() else {
            return Err("there is no stream".into());
        };
        let mut e = session.open(false)?;
        let n = e.n();
        let Self {
            parts,
            pages,
            device_state,
            ..
        } = self;
        parts
            .capture
            .collect(pages, ROUND_PAGES)
            .map_err(|e| format!("{CAPTURE_FAILED}: {e}"))?;
        if let Some(v) = &mut self.verify {
            v.look(&parts.disks);
        }
        let mut writes = None;
        let (nics, disks) = (&parts.nics, &parts.disks);
        let mut barrier = || {
            nics.barrier(n);
            writes = Some(disks.barrier());
        };
        let pause = parts
            .capture
            .checkpoint(&mut parts.qmp, pages, device_state, &mut barrier, resume)
            .map_err(|e| format!("{CAPTURE_FAILED} of epoch {n}: {e}"))?;
        // Stops and starts of our own are no news; anything else is found by the next look.
        let shut = drop_own_events(&mut parts.qmp);
        let paused = Instant::now();
        let writes = match writes {
            Some(Ok(w)) => w,
            Some(Err(e)) => return Err(format!("disk writes of epoch {n}: {e}")),
            None => return Err(format!("epoch {n} had no barrier")),
        };

        let dirty = pages.len() as u64 * havm_capture::PAGE_BYTES as u64
            + device_state.len() as u64
            + writes.iter().map(|w| w.data_bytes()).sum::<u64>();
        session.pages(&mut e, pages)?;
        session.writes(&mut e, &writes)?;
        let wire = e.wire_bytes();
        session.close_epoch(e, Some(device_state), shutdown)?;
        if let Some(v) = &mut self.verify {
            v.send(session, n, pages, &writes)?;
        }
        self.mind_verify();
        let pages = &mut self.pages;
        let count = pages.len() as u64;
        pages.clear();
        self.last_barrier = paused;
        self.last_cost = started.elapsed();
        let pause = Duration::from_micros(pause.total_us);
        self.stats(|s| {
            s.barrier(paused, pause, count);
            s.counters.dirty_bytes += dirty;
            s.counters.wire_bytes += wire;
        });
        if self.session.as_mut().is_some_and(|s| s.settled()) {
            self.synced();
        }
        self.guest_is_down |= shut;
        Ok(n)
    }

    /// The last epoch of a guest that has switched itself off: QEMU may be gone already, so its
    /// memory is not looked at any more; nobody will need it.
    pub(super) fn last_epoch(&mut self) -> Result<(), String> {
        let Some(session) = self.session.as_mut() else {
            return Ok(());
        };
        let mut e = session.open(false)?;
        self.parts.nics.barrier(e.n());
        let writes = self.parts.disks.barrier().map_err(|e| e.to_string())?;
        session.writes(&mut e, &writes)?;
        let state = (!self.device_state.is_empty()).then_some(self.device_state.as_slice());
        session.close_epoch(e, state, true)?;
        Ok(())
    }
}

/// Drops the events of a pause that we made; says whether the guest shut itself down beside it.
fn drop_own_events(qmp: &mut Qmp) -> bool {
    qmp.take_events()
        .filter(|e| matches!(e.kind, EventKind::Shutdown { guest: true, .. }))
        .count()
        > 0
}
