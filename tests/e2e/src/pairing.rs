//! What an admin types to make a pair and enrol its witness.

use crate::wait::{LONG, until};
use anyhow::{Context, Result, bail};
use havm_lab::{Host, Lab};
use std::path::Path;
use std::process::{Command, Stdio};

fn ok(mut c: Command, what: &str) -> Result<()> {
    let out = c.output().with_context(|| what.to_owned())?;
    if !out.status.success() {
        bail!("{what}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// Carries a code from one host to another, as a person would on paper.
fn carry(lab: &Lab, from: (Host, &str), to: &[(Host, &str)]) -> Result<()> {
    let path = lab.files(from.0).path(from.1);
    let code = until("a code", LONG, || {
        Ok(std::fs::read_to_string(&path)
            .ok()
            .filter(|c| c.ends_with('\n')))
    })?;
    for (host, name) in to {
        std::fs::write(lab.files(*host).path(name), &code).context("carry the code")?;
    }
    Ok(())
}

/// Pairs alpha and beta, and enrols both at gamma. The daemons are not running yet.
///
/// # Errors
/// What a command said.
pub fn pair(lab: &Lab, havm: &str) -> Result<()> {
    let mut waiting = lab
        .command(Host::Alpha, havm)?
        .args(["pair", "--accept", "--code-file", "/run/havm/code"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("havm pair on alpha")?;
    carry(
        lab,
        (Host::Alpha, "run/havm/code"),
        &[(Host::Beta, "run/havm/code")],
    )?;
    let mut join = lab.command(Host::Beta, havm)?;
    join.args(["pair", "--code-file", "/run/havm/code"]);
    ok(join, "havm pair on beta")?;
    if !waiting.wait().context("havm pair on alpha")?.success() {
        bail!("`havm pair` on alpha failed");
    }

    let mut enrol = lab.command(Host::Gamma, havm)?;
    enrol.args(["witness", "--enrol", "--state-dir", "/var/lib/havm/witness"]);
    enrol.args(["--code-file", "/run/havm/code"]);
    ok(enrol, "havm witness --enrol")?;
    let both = [
        (Host::Alpha, "run/havm/witness-code"),
        (Host::Beta, "run/havm/witness-code"),
    ];
    carry(lab, (Host::Gamma, "run/havm/code"), &both)?;
    for host in [Host::Alpha, Host::Beta] {
        // The witness has just been started; a person would try again too.
        until("the witness to enrol the pair", LONG, || {
            let mut c = lab.command(host, havm)?;
            c.args(["pair", "--witness", "--code-file", "/run/havm/witness-code"]);
            ok(c, "havm pair --witness").map(Some)
        })?;
    }
    let code = |h: Host, name: &str| lab.files(h).path(name);
    for p in [
        code(Host::Alpha, "run/havm/code"),
        code(Host::Beta, "run/havm/code"),
    ] {
        remove(&p)?;
    }
    Ok(())
}

fn remove(p: &Path) -> Result<()> {
    std::fs::remove_file(p).with_context(|| format!("remove {}", p.display()))
}
