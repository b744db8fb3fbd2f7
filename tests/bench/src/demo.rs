//! The demo, several times over: what a client of a whole pair sees. The figures are medians of the runs.

use crate::report::Found;
use crate::resync::Watch;
use crate::stats::{median, spread};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The most that one run may take.
const BOUND: Duration = Duration::from_secs(600);

/// So many times the bytes that differ may be sent, besides the guest's RAM.
const RESYNC_FACTOR: f64 = 1.2;

/// A number in a run's report, by its path there.
fn number(run: &Value, path: &str) -> Option<f64> {
    run.pointer(path)?.as_f64()
}

/// Runs the demo so often.
///
/// # Errors
/// It is not built, or no run came to its end.
pub fn measure(times: usize) -> Result<Found> {
    ensure!(times > 0, "no run was asked for");
    let program = havm_lab::place::program("havm-e2e")?;
    let dir = havm_lab::place::target_dir()?.join("bench");
    std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let (mut runs, mut failures) = (Vec::new(), Vec::new());
    for i in 1..=times {
        println!("   demo {i} of {times}");
        match once(&program, &dir, i) {
            Ok(run) => runs.push(run),
            // A run that fails says something about havm; the others still have figures.
            Err(e) => {
                println!("   {e:#}");
                failures.push(format!("{e:#}"));
            }
        }
    }
    if runs.is_empty() {
        bail!(
            "none of {times} demos came to its end; the last: {}",
            failures.join("; ")
        );
    }
    let mut found = figures(&runs);
    found.detail = json!({
        "runs": runs, "failed_runs": failures,
        "detected_ms": spread(row(&runs, "/failover/detected_ms")),
        "promoted_ms": spread(row(&runs, "/failover/promoted_ms")),
        "client_outage_ms": spread(row(&runs, "/failover/client_outage_ms")),
        "failback_outage_ms": spread(row(&runs, "/return/failback_outage_ms")),
    });
    Ok(found)
}

fn once(program: &Path, dir: &Path, i: usize) -> Result<Value> {
    let (report, log) = (
        dir.join(format!("demo-{i}.json")),
        dir.join(format!("demo-{i}.log")),
    );
    if report.exists() {
        std::fs::remove_file(&report).context("remove the last run's report")?;
    }
    let out = File::create(&log).with_context(|| format!("make {}", log.display()))?;
    let mut child = Command::new(program)
        .arg("demo")
        .arg("--report")
        .arg(&report)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    let since = Instant::now();
    let mut watch = Watch::default();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if since.elapsed() > BOUND {
            child.kill()?;
            child.wait()?;
            bail!(
                "demo {i} did not end within {} s; see {}",
                BOUND.as_secs(),
                log.display()
            );
        }
        watch.look(&log)?;
        std::thread::sleep(Duration::from_millis(20));
    };
    ensure!(
        status.success(),
        "demo {i}: {status}; see {}",
        log.display()
    );
    let text = std::fs::read(&report).with_context(|| format!("read {}", report.display()))?;
    let mut run: Value = serde_json::from_slice(&text).context("the demo's report")?;
    run["disk_differing_bytes"] = json!(watch.differing_bytes);
    Ok(run)
}

fn row(runs: &[Value], path: &str) -> Vec<f64> {
    runs.iter().filter_map(|r| number(r, path)).collect()
}

/// The figures of these runs, each with its floor from the same runs.
fn figures(runs: &[Value]) -> Found {
    let mut found = Found::default();
    let over: Vec<f64> = runs
        .iter()
        .filter_map(|r| {
            Some(number(r, "/failover/client_outage_ms")? - number(r, "/failover/detected_ms")?)
        })
        .collect();
    let at = |path| median(row(runs, path));
    let one = Some(1.0);
    let (sent, least): (Vec<f64>, Vec<f64>) = runs.iter().filter_map(resync).unzip();
    let (sent, least) = (median(sent), median(least));
    let figures = [
        (
            "failover_outage_over_detection",
            median(over),
            at("/failover/promoted_ms"),
        ),
        (
            "failback_outage",
            at("/return/failback_outage_ms"),
            at("/epochs/pause_ms/p50"),
        ),
        (
            "wire_bytes_per_dirty_byte",
            at("/epochs/wire_bytes_per_dirty_byte"),
            one,
        ),
        ("resync_bytes_over_allowed", sent, least),
    ];
    for (name, value, floor) in figures {
        match value.zip(floor) {
            Some((value, floor)) => found.seen(name, value, floor),
            None => found.unseen(name, "the demo's reports do not tell what it is made of"),
        }
    }
    found
}

/// Bytes sent for the resync over what is allowed, and the floor: each differing byte of the disk once.
fn resync(run: &Value) -> Option<(f64, f64)> {
    // A host that was without power has lost its memory: nothing sent means that it was not counted.
    let sent = number(run, "/return/resync_bytes").filter(|&sent| sent > 0.0)?;
    let differing = number(run, "/disk_differing_bytes")?;
    let ram = number(run, "/guest/ram_mib")? * 1048576.0;
    let allowed = RESYNC_FACTOR * differing + ram;
    Some((sent / allowed, differing / allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(outage: f64, detected: f64) -> Value {
        json!({
            "failover": {"client_outage_ms": outage, "detected_ms": detected, "promoted_ms": 20},
            "guest": {"ram_mib": 1},
            "return": {"failback_outage_ms": 60.0, "resync_bytes": 1_048_576},
            "epochs": {"pause_ms": {"p50": 2.0}, "wire_bytes_per_dirty_byte": 0.3},
        })
    }

    /// The median of the differences, not the difference of medians; and what a report lacks is no figure.
    #[test]
    fn figures_are_medians_over_runs() {
        let found = figures(&[run(200.0, 130.0), run(500.0, 120.0), run(210.0, 120.0)]);
        let text = format!("{found:?}");
        assert!(text.contains("Seen { value: 90.0, floor: 20.0 }"), "{text}");
        let mut with_disk = run(200.0, 100.0);
        with_disk["disk_differing_bytes"] = json!(1_048_576);
        assert_eq!(resync(&with_disk), Some((1.0 / 2.2, 1.0 / 2.2)));
        with_disk["return"]["resync_bytes"] = json!(0);
        assert_eq!(resync(&with_disk), None);
        assert!(
            text.contains("\"resync_bytes_over_allowed\": Unseen"),
            "{text}"
        );
    }
}
