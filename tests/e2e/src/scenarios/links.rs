//! Cables.

use crate::stage::Stage;
use crate::wait::{LONG, until};
use anyhow::{Result, ensure};
use havm_core::status::Safety;
use havm_lab::Host::{self, Alpha, Beta};
use std::time::Duration;

fn cut(s: &Stage, links: &[&str]) -> Result<()> {
    links.iter().try_for_each(|l| s.link(l, false))
}

fn mend(s: &Stage, links: &[&str]) -> Result<()> {
    links.iter().try_for_each(|l| s.link(l, true))
}

pub fn one_link_after_the_other(s: &Stage) -> Result<()> {
    let term = s.term(Alpha)?;
    s.under_load(|s, _| {
        for link in ["rep0", "rep1", "rep0", "rep1"] {
            s.link(link, false)?;
            std::thread::sleep(Duration::from_secs(2));
            s.link(link, true)?;
            until("both links to carry the stream", LONG, || {
                Ok((s.replica(Alpha)?.counters.links_up == 2).then_some(()))
            })?;
        }
        s.protected_at(Alpha)
    })?;
    ensure!(
        s.term(Alpha)? == term,
        "a single link's loss moved the guest"
    );
    s.pair.verify(Alpha, "web")
}

/// Cuts, waits until the guest goes on at `winner` in a new term, mends, and waits for home.
fn cut_and_mend(s: &Stage, links: &[&str], winner: Option<Host>) -> Result<()> {
    s.under_load(|s, _| {
        let term = s.term(Alpha)?;
        cut(s, links)?;
        let who = until("one side to go on alone", LONG, || {
            for host in [Alpha, Beta] {
                let g = s.pair.guest(host, "web")?;
                if g.runs_here && g.safety == Safety::Exposed && g.term.0 > term {
                    return Ok(Some(host));
                }
            }
            Ok(None)
        })?;
        ensure!(
            winner.is_none_or(|w| w == who),
            "{who} goes on, not {winner:?}"
        );
        std::thread::sleep(Duration::from_secs(2));
        let other = if who == Alpha { Beta } else { Alpha };
        let g = s.pair.guest(other, "web")?;
        ensure!(g.safety != Safety::Exposed, "both sides go on: {g:?}");
        mend(s, links)?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}

pub fn cut_with_witness_for_both(s: &Stage) -> Result<()> {
    cut_and_mend(s, &["rep0", "rep1"], None)
}

pub fn cut_with_witness_for_primary(s: &Stage) -> Result<()> {
    cut_and_mend(s, &["mgmt-beta", "rep0", "rep1"], Some(Alpha))
}

pub fn cut_with_witness_for_standby(s: &Stage) -> Result<()> {
    cut_and_mend(s, &["mgmt-alpha", "rep0", "rep1"], Some(Beta))
}

pub fn cut_with_no_witness(s: &Stage) -> Result<()> {
    s.under_load(|s, client| {
        let links = ["mgmt-gamma", "rep0", "rep1"];
        cut(s, &links)?;
        until("alpha to say that output is held", LONG, || {
            let g = s.pair.guest(Alpha, "web")?;
            Ok((g.safety == Safety::Gated && g.what_to_do.is_some()).then_some(()))
        })?;
        let before = client.stats()?.answers;
        std::thread::sleep(Duration::from_secs(3));
        let held = client.stats()?.answers;
        ensure!(
            held == before,
            "{} answers came out without a standby",
            held - before
        );
        let g = s.pair.guest(Beta, "web")?;
        ensure!(!g.runs_here, "beta was promoted without a permit");
        // The links return, the witness does not.
        mend(s, &["rep0", "rep1"])?;
        until("answers to flow again", LONG, || {
            Ok((client.stats()?.answers > held).then_some(()))
        })?;
        s.link("mgmt-gamma", true)?;
        s.protected_at(Alpha)
    })?;
    s.pair.verify(Alpha, "web")
}
