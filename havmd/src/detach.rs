//! Starting a process that outlives the daemon: own session, streams to a log, outside of the
//! daemon's unit where systemd runs.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Whether systemd is this system's init (as sd_booted(3) finds out).
fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Starts `program args` detached. `unit` names its scope under systemd, so that stopping the
/// daemon's unit does not take it along.
pub fn spawn(program: &Path, args: &[&str], unit: &str, log: &Path) -> io::Result<Child> {
    let out = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log)?;
    let mut cmd = if systemd_runs() {
        let mut c = Command::new("systemd-run");
        c.args(["--scope", "--quiet", "--collect", "--unit", unit, "--"])
            .arg(program);
        c
    } else {
        Command::new(program)
    };
    cmd.args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    // SAFETY: setsid is a bare system call: async-signal-safe, touches no memory of the parent.
    unsafe {
        cmd.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
    }
    cmd.spawn()
}
