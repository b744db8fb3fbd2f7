//! Namespaces, switches and cables; and how cables are cut.
//!
//! A link that is down has its switch ports down: both ends see NO-CARRIER, as with a pulled cable.
//! Loss and one-way links are nftables rules on the switch, which the ends cannot see.

use crate::names::{CLIENT, Host, PORTS, Port, SWITCH, SWITCHES, ports_of};
use crate::run::{in_netns, ip_batch, netns_path, run_with_input};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// How a link is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// As new.
    Up,
    /// Unplugged.
    Down,
    /// Loses this share of the frames, percent, in both directions.
    Drop(u8),
    /// Carries frames from the first to the second box only.
    OneWay(String, String),
}

/// The states of all links that are not as new.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Links(BTreeMap<String, LinkState>);

impl Links {
    /// A link's state.
    pub fn state(&self, link: &str) -> LinkState {
        self.0.get(link).cloned().unwrap_or(LinkState::Up)
    }

    /// Remembers a state.
    pub fn set(&mut self, link: &str, state: LinkState) {
        self.0.insert(link.to_owned(), state);
    }
}

/// The full name of a namespace of a lab.
pub fn netns(lab: &str, at: &str) -> String {
    format!("{lab}-{at}")
}

/// All boxes that have a network namespace.
pub fn boxes() -> impl Iterator<Item = &'static str> {
    Host::ALL
        .into_iter()
        .map(Host::name)
        .chain([CLIENT, SWITCH])
}

/// Makes all namespaces and cables of a lab. The hosts' ports stay down: they are off.
pub fn make(lab: &str) -> Result<()> {
    let add: Vec<_> = boxes()
        .map(|b| format!("netns add {}", netns(lab, b)))
        .collect();
    ip_batch(None, &add)?;
    for name in boxes() {
        in_netns(&netns(lab, name), quiet_ipv6).with_context(|| format!("sysctl in {name}"))?;
    }
    let mut sw = vec!["link set lo up".to_owned()];
    for bridge in SWITCHES {
        sw.push(format!(
            "link add {bridge} type bridge stp_state 0 forward_delay 0"
        ));
        sw.push(format!("link set {bridge} up"));
    }
    for p in &PORTS {
        let peer = netns(lab, p.at);
        sw.push(format!(
            "link add {} type veth peer name {} netns {peer}",
            p.port, p.interface
        ));
        sw.push(format!("link set {} master {}", p.port, p.switch));
        if p.at == CLIENT {
            sw.push(format!("link set {} up", p.port));
        }
    }
    ip_batch(Some(&netns(lab, SWITCH)), &sw)?;
    for name in boxes().filter(|b| *b != SWITCH) {
        let mut lines = vec!["link set lo up".to_owned()];
        for p in PORTS.iter().filter(|p| p.at == name) {
            match p.address {
                Some(a) => lines.push(format!("addr add {a} dev {}", p.interface)),
                None => {
                    lines.push("link add br0 type bridge stp_state 0 forward_delay 0".to_owned());
                    lines.push(format!("link set {} master br0", p.interface));
                    lines.push("link set br0 up".to_owned());
                }
            }
            lines.push(format!("link set {} up", p.interface));
        }
        ip_batch(Some(&netns(lab, name)), &lines)?;
    }
    Ok(())
}

/// Its multicast chatter would be noise in every capture.
fn quiet_ipv6() -> Result<()> {
    for which in ["all", "default"] {
        let knob = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        if Path::new(&knob).exists() {
            std::fs::write(&knob, "1").with_context(|| knob.clone())?;
        }
    }
    Ok(())
}

/// Removes the namespaces; what is not there is no error.
pub fn remove(lab: &str) -> Result<()> {
    let there: Vec<_> = boxes()
        .map(|b| netns(lab, b))
        .filter(|n| netns_path(n).exists())
        .collect();
    if there.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = there.iter().map(|n| format!("netns del {n}")).collect();
    ip_batch(None, &lines)
}

/// Plugs a host's cables in (those that are not cut) or out.
pub fn plug(lab: &str, host: Host, links: &Links, on: bool) -> Result<()> {
    let lines: Vec<_> = PORTS
        .iter()
        .filter(|p| p.at == host.name())
        .map(|p| {
            let up = on && links.state(p.link) != LinkState::Down;
            format!("link set {} {}", p.port, if up { "up" } else { "down" })
        })
        .collect();
    ip_batch(Some(&netns(lab, SWITCH)), &lines)
}

/// Brings a link into a state. `powered` says which boxes are on: an off box's ports stay down.
pub fn set_link(
    lab: &str,
    link: &str,
    state: &LinkState,
    powered: impl Fn(&str) -> bool,
) -> Result<()> {
    let ports = ports_of(link)?;
    // The rules first: a link that comes up lossy must not be whole for a moment.
    let rules = rules(link, &ports, state)?;
    in_netns(&netns(lab, SWITCH), move || {
        run_with_input(Command::new("nft").args(["-f", "-"]), &rules)
    })?;
    let lines: Vec<_> = ports
        .iter()
        .map(|p| {
            let up = *state != LinkState::Down && powered(p.at);
            format!("link set {} {}", p.port, if up { "up" } else { "down" })
        })
        .collect();
    ip_batch(Some(&netns(lab, SWITCH)), &lines)
}

/// The nftables script for a link's state: one table a link, replaced as a whole.
fn rules(link: &str, ports: &[&Port], state: &LinkState) -> Result<String> {
    let table = format!("link_{}", link.replace('-', "_"));
    let mut out = format!("table bridge {table}\ndelete table bridge {table}\n");
    let mut drops = Vec::new();
    match state {
        LinkState::Up | LinkState::Down => return Ok(out),
        LinkState::Drop(percent) if *percent <= 100 => {
            // On a link with two ports each frame is looked at once, where it comes in; on one
            // with a single port, also where it goes out.
            let lose = format!("numgen random mod 100 < {percent} drop");
            for p in ports {
                drops.push(format!("iifname {} {lose}", p.port));
                if ports.len() == 1 {
                    drops.push(format!("oifname {} {lose}", p.port));
                }
            }
        }
        LinkState::Drop(percent) => bail!("{percent} percent is more than all"),
        LinkState::OneWay(from, to) => {
            let names: Vec<_> = ports.iter().map(|p| p.at).collect();
            let end = |name: &str| ports.iter().find(|p| p.at == name);
            match (end(from), end(to)) {
                (Some(_), Some(silent)) if from != to => {
                    drops.push(format!("iifname {} drop", silent.port));
                }
                // A link with one port: its other end is the switch.
                (Some(p), None) if to == p.switch => drops.push(format!("oifname {} drop", p.port)),
                (None, Some(p)) if from == p.switch => {
                    drops.push(format!("iifname {} drop", p.port));
                }
                _ => bail!(
                    "{link} has the ends {}: {from}>{to} is not one of its directions",
                    if names.len() == 1 {
                        format!("{} and {}", names[0], ports[0].switch)
                    } else {
                        names.join(" and ")
                    }
                ),
            }
        }
    }
    out += &format!(
        "table bridge {table} {{\nchain forward {{\ntype filter hook forward priority 0;\n"
    );
    for rule in drops {
        out += &format!("{rule}\n");
    }
    out += "}\n}\n";
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(link: &str, state: LinkState) -> Result<String> {
        rules(link, &ports_of(link)?, &state)
    }

    /// `oneway A>B` means that A is heard by B and B is not heard by A.
    #[test]
    fn one_way_drops_what_the_second_end_sends() {
        let way = |a: &str, b: &str| LinkState::OneWay(a.to_owned(), b.to_owned());
        assert!(
            script("rep0", way("alpha", "beta"))
                .unwrap()
                .contains("iifname rep0-beta drop")
        );
        assert!(
            script("lan-beta", way("beta", "lan"))
                .unwrap()
                .contains("oifname lan-beta drop")
        );
        assert!(
            script("lan-beta", way("lan", "beta"))
                .unwrap()
                .contains("iifname lan-beta drop")
        );
        assert!(script("rep0", way("alpha", "gamma")).is_err());
        assert!(script("rep9", LinkState::Up).is_err());
        assert!(script("rep0", LinkState::Drop(101)).is_err());
    }
}
