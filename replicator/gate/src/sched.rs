//! How the forwarders stand in the queue for a processor.

/// Lets the calling thread go before ordinary ones (nice -10), where we may: a forwarder that is put
/// aside in the middle of a batch makes a barrier wait, and the guest with it.
pub(crate) fn go_first() {
    // SAFETY: plain system call on the calling thread (0), with no memory involved.
    let r = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -10) };
    if r < 0 {
        let e = std::io::Error::last_os_error();
        tracing::debug!(%e, "the gate's threads keep their ordinary priority");
    }
}
