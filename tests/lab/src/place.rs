//! Where things are: the checkout, its target folder, the programs built there.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// The target folder: `CARGO_TARGET_DIR`, or the one that this program was built into, or
/// `target` under the checkout.
pub fn target_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR") {
        return std::path::absolute(dir).context("CARGO_TARGET_DIR");
    }
    let exe = std::env::current_exe().context("finding this program")?;
    // target/debug/lab, target/debug/deps/some_test-…
    let found = exe.ancestors().find(|a| a.join("CACHEDIR.TAG").exists());
    match found {
        Some(dir) => Ok(dir.to_owned()),
        None => Ok(workspace_dir()?.join("target")),
    }
}

/// The checkout: upwards from the present folder, or the one that this was built from.
pub fn workspace_dir() -> Result<PathBuf> {
    let here = std::env::current_dir().context("finding the present folder")?;
    let is_ours = |dir: &Path| dir.join("tests/lab/Cargo.toml").exists();
    if let Some(dir) = here.ancestors().find(|a| is_ours(a)) {
        return Ok(dir.to_owned());
    }
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    if is_ours(&built_from) {
        return built_from.canonicalize().context("the checkout");
    }
    bail!("not in a checkout of havm: run this from inside one")
}

/// A program of this workspace, built beside the running one.
pub fn program(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("finding this program")?;
    let beside = exe.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    match beside.into_iter().find(|p| p.is_file()) {
        Some(path) => Ok(path),
        None => bail!("{name} is not built: run `cargo build -p havm-lab -p havm-guest`"),
    }
}
