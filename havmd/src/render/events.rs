//! One event, one line.

use super::time::stamp;
use crate::events::Entry;
use havm_core::command::Severity;
use havm_core::ids::GuestName;

/// `2026-11-21 07:14:32Z WARNING web peer-lost: …`
pub fn line(e: &Entry) -> String {
    let severity = match e.severity {
        Severity::Info => "info   ",
        Severity::Warning => "WARNING",
        Severity::Alarm => "ALARM  ",
    };
    let kind = &e.kind;
    let guest = e.guest.as_ref().map_or("-", GuestName::as_str);
    format!(
        "{} {severity} {guest} {kind}: {} (term {})",
        stamp(e.at_ms),
        e.text,
        e.term
    )
}
