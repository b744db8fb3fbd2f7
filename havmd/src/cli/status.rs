//! `havm status`.

use super::{Daemon, Exit};
use crate::control::HostStatus;
use crate::render::status::{calm, text};
use havm_core::ids::GuestName;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Shows it once, or every second.
pub fn run(daemon: &Daemon, guest: Option<&GuestName>, json: bool, watch: bool) -> Exit {
    loop {
        let h = match daemon.status() {
            Ok(h) => h,
            // A restarting daemon comes back.
            Err(t) if watch => {
                eprintln!("havm: {}", t.text);
                std::thread::sleep(Duration::from_secs(1));
                continue;
            }
            Err(t) => return t.print(),
        };
        if let Some(g) = guest
            && !h.status.guests.iter().any(|x| x.guest == *g)
        {
            eprintln!(
                "havm: guest {g} is not protected on this node; `havm status` lists those that are"
            );
            return Exit::Failed;
        }
        let out = if json {
            json_of(&h, guest)
        } else {
            text(&h, guest)
        };
        if watch && !json && std::io::stdout().is_terminal() {
            print!("\x1b[H\x1b[2J");
        }
        crate::cli::say(out.trim_end());
        if !watch {
            return verdict(&h, guest);
        }
        if std::io::stdout().flush().is_err() {
            return Exit::Ok;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// `havm metrics`.
pub fn metrics(daemon: &Daemon) -> Exit {
    match daemon.status() {
        Ok(h) => {
            crate::cli::say(crate::render::metrics::text(&h).trim_end());
            Exit::Ok
        }
        Err(t) => t.print(),
    }
}

fn json_of(h: &HostStatus, guest: Option<&GuestName>) -> String {
    let mut h = h.clone();
    h.status
        .guests
        .retain(|g| guest.is_none_or(|o| *o == g.guest));
    serde_json::to_string_pretty(&h).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
}

fn verdict(h: &HostStatus, guest: Option<&GuestName>) -> Exit {
    let mut guests = h
        .status
        .guests
        .iter()
        .filter(|g| guest.is_none_or(|o| *o == g.guest));
    if guests.all(|g| calm(g.safety)) && h.faults.is_empty() {
        Exit::Ok
    } else {
        Exit::NotSafe
    }
}
