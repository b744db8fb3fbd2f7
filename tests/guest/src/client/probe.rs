//! The echo probe: a datagram every few milliseconds, and when its reply came.
//!
//! TCP answers a loss by timers of its own, so the gaps between answers are partly the client's. The
//! probe measures how long the guest itself was not there.

use super::worker::Shared;
use crate::proto::ECHO_PORT;
use anyhow::{Context, Result};
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Starts the probe: one thread sends, one receives.
pub fn start(guest: IpAddr, interval: Duration, shared: &Shared) -> Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).context("the probe's socket")?;
    socket
        .connect((guest, ECHO_PORT))
        .context("the probe's socket")?;
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .context("the probe's socket")?;
    let receiver = socket.try_clone().context("the probe's socket")?;
    let (sending, receiving) = (shared.clone(), shared.clone());
    std::thread::spawn(move || {
        let mut next = Instant::now();
        while !sending.stopping.load(Ordering::Relaxed) {
            // An unreachable guest is a lost datagram, which the gap shows.
            let _ = socket.send(&sending.book().probe.sent.to_le_bytes());
            sending.book().probe.sent += 1;
            next += interval;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            next = next.max(Instant::now());
        }
    });
    std::thread::spawn(move || {
        let mut reply = [0; 64];
        while !receiving.stopping.load(Ordering::Relaxed) {
            if receiver.recv(&mut reply).is_ok() {
                let now_ms = receiving.now_ms();
                let mut book = receiving.book();
                book.probe.received += 1;
                book.probe.gaps.event(now_ms);
            }
        }
    });
    Ok(())
}
