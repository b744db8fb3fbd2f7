//! Waiting for a guest to reach a state, and saying what goes on meanwhile.

use super::Exit;
use super::talk::{Daemon, Trouble};
use crate::render::status::word;
use crate::render::time::bytes;
use havm_core::ids::GuestName;
use havm_core::status::GuestStatus;
use std::time::{Duration, Instant};

/// What is known after a look.
pub enum Look {
    /// Not yet.
    Wait,
    /// It is so.
    Reached,
    /// It will not come to that.
    Failed(String),
}

/// Looks every 100 ms until `judge` is satisfied; prints what changes, and at least every 5 s.
pub fn until(
    daemon: &Daemon,
    guest: &GuestName,
    limit: Duration,
    mut judge: impl FnMut(&GuestStatus) -> Look,
) -> Result<GuestStatus, Trouble> {
    let end = Instant::now() + limit;
    let (mut said, mut said_at) = (String::new(), Instant::now());
    loop {
        match daemon.status() {
            Ok(h) => {
                if let Some(g) = h.status.guests.iter().find(|g| g.guest == *guest) {
                    match judge(g) {
                        Look::Reached => return Ok(g.clone()),
                        Look::Failed(text) => {
                            return Err(Trouble {
                                text,
                                exit: Exit::Failed,
                            });
                        }
                        Look::Wait => {}
                    }
                    let now = line(g);
                    let age = said_at.elapsed();
                    if age > Duration::from_secs(5)
                        || (now != said && age > Duration::from_millis(900))
                    {
                        eprintln!("{now}");
                        (said, said_at) = (now, Instant::now());
                    }
                }
            }
            // The daemon may be restarted meanwhile: the guest's fate is not its.
            Err(t) if Instant::now() > end => return Err(t),
            Err(_) => {}
        }
        if Instant::now() > end {
            return Err(Trouble {
                text: format!(
                    "not reached within {} s; it may still come: `havm status {guest}`",
                    limit.as_secs()
                ),
                exit: Exit::TimedOut,
            });
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn line(g: &GuestStatus) -> String {
    let sync = g.replica.as_ref().and_then(|r| r.sync);
    let sync = sync.map_or(String::new(), |(done, total)| {
        let percent = (done * 100).checked_div(total).unwrap_or(100).min(100);
        format!(" [{percent} % of {}]", bytes(total))
    });
    format!("{}: {}{sync}: {}", g.guest, word(g.safety), g.why)
}
