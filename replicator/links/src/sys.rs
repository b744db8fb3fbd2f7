//! Two system calls that no safe crate of ours wraps.
#![allow(unsafe_code)]

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Lets the calling thread run before all threads of normal priority. Needs CAP_SYS_NICE; without
/// it the thread stays as it is.
pub(crate) fn run_first(priority: i32) -> io::Result<()> {
    let param = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: `param` lives through the call, which only reads it; thread 0 is the caller.
    match unsafe {
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &param)
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the calling thread run sooner than others of normal priority, without starving them: for
/// threads that a guest's held output waits for. Needs CAP_SYS_NICE; without it the thread stays
/// as it is.
pub(crate) fn run_sooner() -> io::Result<()> {
    const NICE: i32 = -10;
    // SAFETY: plain numbers; on Linux, PRIO_PROCESS with 0 means the calling thread alone.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The socket takes more only while less than `bytes` wait in it unsent: so a slow link does not
/// hoard frames that another could carry.
pub(crate) fn limit_unsent(socket: &TcpStream, bytes: u32) -> io::Result<()> {
    // SAFETY: the pointer is to a live u32 of the length given, which the call only reads.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
