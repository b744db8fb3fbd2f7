//! Guests that stop, or are stopped, on purpose (decision 0004).

use crate::outside;
use crate::stage::Stage;
use crate::wait::{LONG, until};
use anyhow::{Result, ensure};
use havm_core::record::Intent;
use havm_core::status::Safety;
use havm_guest::report::Ask;
use havm_lab::Host::{Alpha, Beta};
use std::time::Duration;

fn until_stopped(s: &Stage) -> Result<()> {
    until(
        "both sides to know that the guest was stopped",
        LONG,
        || {
            for host in [Alpha, Beta] {
                let g = s.pair.guest(host, "web")?;
                if g.intent != Some(Intent::Stopped) || g.runs_here || g.safety != Safety::Stopped {
                    anyhow::bail!("{host}: {:?}, {}", g.safety, g.why);
                }
            }
            Ok(Some(()))
        },
    )?;
    // Nobody starts it behind its admin's back.
    std::thread::sleep(Duration::from_secs(4));
    for host in [Alpha, Beta] {
        ensure!(
            !s.pair.guest(host, "web")?.runs_here,
            "{host} started a guest that was stopped"
        );
    }
    Ok(())
}

fn start_again(s: &Stage) -> Result<()> {
    s.pair.havm_ok(Alpha, &["start", "web", "--no-wait"])?;
    s.protected_at(Alpha)?;
    s.under_load(|_, _| Ok(()))?;
    s.pair.verify(Alpha, "web")
}

/// It may have been started a moment ago.
fn until_it_answers(s: &Stage) -> Result<()> {
    until("the guest to answer", LONG, || {
        outside::ask(&s.pair, s.web.ip, &Ask::Seen).map(Some)
    })?;
    Ok(())
}

pub fn reboot_from_inside(s: &Stage) -> Result<()> {
    until_it_answers(s)?;
    let term = s.term(Alpha)?;
    outside::ask(&s.pair, s.web.ip, &Ask::Reboot)?;
    std::thread::sleep(Duration::from_secs(1));
    until_it_answers(s)?;
    s.protected_at(Alpha)?;
    ensure!(
        s.term(Alpha)? == term,
        "a reboot from inside moved the guest"
    );
    s.under_load(|s, _| {
        s.pair.lab.power_off(Alpha)?;
        s.pair.wait_runs("web", Beta)?;
        s.pair.lab.power_on(Alpha)?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}

pub fn shutdown_from_inside(s: &Stage) -> Result<()> {
    until_it_answers(s)?;
    outside::ask(&s.pair, s.web.ip, &Ask::Poweroff)?;
    until_stopped(s)?;
    start_again(s)
}

pub fn destroyed_by_virsh(s: &Stage) -> Result<()> {
    let out = s
        .pair
        .lab
        .command(Alpha, "virsh")?
        .args(["-q", "destroy", "web"])
        .output()?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    until_stopped(s)?;
    start_again(s)
}
