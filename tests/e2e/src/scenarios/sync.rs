//! Power lost while a standby is brought up to date, and several guests.

use crate::outside;
use crate::pair::DISK_BYTES;
use crate::stage::Stage;
use crate::wait::{LONG, until};
use anyhow::{Result, ensure};
use havm_core::status::Safety;
use havm_guest::domain::Domain;
use havm_lab::Host::{self, Alpha, Beta};

fn until_syncing(s: &Stage, guest: &str, host: Host) -> Result<()> {
    until(&format!("{guest} to be synced"), LONG, || {
        let g = s.pair.guest(host, guest)?;
        Ok(matches!(g.safety, Safety::Syncing | Safety::Safe).then_some(()))
    })
}

pub fn power_off_in_resync(s: &Stage) -> Result<()> {
    // The standby's power: the guest does not notice.
    s.under_load(|s, _| {
        s.pair.lab.power_off(Beta)?;
        until("the guest to run exposed", LONG, || {
            Ok((s.pair.guest(Alpha, "web")?.safety == Safety::Exposed).then_some(()))
        })?;
        s.pair.lab.power_on(Beta)?;
        until_syncing(s, "web", Alpha)?;
        s.pair.lab.power_off(Beta)?;
        s.pair.lab.power_on(Beta)?;
        s.protected_at(Alpha)
    })?;
    // The primary's: it is the only good copy, and starts again when it is back.
    s.pair.lab.power_off(Beta)?;
    until("the guest to run exposed", LONG, || {
        Ok((s.pair.guest(Alpha, "web")?.safety == Safety::Exposed).then_some(()))
    })?;
    s.pair.lab.power_on(Beta)?;
    until_syncing(s, "web", Alpha)?;
    s.pair.lab.power_off(Alpha)?;
    s.pair.lab.power_on(Alpha)?;
    s.protected_at(Alpha)?;
    s.pair.verify(Alpha, "web")
}

pub fn power_off_in_first_sync(s: &Stage) -> Result<()> {
    for (name, ip, victim) in [("first-a", 21, Beta), ("first-b", 22, Alpha)] {
        let d = Domain::new(name, ip);
        s.pair.lab.define_guest(Alpha, &d, DISK_BYTES)?;
        s.pair.havm_ok(Alpha, &["protect", name, "--no-wait"])?;
        until_syncing(s, name, Alpha)?;
        s.pair.lab.power_off(victim)?;
        s.pair.lab.power_on(victim)?;
        s.pair.wait_protected(name, Alpha)?;
        s.pair.verify(Alpha, name)?;
        s.pair.havm_ok(Alpha, &["unprotect", name, "--restart"])?;
        s.protected_at(Alpha)?;
    }
    Ok(())
}

pub fn two_guests_opposite_homes(s: &Stage) -> Result<()> {
    let db = Domain::new("db", 11);
    s.pair.protect(&db, Beta)?;
    for victim in [Alpha, Beta] {
        let client = outside::client(&s.pair, db.ip, 2)?;
        let other = if victim == Alpha { Beta } else { Alpha };
        s.under_load(|s, _| {
            s.pair.lab.power_off(victim)?;
            s.pair.wait_runs("web", other)?;
            s.pair.wait_runs("db", other)?;
            s.pair.lab.power_on(victim)?;
            s.pair.wait_protected("db", Beta)?;
            s.protected_at(Alpha)
        })?;
        let proof = client.stop()?;
        ensure!(proof.perfect(), "db: {proof:?}");
    }
    s.pair.verify(Alpha, "web")?;
    s.pair.verify(Beta, "db")?;
    s.pair.havm_ok(Beta, &["unprotect", "db", "--restart"])?;
    Ok(())
}
