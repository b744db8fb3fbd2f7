//! What can go wrong with capture.

use havm_qmp::QmpError;
use std::io;

/// Why memory could not be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The monitor failed; [`QmpError::is_closed`] tells whether QEMU is gone.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// This kernel cannot track writes from outside.
    #[error(
        "this kernel cannot track a guest's writes: {missing} is missing. Boot kernel 6.7 or later (Debian 13, Ubuntu 24.04)"
    )]
    Kernel {
        /// What is missing.
        missing: &'static str,
    },
    /// This processor architecture is not supported.
    #[error("capture runs on x86-64 hosts only; this is {arch}")]
    Architecture {
        /// The architecture.
        arch: &'static str,
    },
    /// The guest has something that cannot be captured faithfully.
    #[error("this guest cannot be captured: {}", list(.0))]
    Refused(Vec<crate::Refusal>),
    /// QEMU could not be traced.
    #[error(
        "cannot trace QEMU (pid {pid}) to set up write tracking: {what}: {source}. Needs root or CAP_SYS_PTRACE; AppArmor must allow `ptrace (tracedby)` in the libvirt-qemu profile, SELinux has deny_ptrace"
    )]
    Trace {
        /// QEMU.
        pid: u32,
        /// The step.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Another tracker holds some of the memory already (or a CRIU-like tool).
    #[error(
        "QEMU (pid {pid}) already has its memory registered with another userfaultfd: end the other replicator, checkpoint tool or post-copy migration first"
    )]
    Busy {
        /// QEMU.
        pid: u32,
    },
    /// The set of RAM blocks is not the one that was attached to.
    #[error("the guest's RAM blocks changed ({what}): attach again, and start a new stream")]
    BlocksChanged {
        /// How.
        what: String,
    },
    /// QEMU said something that makes no sense here.
    #[error("cannot make sense of QEMU's answer: {0}")]
    Answer(String),
    /// The guest was set running, or ended, by somebody else while it was stopped for a checkpoint.
    #[error(
        "the guest did not stay stopped during its checkpoint ({0}): this epoch is void, take the next"
    )]
    NotStopped(&'static str),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

impl CaptureError {
    /// Whether QEMU is gone, so that nothing can be captured any more.
    pub fn is_qemu_gone(&self) -> bool {
        match self {
            CaptureError::Qmp(e) => e.is_closed(),
            // /proc/PID files of an ended process answer so.
            CaptureError::System { source, .. } | CaptureError::Trace { source, .. } => {
                source.raw_os_error() == Some(libc::ESRCH)
            }
            _ => false,
        }
    }
}

fn list(reasons: &[crate::Refusal]) -> String {
    let all: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    all.join("; ")
}
