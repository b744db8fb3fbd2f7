//! Processes, named so that a reused number is never taken for the old one.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// A process by its number and its start time (clock ticks since boot).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number in the outermost PID namespace.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat` (proc(5)).
    pub start_ticks: u64,
}

impl Process {
    /// The process that has this number now.
    pub fn now(pid: i32) -> Option<Process> {
        let (_, start_ticks) = stat(pid)?;
        Some(Process { pid, start_ticks })
    }

    /// It is still there and not a zombie.
    pub fn alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, start)| start == self.start_ticks && state != 'Z')
    }

    /// Kills it, where it is still the same.
    pub fn kill(&self) -> Result<()> {
        if !self.alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e).with_context(|| format!("killing process {}", self.pid)),
        }
    }

    /// Waits for its end; false when it is still there at the deadline.
    pub fn gone_within(&self, time: Duration) -> bool {
        wait_until(time, || !self.alive())
    }
}

/// Looks again and again, soon and then less often; false when the time is over.
pub fn wait_until(time: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + time;
    let mut pause = Duration::from_millis(1);
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets: fields count from its last bracket.
    let rest = &text[text.rfind(')')? + 2..];
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Every process whose network namespace is one of these files (`/run/netns/…`), but this one.
pub fn in_netns_files(files: &[std::path::PathBuf]) -> Vec<Process> {
    let id = |p: &Path| fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    let wanted: Vec<_> = files.iter().filter_map(|f| id(f)).collect();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let own = std::process::id() as i32;
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            id(Path::new(&format!("/proc/{pid}/ns/net"))).is_some_and(|ns| wanted.contains(&ns))
        })
        .filter_map(Process::now)
        .collect()
}
