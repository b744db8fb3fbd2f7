//! The outside world: the client that keeps the guest busy, and the recorder at the switch.

use crate::pair::{Pair, program};
use anyhow::{Result, ensure};
use havm_guest::client::ClientHandle;
use havm_guest::recorder::RecorderHandle;
use havm_guest::report::Ask;
use std::net::Ipv4Addr;

/// Starts a client that keeps `connections` busy with the guest at `ip`.
///
/// # Errors
/// The guest does not answer.
pub fn client(pair: &Pair, ip: Ipv4Addr, connections: usize) -> Result<ClientHandle> {
    let mut c = pair.lab.client_command(&program("testify-client")?)?;
    c.args([
        "run",
        &ip.to_string(),
        "--connections",
        &connections.to_string(),
    ]);
    ClientHandle::start(c)
}

/// Starts the recorder at both hosts' switch ports.
///
/// # Errors
/// No lab.
pub fn recorder(pair: &Pair) -> Result<RecorderHandle> {
    let mut c = pair.lab.switch_command(&program("testify-client")?)?;
    c.args(["record", "lan-alpha", "lan-beta"]);
    RecorderHandle::start(c)
}

/// Asks the guest something; what it says.
///
/// # Errors
/// It does not answer.
pub fn ask(pair: &Pair, ip: Ipv4Addr, question: &Ask) -> Result<String> {
    let mut c = pair.lab.client_command(&program("testify-client")?)?;
    c.args(["ask", &ip.to_string(), &serde_json::to_string(question)?]);
    let out = c.output()?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
