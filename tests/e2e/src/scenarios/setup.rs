//! Wrong configs and peers that are not there: errors with place and remedy, nothing half-done.

use crate::pair::DISK_BYTES;
use crate::stage::Stage;
use crate::wait::{LONG, until};
use anyhow::{Context, Result, ensure};
use havm_guest::domain::Domain;
use havm_lab::Host::{Alpha, Beta};

/// What `havm config check` says of a text.
fn check(s: &Stage, text: &str) -> Result<(Option<i32>, String)> {
    std::fs::write(s.pair.lab.files(Alpha).path("run/bad.toml"), text)?;
    let out = s.pair.havm(Alpha, &["config", "check", "/run/bad.toml"])?;
    Ok((
        out.status.code(),
        String::from_utf8_lossy(&out.stderr).into_owned(),
    ))
}

pub fn bad_configs(s: &Stage) -> Result<()> {
    let good = std::fs::read_to_string(s.pair.lab.files(Alpha).path("etc-havm/havm.toml"))?;
    let guest = "\n[[guest]]\nname = \"x\"\nhome = \"alpha\"\n";
    let cases = [
        (
            "an unknown key",
            good.replace("[failback]", "[failback]\nstabilty_s = 3"),
            "stabilty_s",
            "stability_s",
        ),
        (
            "a wrong type",
            good.replace("flap_max = 1000", "flap_max = \"many\""),
            "flap_max",
            "number",
        ),
        (
            "a duplicate guest",
            format!("{good}{guest}{guest}"),
            "x",
            "twice",
        ),
    ];
    for (what, text, names, remedy) in cases {
        let (code, said) = check(s, &text)?;
        ensure!(code == Some(5), "{what}: exit code {code:?}: {said}");
        let place = said
            .lines()
            .any(|l| l.contains("bad.toml:") && l.matches(':').count() >= 2);
        ensure!(place, "{what}: no line and column in: {said}");
        ensure!(
            said.contains(names),
            "{what}: {names:?} is not named in: {said}"
        );
        ensure!(
            said.contains(remedy),
            "{what}: no remedy ({remedy:?}) in: {said}"
        );
    }
    Ok(())
}

pub fn unreachable_peer(s: &Stage) -> Result<()> {
    s.pair.lab.power_off(Beta)?;
    until("alpha to miss beta", LONG, || {
        let lost = s.pair.status(Alpha)?.peer == havm_core::status::PeerView::Lost;
        Ok(lost.then_some(()))
    })?;
    s.pair
        .lab
        .define_guest(Alpha, &Domain::new("lonely", 30), DISK_BYTES)?;
    let before = xml(s, "lonely")?;
    let out = s.pair.havm(Alpha, &["protect", "lonely", "--no-wait"])?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(
        !out.status.success(),
        "a guest was protected without a peer"
    );
    ensure!(said.contains("beta"), "the peer is not named in: {said}");
    ensure!(
        xml(s, "lonely")? == before,
        "a refused request left a changed definition"
    );
    s.heal()
}

fn xml(s: &Stage, guest: &str) -> Result<String> {
    let out = s
        .pair
        .lab
        .command(Alpha, "virsh")?
        .args(["-q", "dumpxml", guest])
        .output()?;
    String::from_utf8(out.stdout).context("virsh dumpxml")
}

pub fn mismatched_peer(s: &Stage) -> Result<()> {
    let path = s.pair.lab.files(Beta).path("etc-havm/havm.toml");
    let good = std::fs::read_to_string(&path)?;
    let restart = |text: &str| -> Result<()> {
        std::fs::write(&path, text)?;
        s.kill_havmd(Beta)?;
        s.pair.background(Beta, "20-havmd")
    };
    restart(&good.replace("lost_ms = 400", "lost_ms = 500"))?;
    let told = until("alpha to say that the configs differ", LONG, || {
        let out = s.pair.havm(Alpha, &["status"])?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        Ok(said.contains("lost_ms").then_some(said))
    });
    restart(&good)?;
    told?;
    s.protected_at(Alpha)
}
