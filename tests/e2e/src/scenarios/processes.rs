//! `kill -9` of each process.

use crate::stage::Stage;
use crate::story::tell;
use crate::wait::{LONG, until};
use anyhow::{Result, ensure};
use havm_lab::Host::{self, Alpha, Beta};
use std::time::Duration;

pub fn qemu_killed(s: &Stage) -> Result<()> {
    s.under_load(|s, _| {
        let pid = s.pid_in(Alpha, "run/libvirt/qemu/web.pid")?;
        s.kill(Alpha, &pid)?;
        s.pair.wait_runs("web", Beta)?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}

pub fn havmd_killed(s: &Stage) -> Result<()> {
    let term = s.term(Alpha)?;
    s.under_load(|s, client| {
        for host in [Alpha, Beta] {
            client.mark()?;
            s.kill_havmd(host)?;
            std::thread::sleep(Duration::from_secs(3));
            s.pair.background(host, "20-havmd")?;
            s.protected_at(Alpha)?;
            std::thread::sleep(Duration::from_secs(1));
            let gap = client.stats()?.max_gap.ms;
            tell(format!(
                "  havmd gone on {host} for 3 s: longest gap {gap:.0} ms"
            ));
            // Not a figure: a bound that only a stop would break.
            ensure!(gap < 2000.0, "answers stopped for {gap:.0} ms");
        }
        Ok(())
    })?;
    ensure!(s.term(Alpha)? == term, "a daemon's restart moved the guest");
    s.pair.verify(Alpha, "web")
}

pub fn replicator_killed_on_primary(s: &Stage) -> Result<()> {
    replicator_killed(s, Alpha)
}

pub fn replicator_killed_on_standby(s: &Stage) -> Result<()> {
    replicator_killed(s, Beta)
}

/// Either way the standby yields, and the primary goes on in a new term (decisions 0001 and 0006).
fn replicator_killed(s: &Stage, host: Host) -> Result<()> {
    s.under_load(|s, _| {
        let term = s.term(Alpha)?;
        let pid = s.pid_in(host, "run/havm/g/web/replicator.pid")?;
        s.kill(host, &pid)?;
        until("a new term", LONG, || {
            Ok((s.term(Alpha)? > term).then_some(()))
        })?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}
