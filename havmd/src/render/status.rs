//! `havm status`: at three in the morning the first line of each guest must be enough.

use super::time::{bytes, micros, span, stamp};
use crate::control::HostStatus;
use havm_core::ids::GuestName;
use havm_core::order::{Mode, ReplicaState};
use havm_core::record::{Role, RoleStatus};
use havm_core::status::{GuestStatus, PeerView, Safety};
use std::fmt::Write;

/// The word for a state.
pub fn word(s: Safety) -> &'static str {
    match s {
        Safety::Safe => "SAFE",
        Safety::Syncing => "EXPOSED, SYNCING",
        Safety::Exposed => "EXPOSED",
        Safety::Changing => "CHANGING",
        Safety::Gated => "WAITING, OUTPUT HELD",
        Safety::Down => "DOWN",
        Safety::Stopped => "STOPPED",
        Safety::Conflict => "CONFLICT",
        Safety::Absent => "ABSENT",
    }
}

/// Whether nobody needs to do or fear anything.
pub fn calm(s: Safety) -> bool {
    matches!(s, Safety::Safe | Safety::Stopped)
}

/// Everything, or one guest.
pub fn text(h: &HostStatus, only: Option<&GuestName>) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write_text(&mut out, h, only);
    out
}

fn write_text(out: &mut String, h: &HostStatus, only: Option<&GuestName>) -> std::fmt::Result {
    let s = &h.status;
    for f in &h.faults {
        writeln!(out, "PROBLEM  {f}")?;
    }
    for g in s
        .guests
        .iter()
        .filter(|g| only.is_none_or(|o| *o == g.guest))
    {
        guest(out, h, g)?;
    }
    if s.guests.is_empty() {
        writeln!(
            out,
            "no guest is protected here yet; `havm protect GUEST` begins"
        )?;
    }
    if only.is_some() {
        return Ok(());
    }
    writeln!(out)?;
    let peer = match s.peer {
        PeerView::Alive => "alive",
        PeerView::Suspect => "SUSPECT (its beats are late)",
        PeerView::Lost => "LOST (silent on every link)",
    };
    writeln!(out, "node {}, peer {}: {peer}", s.node, s.peer_node)?;
    for l in &s.links {
        let rtt = l
            .rtt_us
            .map_or(String::new(), |r| format!(", round trip {}", micros(r)));
        let state = if l.up { "up" } else { "DOWN" };
        writeln!(
            out,
            "  link {}: {state}{rtt}, {} beats missed",
            l.name, l.missed
        )?;
    }
    match &s.witness {
        Some(w) if w.reachable => writeln!(out, "  witness {}: answers", w.address)?,
        Some(w) => writeln!(out, "  witness {}: DOES NOT ANSWER", w.address)?,
        None => writeln!(out, "  no witness: a lost peer needs an operator")?,
    }
    writeln!(
        out,
        "  havmd {} runs since {} ({})",
        h.version,
        stamp(h.started_at_ms),
        span(h.now_ms.saturating_sub(h.started_at_ms))
    )
}

fn guest(out: &mut String, h: &HostStatus, g: &GuestStatus) -> std::fmt::Result {
    let since = h.started_at_ms + g.safety_since_ms;
    writeln!(
        out,
        "{}: {} since {} ({}): {}",
        g.guest,
        word(g.safety),
        stamp(since),
        span(h.now_ms.saturating_sub(since)),
        g.why
    )?;
    if let Some(what) = &g.what_to_do {
        writeln!(out, "  what to do: {what}")?;
    }
    let here = &h.status.node;
    let there = &h.status.peer_node;
    let place = match (g.runs_here, g.role) {
        (true, _) => format!("runs on {here}"),
        (false, Some(Role::Eligible)) => format!("{here} is its standby; it runs on {there}"),
        (false, Some(Role::Ineligible)) => format!("{here} is becoming its standby"),
        (false, _) => format!("does not run on {here}"),
    };
    let home = if g.at_home { here } else { there };
    writeln!(out, "  {place}; home is {home}; {}", role(g))?;
    if g.moving {
        writeln!(out, "  a planned move is under way")?;
    }
    if let Some(at) = g.failback_at_ms {
        let left = (h.started_at_ms + at).saturating_sub(h.now_ms);
        writeln!(out, "  moves home by itself in {}", span(left))?;
    }
    if g.probation {
        writeln!(
            out,
            "  automatic moves rest: there were too many; `havm failback {}`",
            g.guest
        )?;
    }
    match &g.replica {
        Some(r) => replica(out, r),
        None => writeln!(out, "  no replicator runs"),
    }
}

fn role(g: &GuestStatus) -> String {
    let role = match g.role {
        Some(Role::Solo) => "solo",
        Some(Role::Protected) => "protected primary",
        Some(Role::Eligible) => "eligible standby",
        Some(Role::Ineligible) => "not yet eligible",
        None => return "no record".into(),
    };
    let status = match g.role_status {
        Some(RoleStatus::Handing) => ", handing over",
        Some(RoleStatus::Yielded) => ", yielded",
        _ => "",
    };
    format!("{role}{status}, term {}", g.term)
}

fn replica(out: &mut String, r: &ReplicaState) -> std::fmt::Result {
    if let Some((done, total)) = r.sync {
        let percent = (done * 100).checked_div(total).unwrap_or(100).min(100);
        writeln!(
            out,
            "  sync: {percent} % ({} of {})",
            bytes(done),
            bytes(total)
        )?;
    }
    let c = &r.counters;
    match r.mode {
        Mode::Protected => {
            write!(
                out,
                "  epochs: {}, pause {} (p99 {}), every {}",
                c.epochs,
                micros(c.pause_us_p50),
                micros(c.pause_us_p99),
                micros(c.interval_us)
            )?;
            if c.dirty_bytes > 0 {
                let ratio = c.wire_bytes as f64 / c.dirty_bytes as f64;
                write!(out, ", {ratio:.2} wire bytes per dirty byte")?;
            }
            writeln!(out, ", {} links", c.links_up)
        }
        Mode::Eligible => writeln!(
            out,
            "  epochs committed: {}, {} links",
            c.epochs, c.links_up
        ),
        _ if c.disk_out_of_sync_bytes > 0 => {
            writeln!(
                out,
                "  disk that may differ from the peer's: {}",
                bytes(c.disk_out_of_sync_bytes)
            )
        }
        _ => Ok(()),
    }
}
