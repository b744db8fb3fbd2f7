//! What happens before the first order: the spec is read and checked, the pid file written.

use anyhow::{Context, Result, bail};
use havm_core::spec::{MAX_SPEC_BYTES, PidFile, SPEC_VERSION, Spec};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Reads a spec file.
///
/// # Errors
/// Says what is wrong with it; `havmd` writes it, so the remedy is to have it written again.
pub fn read_spec(path: &Path) -> Result<Spec> {
    let mut text = String::new();
    File::open(path)
        .and_then(|f| f.take(MAX_SPEC_BYTES + 1).read_to_string(&mut text))
        .with_context(|| format!("read {}", path.display()))?;
    if text.len() as u64 > MAX_SPEC_BYTES {
        bail!(
            "{} is over {MAX_SPEC_BYTES} bytes: not a replicator's spec",
            path.display()
        );
    }
    let spec: Spec =
        serde_json::from_str(&text).with_context(|| format!("{} is not a spec", path.display()))?;
    if spec.version != SPEC_VERSION {
        bail!(
            "{} has spec version {}, this havm-replicator knows {SPEC_VERSION}: install the same version of havmd and havm-replicator",
            path.display(),
            spec.version
        );
    }
    if spec.links.is_empty() {
        bail!("{} names no replication link", path.display());
    }
    Ok(spec)
}

/// Says who we are, so that a restarted daemon finds us: written aside, then renamed.
///
/// # Errors
/// The system's.
pub fn write_pid_file(run_dir: &Path) -> Result<()> {
    let me = PidFile {
        pid: i32::try_from(std::process::id())?,
        start_ticks: start_ticks()?,
    };
    let path = Spec::pid_file(run_dir);
    let aside = path.with_extension("new");
    let mut f = File::create(&aside).with_context(|| format!("create {}", aside.display()))?;
    f.write_all(&serde_json::to_vec(&me)?)?;
    std::fs::rename(&aside, &path).with_context(|| format!("rename to {}", path.display()))
}

fn start_ticks() -> Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").context("read /proc/self/stat")?;
    // The name in parentheses may hold anything; fields count from behind it, the 3rd is the first.
    let after = stat
        .rsplit_once(')')
        .context("/proc/self/stat has no name")?
        .1;
    let ticks = after
        .split_ascii_whitespace()
        .nth(22 - 3)
        .context("no start time")?;
    ticks.parse().context("start time")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_of_another_version_or_none_is_refused_with_its_place() {
        let dir = std::env::temp_dir().join(format!("havm-spec-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("spec.json");
        for (text, says) in [("{", "is not a spec"), ("{\"version\":1}", "is not a spec")] {
            std::fs::write(&path, text).unwrap();
            let e = format!("{:#}", read_spec(&path).unwrap_err());
            assert!(e.contains(says) && e.contains("spec.json"), "{e}");
        }
        let e = format!("{:#}", read_spec(&dir.join("none")).unwrap_err());
        assert!(e.contains("none"), "{e}");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn our_own_start_time_is_found() {
        assert!(start_ticks().unwrap() > 0);
    }
}
