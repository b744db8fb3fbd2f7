//! What runs inside the guest.
//!
//! ```text
//!   init: mounts, modules, address ──> disk: record log ──> server: requests, echo
//!                                      memory: dirty and check
//! ```

pub mod disk;
pub mod init;
pub mod memory;
pub mod server;
mod sys;

/// Writes a line to the console.
pub fn say(text: &str) {
    println!("havm-guest: {text}");
}
