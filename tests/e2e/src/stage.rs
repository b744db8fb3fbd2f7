//! What every scenario plays on: a pair whose guest `web` is protected, at home on alpha.

use crate::outside;
use crate::pair::{Pair, SERVERS, Setup};
use crate::story::tell;
use crate::wait::{LONG, until};
use anyhow::{Context, Result, bail, ensure};
use havm_core::order::ReplicaState;
use havm_guest::client::{ClientHandle, Proof};
use havm_guest::domain::Domain;
use havm_lab::{Host, LinkState};
use std::time::Duration;

/// Links between the servers and to the witness, which a scenario may cut.
pub const LINKS: [&str; 5] = ["rep0", "rep1", "mgmt-alpha", "mgmt-beta", "mgmt-gamma"];

/// See the module.
pub struct Stage {
    /// The pair.
    pub pair: Pair,
    /// The guest.
    pub web: Domain,
}

impl Stage {
    /// A fresh one.
    ///
    /// # Errors
    /// What did not come up.
    pub fn set_up(setup: &Setup) -> Result<Stage> {
        let pair = Pair::up(setup)?;
        let web = Domain::new("web", 10);
        pair.protect(&web, Host::Alpha)
            .map_err(|e| e.context(pair.logs()))?;
        Ok(Stage { pair, web })
    }

    /// Undoes what a scenario may have left, and waits until the guest is protected at home.
    ///
    /// # Errors
    /// It does not heal.
    pub fn heal(&self) -> Result<()> {
        for host in SERVERS {
            if self.pair.lab.is_frozen(host) {
                self.pair.lab.thaw(host)?;
            }
            self.pair.lab.power_on(host)?;
        }
        for link in LINKS {
            self.link(link, true)?;
        }
        self.protected_at(Host::Alpha)
    }

    /// Waits until the guest is protected on `host`.
    ///
    /// # Errors
    /// It is not.
    pub fn protected_at(&self, host: Host) -> Result<()> {
        self.pair.wait_protected(&self.web.name, host).map(drop)
    }

    /// Brings a link up or down.
    ///
    /// # Errors
    /// The lab's.
    pub fn link(&self, name: &str, up: bool) -> Result<()> {
        self.pair
            .lab
            .set_link(name, if up { LinkState::Up } else { LinkState::Down })
    }

    /// The term on a host.
    ///
    /// # Errors
    /// No daemon.
    pub fn term(&self, host: Host) -> Result<u64> {
        Ok(self.pair.guest(host, &self.web.name)?.term.0)
    }

    /// The replicator's state on a host.
    ///
    /// # Errors
    /// No daemon or no replicator.
    pub fn replica(&self, host: Host) -> Result<ReplicaState> {
        let g = self.pair.guest(host, &self.web.name)?;
        g.replica
            .with_context(|| format!("no replicator on {host}"))
    }

    /// Kills a process of a host by its number in that host, as `kill -9` would.
    ///
    /// # Errors
    /// There is none.
    pub fn kill(&self, host: Host, pid: &str) -> Result<()> {
        let out = self
            .pair
            .lab
            .command(host, "kill")?
            .args(["-9", pid])
            .output()?;
        ensure!(
            out.status.success(),
            "kill {pid} on {host}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(())
    }

    /// The process that a file of the host names: plain, or JSON with a `pid`.
    ///
    /// # Errors
    /// No such file.
    pub fn pid_in(&self, host: Host, file: &str) -> Result<String> {
        let text = std::fs::read_to_string(self.pair.lab.files(host).path(file))
            .with_context(|| format!("{file} on {host}"))?;
        let json: Option<serde_json::Value> = serde_json::from_str(&text).ok();
        let pid = json
            .as_ref()
            .and_then(|j| j.get("pid").or(Some(j))?.as_i64());
        pid.map(|p| p.to_string())
            .with_context(|| format!("{file} on {host} names no process"))
    }

    /// The daemon's process on a host.
    ///
    /// # Errors
    /// It does not run.
    pub fn havmd(&self, host: Host) -> Result<String> {
        // The host has a PID namespace of its own: this sees nothing outside.
        let out = self
            .pair
            .lab
            .command(host, "pgrep")?
            .args(["-x", "havmd"])
            .output()?;
        let pid = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        ensure!(!pid.is_empty(), "no havmd on {host}");
        Ok(pid)
    }

    /// Kills the daemon of a host, and sees it gone.
    ///
    /// # Errors
    /// It did not run.
    pub fn kill_havmd(&self, host: Host) -> Result<()> {
        self.kill(host, &self.havmd(host)?)?;
        until("the daemon's end", LONG, || {
            Ok(self.havmd(host).is_err().then_some(()))
        })
    }

    /// Plays `act` while a client keeps the guest busy and a recorder watches both hosts' ports;
    /// afterwards nothing may be lost, repeated, taken back, or have been seen too early.
    ///
    /// # Errors
    /// `act`'s, or the proof is not perfect.
    pub fn under_load(
        &self,
        act: impl FnOnce(&Stage, &mut ClientHandle) -> Result<()>,
    ) -> Result<Proof> {
        let mut client = outside::client(&self.pair, self.web.ip, 4)?;
        let recorder = outside::recorder(&self.pair)?;
        std::thread::sleep(Duration::from_secs(1));
        act(self, &mut client)?;
        std::thread::sleep(Duration::from_secs(1));
        let proof = client.stop()?;
        let recorded = recorder.stop()?;
        tell(format!(
            "  client: {} of {} connections kept, {} answers, longest gap {:.0} ms",
            proof.connections_kept, proof.connections_before, proof.answers, proof.max_gap_ms
        ));
        if !proof.perfect() {
            bail!(
                "the client's proof is not perfect: {}",
                serde_json::to_string(&proof)?
            );
        }
        if recorded.uncommitted_frames_seen() > 0 {
            bail!(
                "frames were seen that were taken back: {:?}",
                recorded.conflicts
            );
        }
        Ok(proof)
    }
}
