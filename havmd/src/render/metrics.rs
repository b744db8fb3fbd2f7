//! `havm metrics`: the status as Prometheus text, for node_exporter's textfile collector or a
//! script. Counters are since the replicator's start, as Prometheus expects of restarts.

use super::status::{calm, word};
use crate::control::HostStatus;
use havm_core::status::{GuestStatus, PeerView};
use std::fmt::Write;

/// One metric of a guest: name, type, help, value.
type Metric = (
    &'static str,
    &'static str,
    &'static str,
    fn(&GuestStatus) -> Option<f64>,
);

fn flag(b: bool) -> Option<f64> {
    Some(if b { 1.0 } else { 0.0 })
}

const GUEST: &[Metric] = &[
    (
        "safe",
        "gauge",
        "Nobody needs to do anything: protected, or stopped on purpose.",
        |g| flag(calm(g.safety)),
    ),
    (
        "runs_here",
        "gauge",
        "The guest's vCPUs run on this node.",
        |g| flag(g.runs_here),
    ),
    ("at_home", "gauge", "This node is its home.", |g| {
        flag(g.at_home)
    }),
    (
        "term",
        "gauge",
        "The highest promised term; each takeover or move raises it.",
        |g| Some(g.term.0 as f64),
    ),
    (
        "epochs_total",
        "counter",
        "Epochs closed or committed.",
        |g| g.replica.as_ref().map(|r| r.counters.epochs as f64),
    ),
    (
        "pause_seconds_p50",
        "gauge",
        "Median pause of an epoch.",
        |g| {
            g.replica
                .as_ref()
                .map(|r| r.counters.pause_us_p50 as f64 / 1e6)
        },
    ),
    (
        "pause_seconds_p99",
        "gauge",
        "99th percentile of the pause.",
        |g| {
            g.replica
                .as_ref()
                .map(|r| r.counters.pause_us_p99 as f64 / 1e6)
        },
    ),
    ("dirty_bytes_total", "counter", "Bytes captured.", |g| {
        g.replica.as_ref().map(|r| r.counters.dirty_bytes as f64)
    }),
    ("wire_bytes_total", "counter", "Bytes sent for them.", |g| {
        g.replica.as_ref().map(|r| r.counters.wire_bytes as f64)
    }),
    (
        "sync_bytes_total",
        "counter",
        "Bytes sent for sync and resync.",
        |g| g.replica.as_ref().map(|r| r.counters.sync_bytes as f64),
    ),
    (
        "held_frames",
        "gauge",
        "Frames that wait for their epoch.",
        |g| g.replica.as_ref().map(|r| r.counters.held_frames as f64),
    ),
    (
        "disk_out_of_sync_bytes",
        "gauge",
        "Disk that may differ from the peer's.",
        |g| {
            g.replica
                .as_ref()
                .map(|r| r.counters.disk_out_of_sync_bytes as f64)
        },
    ),
];

/// The whole text.
pub fn text(h: &HostStatus) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write_text(&mut out, h);
    out
}

fn write_text(out: &mut String, h: &HostStatus) -> std::fmt::Result {
    let s = &h.status;
    head(out, "havm_peer_alive", "gauge", "The peer's host is heard.")?;
    writeln!(
        out,
        "havm_peer_alive {}",
        u8::from(s.peer == PeerView::Alive)
    )?;
    head(
        out,
        "havm_faults",
        "gauge",
        "What is wrong with this node as a whole.",
    )?;
    writeln!(out, "havm_faults {}", h.faults.len())?;
    if let Some(w) = &s.witness {
        head(
            out,
            "havm_witness_reachable",
            "gauge",
            "The witness answers.",
        )?;
        writeln!(out, "havm_witness_reachable {}", u8::from(w.reachable))?;
    }
    head(out, "havm_link_up", "gauge", "A link carries heartbeats.")?;
    for l in &s.links {
        writeln!(
            out,
            "havm_link_up{{link=\"{}\"}} {}",
            quoted(&l.name),
            u8::from(l.up)
        )?;
    }
    head(
        out,
        "havm_guest_state",
        "gauge",
        "1 for the state that the guest is in.",
    )?;
    for g in &s.guests {
        writeln!(
            out,
            "havm_guest_state{{guest=\"{}\",state=\"{}\"}} 1",
            g.guest,
            quoted(&word(g.safety).to_lowercase())
        )?;
    }
    for (name, kind, help, value) in GUEST {
        let name = format!("havm_guest_{name}");
        head(out, &name, kind, help)?;
        for g in &s.guests {
            if let Some(v) = value(g) {
                writeln!(out, "{name}{{guest=\"{}\"}} {v}", g.guest)?;
            }
        }
    }
    Ok(())
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

fn quoted(s: &str) -> String {
    s.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', " ")
}
