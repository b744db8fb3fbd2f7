//! Hosts that lose power or stand still.

use crate::stage::Stage;
use crate::story::tell;
use crate::wait::{LONG, until};
use anyhow::{Result, ensure};
use havm_core::status::Safety;
use havm_lab::Host::{Alpha, Beta};
use std::time::Duration;

pub fn primary_power_off(s: &Stage) -> Result<()> {
    s.under_load(|s, _| {
        s.pair.lab.power_off(Alpha)?;
        s.pair.wait_runs("web", Beta)?;
        s.pair.lab.power_on(Alpha)?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}

pub fn standby_power_off(s: &Stage) -> Result<()> {
    s.under_load(|s, _| {
        let term = s.term(Alpha)?;
        s.pair.lab.power_off(Beta)?;
        until("the guest to run exposed", LONG, || {
            let g = s.pair.guest(Alpha, "web")?;
            Ok((g.safety == Safety::Exposed && g.runs_here && g.term.0 > term).then_some(()))
        })?;
        s.pair.lab.power_on(Beta)?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}

pub fn primary_frozen(s: &Stage) -> Result<()> {
    s.under_load(|s, _| {
        s.pair.lab.freeze(Alpha)?;
        s.pair.wait_runs("web", Beta)?;
        std::thread::sleep(Duration::from_secs(5));
        let beta = s.term(Beta)?;
        s.pair.lab.thaw(Alpha)?;
        // What it says before it has heard of the new term is old.
        until("alpha to hear of the new term", LONG, || {
            Ok((s.term(Alpha)? >= beta).then_some(()))
        })?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}

pub fn power_off_after_promotion(s: &Stage) -> Result<()> {
    s.pair.lab.power_off(Alpha)?;
    let since = s.pair.wait_runs("web", Beta)?;
    // Beta has had no standby in this term: the guest stands until beta is back.
    s.pair.lab.power_off(Beta)?;
    s.pair.lab.power_on(Alpha)?;
    std::thread::sleep(Duration::from_secs(3));
    let g = s.pair.guest(Alpha, "web")?;
    ensure!(
        !g.runs_here,
        "alpha started an older state than the one that beta showed the world"
    );
    s.pair.lab.power_on(Beta)?;
    // Beta may have lost its power before the last epochs were durable on its disk: then it cannot know
    // whether the disk is complete, and must ask (decision 0008) instead of starting it.
    let asks = until("beta to go on, or to ask", LONG, || {
        let g = s.pair.guest(Beta, "web")?;
        if g.safety == Safety::Down && g.what_to_do.is_some() {
            return Ok(Some(true));
        }
        let home = s.pair.guest(Alpha, "web").is_ok_and(|a| a.runs_here);
        Ok((g.runs_here || home).then_some(false))
    })?;
    if asks {
        tell("  beta asks whether its disk is good enough: `havm start web`");
        s.pair.havm_ok(Beta, &["start", "web", "--no-wait"])?;
    }
    s.protected_at(Alpha)?;
    ensure!(s.term(Alpha)? > since.term.0, "the term went back");
    s.pair.verify(Alpha, "web")
}

pub fn power_off_in_failback(s: &Stage) -> Result<()> {
    // Either side, at the very moment.
    for victim in [Beta, Alpha] {
        s.under_load(|s, _| {
            s.pair.havm_ok(Alpha, &["switchover", "web"])?;
            s.protected_at(Beta)?;
            s.pair.havm_ok(Beta, &["failback", "web", "--no-wait"])?;
            s.pair.lab.power_off(victim)?;
            let other = if victim == Alpha { Beta } else { Alpha };
            s.pair.wait_runs("web", other)?;
            s.pair.lab.power_on(victim)?;
            s.protected_at(Alpha)
        })?;
    }
    s.pair.verify(Alpha, "web")
}
