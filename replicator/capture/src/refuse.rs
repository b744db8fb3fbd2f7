//! Guests that cannot be captured faithfully, each with its reason and a remedy.

use std::fmt;

/// One thing about a guest that capture cannot follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The device or setting, as QEMU names it.
    pub what: String,
    /// Why it cannot be captured.
    pub reason: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.what, self.reason, self.remedy)
    }
}
