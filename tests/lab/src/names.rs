//! The boxes of a lab, its links, and what they are called.
//!
//! ```text
//!            ┌───────── rep0 10.77.0.0/24 ─────────┐
//!   alpha ───┼───────── rep1 10.77.1.0/24 ─────────┼─── beta        every line goes through a
//!     │ br0──┼─ lan-alpha ─┐         ┌─ lan-beta ──┼──br0 │         bridge in the namespace `sw`:
//!     │      │             └── lan ──┘             │      │         there links are cut, so that
//!     │                         │ lan-client              │         both ends see the same as
//!     │                       client 10.9.0.2/24          │         with a pulled cable
//!     └── mgmt-alpha ──────── mgmt ──────── mgmt-beta ────┘
//!         10.78.0.1             │ mgmt-gamma    10.78.0.2
//!                             gamma 10.78.0.3
//! ```

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A machine of the lab that can be powered on and off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Host {
    /// First virtualization host.
    Alpha,
    /// Second virtualization host.
    Beta,
    /// Third box, for the witness; no libvirt.
    Gamma,
}

impl Host {
    /// All of them.
    pub const ALL: [Host; 3] = [Host::Alpha, Host::Beta, Host::Gamma];

    /// Its name, also its host name.
    pub fn name(self) -> &'static str {
        match self {
            Host::Alpha => "alpha",
            Host::Beta => "beta",
            Host::Gamma => "gamma",
        }
    }

    /// Runs libvirtd.
    pub fn has_libvirt(self) -> bool {
        self != Host::Gamma
    }

    /// Last part of its addresses.
    pub fn number(self) -> u8 {
        match self {
            Host::Alpha => 1,
            Host::Beta => 2,
            Host::Gamma => 3,
        }
    }

    /// The other of the two virtualization hosts; gamma has none.
    pub fn peer(self) -> Option<Host> {
        match self {
            Host::Alpha => Some(Host::Beta),
            Host::Beta => Some(Host::Alpha),
            Host::Gamma => None,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Host {
    type Err = anyhow::Error;
    fn from_str(s: &str) -> Result<Host> {
        match Host::ALL.into_iter().find(|h| h.name() == s) {
            Some(host) => Ok(host),
            None => bail!("no host {s:?}: there are alpha, beta and gamma"),
        }
    }
}

/// The namespace that holds the switches.
pub const SWITCH: &str = "sw";
/// The namespace of the outside world.
pub const CLIENT: &str = "client";

/// One end of a link: a veth pair between a box and the switch namespace.
#[derive(Debug)]
pub struct Port {
    /// The link that it belongs to.
    pub link: &'static str,
    /// The box at its other end.
    pub at: &'static str,
    /// The interface's name in the box.
    pub interface: &'static str,
    /// Its name in the switch namespace.
    pub port: &'static str,
    /// The switch that it is plugged in.
    pub switch: &'static str,
    /// The address in the box; none on a host's LAN uplink, which is in the bridge `br0`.
    pub address: Option<&'static str>,
}

const fn port(
    link: &'static str,
    at: &'static str,
    interface: &'static str,
    port: &'static str,
    switch: &'static str,
    address: Option<&'static str>,
) -> Port {
    Port {
        link,
        at,
        interface,
        port,
        switch,
        address,
    }
}

/// Every port of a lab.
pub const PORTS: [Port; 10] = [
    port(
        "rep0",
        "alpha",
        "rep0",
        "rep0-alpha",
        "rep0",
        Some("10.77.0.1/24"),
    ),
    port(
        "rep0",
        "beta",
        "rep0",
        "rep0-beta",
        "rep0",
        Some("10.77.0.2/24"),
    ),
    port(
        "rep1",
        "alpha",
        "rep1",
        "rep1-alpha",
        "rep1",
        Some("10.77.1.1/24"),
    ),
    port(
        "rep1",
        "beta",
        "rep1",
        "rep1-beta",
        "rep1",
        Some("10.77.1.2/24"),
    ),
    port("lan-alpha", "alpha", "up0", "lan-alpha", "lan", None),
    port("lan-beta", "beta", "up0", "lan-beta", "lan", None),
    port(
        "lan-client",
        "client",
        "up0",
        "lan-client",
        "lan",
        Some("10.9.0.2/24"),
    ),
    port(
        "mgmt-alpha",
        "alpha",
        "mgmt",
        "mgmt-alpha",
        "mgmt",
        Some("10.78.0.1/24"),
    ),
    port(
        "mgmt-beta",
        "beta",
        "mgmt",
        "mgmt-beta",
        "mgmt",
        Some("10.78.0.2/24"),
    ),
    port(
        "mgmt-gamma",
        "gamma",
        "mgmt",
        "mgmt-gamma",
        "mgmt",
        Some("10.78.0.3/24"),
    ),
];

/// The switches, each a bridge in the switch namespace.
pub const SWITCHES: [&str; 4] = ["rep0", "rep1", "lan", "mgmt"];

/// The ports of a link; an error names the links that there are.
pub fn ports_of(link: &str) -> Result<Vec<&'static Port>> {
    let found: Vec<_> = PORTS.iter().filter(|p| p.link == link).collect();
    if found.is_empty() {
        let mut names: Vec<_> = PORTS.iter().map(|p| p.link).collect();
        names.dedup();
        bail!("no link {link:?}: there are {}", names.join(", "));
    }
    Ok(found)
}

/// A lab's name starts the names of its namespaces and cgroups: only what is safe there.
pub fn check_lab_name(name: &str) -> Result<()> {
    let ok = (1..=32).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if !ok {
        bail!("lab name {name:?}: 1 to 32 of a-z A-Z 0-9 - _, starting with a letter or digit");
    }
    Ok(())
}
