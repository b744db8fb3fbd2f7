//! Commands about one guest.

use super::Exit;
use super::talk::{Daemon, Trouble, progress};
use super::wait::{Look, until};
use crate::control::{Op, Request, VerifyResult};
use havm_core::ids::GuestName;
use havm_core::record::Intent;
use havm_core::status::{GuestStatus, Safety};
use std::time::Duration;

/// How long a first synchronisation may take before the wait (not the sync) ends.
const PROTECT_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// How long a move, start or stop may take.
const MOVE_LIMIT: Duration = Duration::from_secs(180);

/// `havm protect`.
pub fn protect(
    daemon: &Daemon,
    guest: GuestName,
    dry_run: bool,
    home: Option<String>,
    restart: bool,
    no_wait: bool,
) -> Exit {
    let request = Request::Protect {
        guest: guest.clone(),
        dry_run,
        home,
        restart,
    };
    let said = daemon.ask::<String>(&request, |a| match a {
        // The difference belongs on stdout: people keep it.
        crate::control::Answer::Progress { text } if text.starts_with("--- ") => {
            crate::cli::say(text)
        }
        a => progress(a),
    });
    match said {
        Err(t) => return t.print(),
        Ok(text) => eprintln!("{text}"),
    }
    if dry_run || no_wait {
        return Exit::Ok;
    }
    end(until(daemon, &guest, PROTECT_LIMIT, |g| match g.safety {
        Safety::Safe => Look::Reached,
        Safety::Conflict => Look::Failed(g.why.clone()),
        _ => Look::Wait,
    })
    .map(|g| format!("{}: protected: {}", g.guest, g.why)))
}

/// `havm unprotect`.
pub fn unprotect(daemon: &Daemon, guest: GuestName, restart: bool) -> Exit {
    end(daemon.ask::<String>(&Request::Unprotect { guest, restart }, progress))
}

/// `havm switchover`, `failback`, `start`, `stop`, `force-promote`, `discard-mine`.
pub fn operate(daemon: &Daemon, guest: GuestName, op: Op, wait: bool) -> Exit {
    let before = match daemon.status() {
        Ok(h) => h.status.guests.into_iter().find(|g| g.guest == guest),
        Err(t) => return t.print(),
    };
    let Some(before) = before else {
        eprintln!(
            "havm: guest {guest} is not protected on this node; `havm status` lists those that are"
        );
        return Exit::Failed;
    };
    let request = Request::Operate {
        guest: guest.clone(),
        op,
    };
    match daemon.ask::<String>(&request, progress) {
        Err(t) => return t.print(),
        Ok(text) if !wait => {
            crate::cli::say(text);
            return Exit::Ok;
        }
        Ok(_) => {}
    }
    let mut idle = 0;
    let moved = |g: &GuestStatus| g.runs_here != before.runs_here && g.term > before.term;
    let judge = |g: &GuestStatus| match op {
        Op::Switchover | Op::Failback if moved(g) && !g.moving => Look::Reached,
        Op::Switchover | Op::Failback => {
            // A refused move never starts; one that failed is over, and the guest is where it was.
            idle = if g.moving || g.runs_here != before.runs_here {
                0
            } else {
                idle + 1
            };
            if idle > 30 {
                Look::Failed(format!(
                    "the move did not happen; the guest is where it was. `havm events {}` says why",
                    g.guest
                ))
            } else {
                Look::Wait
            }
        }
        Op::Start if g.intent == Some(Intent::Run) && ran(g) => Look::Reached,
        Op::Stop if g.safety == Safety::Stopped && g.life.is_none() => Look::Reached,
        Op::ForcePromote if g.runs_here => Look::Reached,
        Op::DiscardMine if g.safety != Safety::Conflict => Look::Reached,
        _ => Look::Wait,
    };
    end(until(daemon, &guest, MOVE_LIMIT, judge).map(|g| {
        let place = if g.runs_here {
            "runs on this node"
        } else {
            "does not run on this node"
        };
        format!("{}: {place}: {}", g.guest, g.why)
    }))
}

fn ran(g: &GuestStatus) -> bool {
    g.runs_here || g.safety == Safety::Safe
}

/// `havm verify`.
pub fn verify(daemon: &Daemon, guest: GuestName, json: bool) -> Exit {
    let r = match daemon.ask::<VerifyResult>(
        &Request::Verify {
            guest: guest.clone(),
        },
        progress,
    ) {
        Ok(r) => r,
        Err(t) => return t.print(),
    };
    if json {
        crate::cli::say(serde_json::to_string_pretty(&r).unwrap_or_default());
    } else {
        let word = |equal| if equal { "equal" } else { "DIFFERENT" };
        crate::cli::say(format!(
            "{guest}: memory {} ({} of {} pages differ), disk {} ({} of {} blocks differ)",
            word(r.memory_equal),
            r.ram_different,
            r.ram_pages,
            word(r.disk_equal),
            r.disk_different,
            r.disk_blocks
        ));
    }
    if r.memory_equal && r.disk_equal {
        Exit::Ok
    } else {
        Exit::NotSafe
    }
}

fn end(r: Result<String, Trouble>) -> Exit {
    match r {
        Ok(text) => {
            crate::cli::say(text);
            Exit::Ok
        }
        Err(t) => t.print(),
    }
}
