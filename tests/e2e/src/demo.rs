//! The main job on a real guest, told as it happens: protect, pull the plug, go on, plug in, move home.

use crate::outside;
use crate::pair::{Pair, Setup};
use crate::story::tell;
use crate::wait::{LONG, until};
use anyhow::{Context, Result, bail};
use havm_core::status::Safety;
use havm_guest::client::ClientHandle;
use havm_guest::domain::Domain;
use havm_lab::Host::{self, Alpha, Beta};
use havm_lab::PowerCut;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant, UNIX_EPOCH};

const GUEST: &str = "web";

/// One line of `havm events --json`.
#[derive(Debug, Deserialize)]
struct Event {
    at_ms: u64,
    kind: String,
    guest: Option<String>,
}

fn events(pair: &Pair, host: Host) -> Result<Vec<Event>> {
    let said = pair.havm_ok(host, &["events", "--json", "-n", "1000"])?;
    said.lines()
        .map(|l| serde_json::from_str(l).context("an event"))
        .collect()
}

/// When an event of this kind happened to the guest, the first at or after `from_ms`.
fn when(events: &[Event], kind: &str, from_ms: u64) -> Result<u64> {
    let mut of_kind = events
        .iter()
        .filter(|e| e.kind == kind && e.guest.as_deref() == Some(GUEST) && e.at_ms >= from_ms);
    Ok(of_kind
        .next()
        .with_context(|| format!("no event {kind}"))?
        .at_ms)
}

fn unix_ms(cut: &PowerCut) -> Result<u64> {
    Ok(cut.wall.duration_since(UNIX_EPOCH)?.as_millis() as u64)
}

/// What the failover cost.
struct Failover {
    detected_ms: u64,
    promoted_ms: u64,
    outage_ms: f64,
}

fn fail_over(pair: &Pair, client: &mut ClientHandle) -> Result<Failover> {
    client.mark()?;
    tell("alpha loses its power, now");
    let cut = pair.lab.power_off(Alpha)?;
    pair.wait_runs(GUEST, Beta)?;
    std::thread::sleep(Duration::from_secs(2));
    let at = unix_ms(&cut)?;
    let seen = events(pair, Beta)?;
    let (lost, going) = (when(&seen, "peer-lost", at)?, when(&seen, "failover", at)?);
    let went = seen
        .iter()
        .filter(|e| e.kind == "failover" && e.at_ms >= at);
    let ran = went.map(|e| e.at_ms).max().context("no failover")?;
    let f = Failover {
        detected_ms: lost - at,
        promoted_ms: ran - going,
        outage_ms: client.stats()?.max_gap.ms,
    };
    tell(format!(
        "the guest goes on at beta: loss detected after {} ms, promoted in {} ms, the client missed {:.0} ms",
        f.detected_ms, f.promoted_ms, f.outage_ms
    ));
    Ok(f)
}

/// What the way home cost.
struct Return {
    resync_seconds: f64,
    resync_bytes: u64,
    outage_ms: f64,
}

fn come_back(pair: &Pair, client: &mut ClientHandle) -> Result<Return> {
    tell("alpha is plugged in again; nobody types anything from here on");
    let t = Instant::now();
    pair.lab.power_on(Alpha)?;
    let up = t.elapsed();
    until("beta's guest to be protected again", LONG, || {
        let g = pair.guest(Beta, GUEST)?;
        // It may be on its way home already.
        let gone = pair.guest(Alpha, GUEST).is_ok_and(|a| a.runs_here);
        Ok((g.safety == Safety::Safe || gone).then_some(()))
    })?;
    let resync_seconds = (t.elapsed() - up).as_secs_f64();
    // Beta's replicator has sent no other sync, and says its numbers once a second.
    let resync_bytes = until("beta's replicator to tell what it sent", LONG, || {
        let sent = pair
            .guest(Beta, GUEST)?
            .replica
            .map_or(0, |r| r.counters.sync_bytes);
        Ok((sent > 0).then_some(sent))
    })?;
    tell(format!(
        "brought up to date in {resync_seconds:.1} s with {:.1} MiB; it waits until alpha has proved stable",
        resync_bytes as f64 / 1048576.0
    ));
    client.mark()?;
    pair.wait_protected(GUEST, Alpha)?;
    std::thread::sleep(Duration::from_secs(2));
    let outage_ms = client.stats()?.max_gap.ms;
    tell(format!(
        "the guest is home again, protected all the way; the client missed {outage_ms:.0} ms"
    ));
    Ok(Return {
        resync_seconds,
        resync_bytes,
        outage_ms,
    })
}

/// Plays the demo and writes the report.
///
/// # Errors
/// Something did not happen, or a safety figure is not perfect.
pub fn run(report: &Path, lost_ms: Option<u64>) -> Result<()> {
    tell("two hosts, a witness box and a client, each in namespaces of its own");
    let pair = Pair::up(&Setup {
        lab: "havm-demo".into(),
        lost_ms,
        ..Setup::default()
    })?;
    let told = play(&pair).map_err(|e| e.context(pair.logs()))?;
    if let Some(dir) = report.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(report, serde_json::to_string_pretty(&told)? + "\n")
        .with_context(|| format!("write {}", report.display()))?;
    tell(format!("figures: {}", report.display()));
    Ok(())
}

fn play(pair: &Pair) -> Result<Value> {
    let domain = Domain::new(GUEST, 10);
    tell(format!(
        "`havm protect {GUEST}`: {} MiB, {} vCPU, at home on alpha",
        domain.memory_mib, domain.vcpus
    ));
    let protect = pair.protect(&domain, Alpha)?;
    tell(format!("protected after {:.1} s", protect.as_secs_f64()));
    let mut client = outside::client(pair, domain.ip, 4)?;
    let recorder = outside::recorder(pair)?;
    tell("a client keeps it busy: every answer is on the guest's disk before it is sent");
    std::thread::sleep(Duration::from_secs(8));
    let g = pair.guest(Alpha, GUEST)?;
    let counters = g
        .replica
        .context("alpha's replicator says nothing")?
        .counters;
    let ratio = counters.wire_bytes as f64 / counters.dirty_bytes.max(1) as f64;
    let ms = |us: u64| us as f64 / 1000.0;
    tell(format!(
        "{} epochs, every {:.0} ms, each stops the guest for {:.1} ms (p99 {:.1}); {ratio:.2} bytes sent per dirty byte",
        counters.epochs,
        ms(counters.interval_us),
        ms(counters.pause_us_p50),
        ms(counters.pause_us_p99)
    ));

    let failover = fail_over(pair, &mut client)?;
    let back = come_back(pair, &mut client)?;
    tell("both copies are compared, page by page and block by block");
    let verified: Value =
        serde_json::from_str(&pair.havm_ok(Alpha, &["verify", GUEST, "--json"])?)?;
    let proof = client.stop()?;
    let recorded = recorder.stop()?;
    tell(format!(
        "{} answers over {} connections: {} connections kept, {} answers lost, {} repeated, {} taken back, {} records lost",
        proof.answers,
        proof.connections_before,
        proof.connections_kept,
        proof.answers_lost,
        proof.answers_repeated,
        proof.taken_back,
        proof.records_lost
    ));
    let uncommitted = recorded.uncommitted_frames_seen();
    if !proof.perfect() {
        bail!(
            "the client's proof is not perfect: {}",
            serde_json::to_string(&proof)?
        );
    }
    if uncommitted > 0 {
        bail!(
            "frames were seen that were taken back: {:?}",
            recorded.conflicts
        );
    }
    let equal = |key: &str| verified[key].as_bool() == Some(true);
    if !(equal("memory_equal") && equal("disk_equal")) {
        bail!("the copies differ: {verified}");
    }
    Ok(json!({
        "guest": {"ram_mib": domain.memory_mib, "vcpus": domain.vcpus},
        "protect": {"seconds": protect.as_secs_f64()},
        "epochs": {
            "count": counters.epochs,
            "pause_ms": {"p50": ms(counters.pause_us_p50), "p99": ms(counters.pause_us_p99)},
            "interval_ms": ms(counters.interval_us),
            "wire_bytes_per_dirty_byte": ratio,
        },
        "failover": {
            "detected_ms": failover.detected_ms,
            "promoted_ms": failover.promoted_ms,
            "client_outage_ms": failover.outage_ms,
            "connections_before": proof.connections_before,
            "connections_kept": proof.connections_kept,
            "answers": proof.answers,
            "answers_lost": proof.answers_lost,
            "answers_repeated": proof.answers_repeated,
            "records_lost": proof.records_lost,
            "uncommitted_frames_seen": uncommitted,
        },
        "return": {
            // Nothing but the power switch was touched between the failover and here.
            "automatic": true,
            "resync_seconds": back.resync_seconds,
            "resync_bytes": back.resync_bytes,
            "failback_outage_ms": back.outage_ms,
        },
        "verify": {
            "memory_equal": equal("memory_equal"),
            "disk_equal": equal("disk_equal"),
        },
    }))
}
