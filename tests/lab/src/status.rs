//! What a lab looks like now.

use crate::names::{Host, PORTS};
use crate::net::LinkState;
use crate::{Lab, run::run};
use anyhow::Result;
use serde::Serialize;
use std::fmt::Write;

/// A lab.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub dir: String,
    /// It is up.
    pub up: bool,
    /// Its hosts.
    pub hosts: Vec<HostStatus>,
    /// Its links.
    pub links: Vec<(String, LinkState)>,
}

/// A host.
#[derive(Debug, Serialize)]
pub struct HostStatus {
    /// Which.
    pub host: Host,
    /// `on`, `off` or `frozen`.
    pub power: &'static str,
    /// The number of its process 1, seen from outside.
    pub pid: Option<i32>,
    /// Its domains and their states, as virsh names them; none where libvirt does not answer.
    pub guests: Option<Vec<(String, String)>>,
}

impl Status {
    /// Looks.
    pub fn of(lab: &Lab) -> Result<Status> {
        let links = lab.links()?;
        let mut names: Vec<_> = PORTS.iter().map(|p| p.link).collect();
        names.dedup();
        Ok(Status {
            name: lab.name().to_owned(),
            dir: lab.dir().display().to_string(),
            up: lab.is_up(),
            hosts: Host::ALL.into_iter().map(|h| host_status(lab, h)).collect(),
            links: names
                .into_iter()
                .map(|n| (n.to_owned(), links.state(n)))
                .collect(),
        })
    }

    /// For a person.
    pub fn text(&self) -> String {
        let mut out = format!("lab {} in {}\n", self.name, self.dir);
        if !self.up {
            return out + "  not up\n";
        }
        for h in &self.hosts {
            let pid = h.pid.map_or(String::new(), |p| format!("  process {p}"));
            let _ = writeln!(out, "  {:<6} {}{pid}", h.host.name(), h.power);
            for (name, state) in h.guests.iter().flatten() {
                let _ = writeln!(out, "           guest {name}: {state}");
            }
        }
        for (name, state) in &self.links {
            let text = match state {
                LinkState::Up => "up".to_owned(),
                LinkState::Down => "down".to_owned(),
                LinkState::Drop(percent) => format!("drops {percent} %"),
                LinkState::OneWay(a, b) => format!("only {a} to {b}"),
            };
            let _ = writeln!(out, "  link {name:<11} {text}");
        }
        out
    }
}

fn host_status(lab: &Lab, host: Host) -> HostStatus {
    let init = lab.files(host).init();
    let power = match (&init, lab.is_frozen(host)) {
        (None, _) => "off",
        (Some(_), true) => "frozen",
        (Some(_), false) => "on",
    };
    // A frozen libvirtd would never answer.
    let guests = (power == "on" && host.has_libvirt())
        .then(|| guests(lab, host).ok())
        .flatten();
    HostStatus {
        host,
        power,
        pid: init.map(|p| p.pid),
        guests,
    }
}

fn guests(lab: &Lab, host: Host) -> Result<Vec<(String, String)>> {
    let mut command = lab.command(host, "timeout")?;
    let text = run(command.args(["5", "virsh", "-q", "list", "--all"]))?;
    let rows = text.lines().filter_map(|l| {
        let mut words = l.split_whitespace().skip(1);
        Some((
            words.next()?.to_owned(),
            words.collect::<Vec<_>>().join(" "),
        ))
    });
    Ok(rows.collect())
}
