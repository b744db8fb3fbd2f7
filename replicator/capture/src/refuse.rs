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

use crate::blocks::RamBlock;
use crate::error::CaptureError;
use havm_qmp::Qmp;

/// Everything about this guest that capture cannot follow.
pub(crate) fn check(_qmp: &mut Qmp, _blocks: &[RamBlock]) -> Result<Vec<Refusal>, CaptureError> {
    Ok(Vec::new())
}

/// Whether the process runs its guest with KVM.
pub(crate) fn uses_kvm(pid: u32) -> bool {
    let Ok(dir) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    dir.flatten()
        .any(|e| std::fs::read_link(e.path()).is_ok_and(|t| t.as_os_str() == "anon_inode:kvm-vm"))
}
