//! A pair on the lab: configured, paired, with a witness, as an admin would set it up.

use crate::story::tell;
use crate::wait::{LONG, until};
use anyhow::{Context, Result, bail};
use havm_core::record::Role;
use havm_core::status::{GuestStatus, Safety, Status};
use havm_guest::domain::Domain;
use havm_lab::{Host, Lab, Options};
use std::process::Output;
use std::time::Duration;

/// Both servers.
pub const SERVERS: [Host; 2] = [Host::Alpha, Host::Beta];

/// What the tests change of the defaults.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The lab's name.
    pub lab: String,
    /// See `[detection] lost_ms`; the default where none.
    pub lost_ms: Option<u64>,
    /// See `[failback] stability_s`.
    pub stability_s: u64,
    /// See `[failback] policy`.
    pub automatic: bool,
}

impl Default for Setup {
    fn default() -> Self {
        // Two hosts with their guests, a witness and a client share this machine's cores: what is
        // late here is not dead. The default is for real servers, and for the bench.
        Setup {
            lab: "havm".into(),
            lost_ms: Some(400),
            stability_s: 3,
            automatic: true,
        }
    }
}

/// The part of `havm status --json` that is looked at.
#[derive(serde::Deserialize)]
struct HostStatus {
    status: Status,
}

/// A pair that runs.
pub struct Pair {
    /// The lab under it.
    pub lab: Lab,
}

impl Pair {
    /// Brings up a lab, starts the daemons and the witness, and pairs them.
    ///
    /// # Errors
    /// What did not come up.
    pub fn up(setup: &Setup) -> Result<Pair> {
        let options = Options::named(&setup.lab)?;
        let lab = Lab::open(&options)?;
        lab.down()?;
        for host in Host::ALL {
            let files = lab.files(host);
            let boot = files.path("boot.d");
            if boot.exists() {
                std::fs::remove_dir_all(&boot).context("emptying boot.d")?;
            }
        }
        let lab = Lab::up(&options)?;
        let pair = Pair { lab };
        pair.settle(setup).map_err(|e| e.context(pair.logs()))?;
        Ok(pair)
    }

    fn settle(&self, setup: &Setup) -> Result<()> {
        let pair = self;
        pair.configure(setup)?;
        pair.introduce()?;
        for host in SERVERS {
            pair.start_daemon(host)?;
        }
        for host in SERVERS {
            until(
                "the daemons to see each other and the witness",
                LONG,
                || {
                    let s = pair.status(host)?;
                    let witness = s.witness.as_ref().is_some_and(|w| w.reachable);
                    let linked = s.links.iter().all(|l| l.up);
                    Ok((witness && linked).then_some(()))
                },
            )?;
        }
        Ok(())
    }

    fn configure(&self, setup: &Setup) -> Result<()> {
        for (host, me, other) in [(Host::Alpha, 1, 2), (Host::Beta, 2, 1)] {
            let peer = host.peer().context("a server has a peer")?;
            let lost = setup.lost_ms.map_or(String::new(), |ms| {
                format!("\n[detection]\nlost_ms = {ms}\nstream_silent_ms = {ms}\n")
            });
            let text = format!(
                "[node]\nname = \"{host}\"\nlog = \"info\"\n\n\
                 [peer]\nname = \"{peer}\"\n\n\
                 [[peer.link]]\nname = \"rep0\"\nlocal = \"10.77.0.{me}\"\npeer = \"10.77.0.{other}\"\n\n\
                 [[peer.link]]\nname = \"rep1\"\nlocal = \"10.77.1.{me}\"\npeer = \"10.77.1.{other}\"\n\
                 {lost}\n\
                 [witness]\nkind = \"builtin\"\naddress = [\"10.78.0.3:7422\"]\n\n\
                 [failback]\npolicy = \"{}\"\nstability_s = {}\nflap_max = 1000\n",
                if setup.automatic {
                    "automatic"
                } else {
                    "manual"
                },
                setup.stability_s,
            );
            let path = self.lab.files(host).path("etc-havm/havm.toml");
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }

    /// Pairs the servers and enrols the witness: with the commands that an admin types.
    fn introduce(&self) -> Result<()> {
        let havm = program("havm")?;
        self.lab.files(Host::Gamma).add_boot(
            "10-witness",
            &format!(
                "#!/bin/sh\nexec {havm} witness --listen 10.78.0.3:7422 --state-dir /var/lib/havm/witness\n"
            ),
        )?;
        self.background(Host::Gamma, "10-witness")?;
        crate::pairing::pair(&self.lab, &havm)
    }

    fn start_daemon(&self, host: Host) -> Result<()> {
        let havmd = program("havmd")?;
        let script = format!("#!/bin/sh\nexec {havmd} --config /etc/havm/havm.toml\n");
        self.lab.files(host).add_boot("20-havmd", &script)?;
        self.background(host, "20-havmd")
    }

    /// Starts a program of boot.d by hand, as the next power on will.
    ///
    /// # Errors
    /// The host is off.
    pub fn background(&self, host: Host, name: &str) -> Result<()> {
        let files = self.lab.files(host);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(files.path("log").join(format!("{name}.log")))?;
        self.lab
            .command(host, "setsid")?
            .arg("--fork")
            .arg(files.path("boot.d").join(name))
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .status()
            .with_context(|| format!("start {name} on {host}"))?;
        Ok(())
    }

    /// Runs `havm` on a host.
    ///
    /// # Errors
    /// It could not be run; its exit code is in the output.
    pub fn havm(&self, host: Host, args: &[&str]) -> Result<Output> {
        self.lab
            .command(host, &program("havm")?)?
            .args(args)
            .output()
            .with_context(|| format!("havm {args:?} on {host}"))
    }

    /// Runs `havm`, and what it prints.
    ///
    /// # Errors
    /// Its exit code was not 0: what it said.
    pub fn havm_ok(&self, host: Host, args: &[&str]) -> Result<String> {
        let out = self.havm(host, args)?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        if !out.status.success() {
            let err = String::from_utf8_lossy(&out.stderr);
            bail!(
                "`havm {}` on {host}: {}\n{said}{err}",
                args.join(" "),
                out.status
            );
        }
        Ok(said)
    }

    /// What `havm status --json` says. (Its exit code tells how safe the guests are.)
    ///
    /// # Errors
    /// No daemon, or not JSON.
    pub fn status(&self, host: Host) -> Result<Status> {
        let out = self.havm(host, &["status", "--json"])?;
        let host_status: HostStatus = serde_json::from_slice(&out.stdout).with_context(|| {
            format!(
                "status of {host}: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            )
        })?;
        Ok(host_status.status)
    }

    /// One guest on one host.
    ///
    /// # Errors
    /// As [`Pair::status`], or the guest is not known there.
    pub fn guest(&self, host: Host, name: &str) -> Result<GuestStatus> {
        let guests = self.status(host)?.guests;
        let found = guests.into_iter().find(|g| g.guest.as_str() == name);
        found.with_context(|| format!("{host} knows no guest {name}"))
    }

    /// Defines a testifying guest as an admin would have, and protects it; returns how long that took.
    ///
    /// # Errors
    /// What `havm protect` said.
    pub fn protect(&self, domain: &Domain, home: Host) -> Result<Duration> {
        self.lab.define_guest(home, domain, DISK_BYTES)?;
        let t = std::time::Instant::now();
        self.havm_ok(home, &["protect", &domain.name, "--no-wait"])?;
        self.wait_protected(&domain.name, home)?;
        Ok(t.elapsed())
    }

    /// Waits until the guest runs on `host`, protected.
    ///
    /// # Errors
    /// It did not in [`LONG`].
    pub fn wait_protected(&self, name: &str, host: Host) -> Result<GuestStatus> {
        until(&format!("{name} to be protected on {host}"), LONG, || {
            let g = self.guest(host, name)?;
            if g.safety == Safety::Safe && g.role == Some(Role::Protected) && g.runs_here {
                return Ok(Some(g));
            }
            bail!("{:?}: {}", g.safety, g.why)
        })
    }

    /// Waits until the guest runs on `host`, however safe.
    ///
    /// # Errors
    /// It did not in [`LONG`].
    pub fn wait_runs(&self, name: &str, host: Host) -> Result<GuestStatus> {
        until(&format!("{name} to run on {host}"), LONG, || {
            let g = self.guest(host, name)?;
            let primary = matches!(g.role, Some(Role::Solo | Role::Protected));
            Ok((g.runs_here && primary).then_some(g))
        })
    }

    /// Compares both copies; fails where they differ.
    ///
    /// # Errors
    /// They differ, or could not be compared.
    pub fn verify(&self, host: Host, name: &str) -> Result<()> {
        let said = self.havm_ok(host, &["verify", name, "--json"])?;
        let v: serde_json::Value = serde_json::from_str(&said).context("verify --json")?;
        tell(format!(
            "  both copies of {name} are equal: {} pages, {} disk blocks",
            v["ram_pages"], v["disk_blocks"]
        ));
        Ok(())
    }

    /// The logs' last lines, for a failure.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for host in Host::ALL {
            let mut paths = vec![
                self.lab.files(host).path("log/20-havmd.log"),
                self.lab.files(host).path("log/10-witness.log"),
            ];
            let run = self.lab.files(host).path("run/havm/g");
            for d in std::fs::read_dir(run).into_iter().flatten().flatten() {
                paths.push(d.path().join("replicator.log"));
            }
            for p in paths {
                let Ok(text) = std::fs::read_to_string(&p) else {
                    continue;
                };
                let lines: Vec<&str> = text.lines().collect();
                let tail = &lines[lines.len().saturating_sub(40)..];
                let name = p.file_name().map(|n| n.to_string_lossy().into_owned());
                all += &format!(
                    "--- {host} {}\n{}\n",
                    name.unwrap_or_default(),
                    tail.join("\n")
                );
            }
        }
        all
    }
}

/// The size of a test guest's disk.
pub const DISK_BYTES: u64 = 64 << 20;

/// A program of this build.
///
/// # Errors
/// It was not built.
pub fn program(name: &str) -> Result<String> {
    let path = havm_lab::place::program(name)?;
    path.to_str()
        .map(str::to_owned)
        .context("the path of this build is not UTF-8")
}
