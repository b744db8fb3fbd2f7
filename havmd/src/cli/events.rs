//! `havm events`.

use super::{Daemon, Exit};
use crate::control::{Answer, Request};
use crate::render::events::line;
use havm_core::ids::GuestName;

/// Prints the past, and with `follow` the future.
pub fn run(
    daemon: &Daemon,
    guest: Option<GuestName>,
    json: bool,
    follow: bool,
    last: usize,
) -> Exit {
    let end = daemon.ask::<serde_json::Value>(
        &Request::Events {
            last,
            guest,
            follow,
        },
        |a| {
            if let Answer::Event { entry } = a {
                let text = if json {
                    serde_json::to_string(entry).unwrap_or_default()
                } else {
                    line(entry)
                };
                crate::cli::say(text);
            }
        },
    );
    match end {
        Ok(_) => Exit::Ok,
        Err(t) => t.print(),
    }
}
