//! Processes that outlive the daemon: known by id and start time, so that a reused id is never
//! taken for the old one, and watched by pidfd.

use havm_core::spec::PidFile;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::path::Path;
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

/// A living process, held by its pidfd: signals cannot go astray.
#[derive(Debug)]
pub struct Process {
    /// Its id and start time.
    pub id: PidFile,
    fd: OwnedFd,
}

impl Process {
    /// The process of that id, if it lives now.
    pub fn open(pid: i32) -> Option<Process> {
        let fd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
        // Read after the fd is held: if the id was reused in between, the start time tells.
        let start_ticks = start_ticks(pid)?;
        Some(Process {
            id: PidFile { pid, start_ticks },
            fd,
        })
    }

    /// The very process that was noted, if it still lives.
    pub fn same(noted: PidFile) -> Option<Process> {
        Process::open(noted.pid).filter(|p| p.id == noted)
    }

    /// Ends it at once. It is dead when [`Process::gone`] says so.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.fd, Signal::KILL);
    }

    /// Waits for its end.
    pub async fn gone(self) -> std::io::Result<()> {
        // SAFETY: an OwnedFd is open, and the same descriptor, for as long as it lives; the AsyncFd
        // owns it from here on and never gives it away.
        let fd = unsafe { AsyncFd::register_with_interest(self.fd, Interest::READABLE) }
            .map_err(|e| e.into_parts().1)?;
        loop {
            let mut ready = fd.readable().await?;
            if ready.ready().is_readable() {
                return Ok(());
            }
            ready.clear_ready_matching(Ready::READABLE);
        }
    }

    /// A second handle to the same process.
    pub fn again(&self) -> std::io::Result<Process> {
        Ok(Process {
            id: self.id,
            fd: self.fd.try_clone()?,
        })
    }
}

/// Field 22 of `/proc/PID/stat`, and `None` for a zombie: it is as good as dead.
pub fn start_ticks(pid: i32) -> Option<u64> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(stat: &str) -> Option<u64> {
    // The command's name may hold anything, also blanks and brackets: count from its last bracket.
    let rest = stat.get(stat.rfind(')')? + 1..)?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Reads a pid file written by [`write_pid_file`] or the replicator.
pub fn read_pid_file(path: &Path) -> Option<PidFile> {
    let text = std::fs::read_to_string(path).ok()?;
    serde_json::from_str(text.get(..text.len().min(4096))?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process named `a) R 1 (b` must not shift the fields.
    #[test]
    fn the_start_time_is_found_behind_a_hostile_name() {
        let mut stat = String::from("42 (a) R 1 (b) S");
        for i in 4..=21 {
            stat.push_str(&format!(" {i}"));
        }
        stat.push_str(" 777 23 24");
        assert_eq!(parse_stat(&stat), Some(777));
        assert_eq!(parse_stat(&stat.replace(") S", ") Z")), None);
        assert_eq!(parse_stat("42 (a"), None);
    }

    /// The end of a process is seen, and a later process of the same id is not taken for it.
    #[tokio::test]
    async fn a_dead_process_is_not_the_same() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep");
        let pid = i32::try_from(child.id()).expect("pid");
        let p = Process::open(pid).expect("it lives");
        let id = p.id;
        assert!(Process::same(id).is_some());
        assert!(
            Process::same(PidFile {
                start_ticks: id.start_ticks + 1,
                ..id
            })
            .is_none()
        );
        p.kill();
        tokio::time::timeout(std::time::Duration::from_secs(5), p.gone())
            .await
            .expect("seen in time")
            .expect("pidfd");
        assert!(Process::same(id).is_none(), "a zombie does not live");
        child.wait().expect("reaped");
    }
}
