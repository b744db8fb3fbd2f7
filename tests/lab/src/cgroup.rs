//! One cgroup a box: to freeze all of a host at once, and to find every process of it.
//!
//! Version 2 is preferred, in the unified or the hybrid layout: its members can be killed while they
//! are frozen, all in one step. With version 1 the freezer does it.

use crate::procs::{Process, wait_until};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
    v2: bool,
}

impl Cgroup {
    /// The cgroup of a box of a lab; made by [`Cgroup::make`].
    pub fn of(lab: &str, at: &str) -> Result<Cgroup> {
        let name = format!("havm-lab-{lab}-{at}");
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            if Path::new(root).join("cgroup.controllers").exists() {
                return Ok(Cgroup {
                    path: Path::new(root).join(name),
                    v2: true,
                });
            }
        }
        let v1 = Path::new("/sys/fs/cgroup/freezer");
        if v1.join("cgroup.procs").exists() {
            return Ok(Cgroup {
                path: v1.join(name),
                v2: false,
            });
        }
        bail!(
            "no cgroup with a freezer is mounted: \
             `mount -t cgroup2 none /sys/fs/cgroup` and try again"
        )
    }

    /// Makes it.
    pub fn make(&self) -> Result<()> {
        fs::create_dir_all(&self.path).with_context(|| format!("making {}", self.path.display()))
    }

    /// The file that a process writes `0` to, to become a member.
    pub fn procs_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Makes this process a member.
    pub fn join(&self) -> Result<()> {
        let file = self.procs_file();
        fs::write(&file, "0").with_context(|| format!("joining {}", file.display()))
    }

    /// Its members.
    pub fn members(&self) -> Vec<Process> {
        let text = fs::read_to_string(self.procs_file()).unwrap_or_default();
        text.lines()
            .filter_map(|l| Process::now(l.parse().ok()?))
            .collect()
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Stops every member, and waits until all stand; an error when that takes longer than `time`
    /// (those that stand stay so).
    pub fn freeze(&self, time: Duration) -> Result<()> {
        let (file, value) = if self.v2 {
            ("cgroup.freeze", "1")
        } else {
            ("freezer.state", "FROZEN")
        };
        self.write(file, value)?;
        if !wait_until(time, || self.frozen()) {
            bail!("{} did not freeze within {time:?}", self.path.display());
        }
        Ok(())
    }

    /// Lets every member go on.
    pub fn thaw(&self) -> Result<()> {
        if self.v2 {
            self.write("cgroup.freeze", "0")
        } else {
            self.write("freezer.state", "THAWED")
        }
    }

    /// All members stand.
    pub fn frozen(&self) -> bool {
        if self.v2 {
            self.read("cgroup.events").lines().any(|l| l == "frozen 1")
        } else {
            self.read("freezer.state").trim() == "FROZEN"
        }
    }

    /// Kills every member, frozen or not, without letting any run another instruction.
    pub fn kill(&self) -> Result<()> {
        if self.v2 && self.path.join("cgroup.kill").exists() {
            return self.write("cgroup.kill", "1");
        }
        for member in self.members() {
            member.kill()?;
        }
        // Version 1 delivers the kill when it thaws, before anything else.
        self.thaw()
    }

    /// Kills every member, waits for their end, and removes it; what is not there is no error.
    pub fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        let emptied = wait_until(Duration::from_secs(10), || {
            if self.kill().is_err() || !self.read("cgroup.procs").is_empty() {
                return false;
            }
            fs::remove_dir(&self.path).is_ok()
        });
        if !emptied {
            bail!(
                "{} still has members: {:?}",
                self.path.display(),
                self.members()
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// Freezing, and killing what is frozen, with each kind of cgroup that this machine has.
    #[test]
    fn members_freeze_and_die() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let name = format!("havm-lab-unit{}", std::process::id());
        let kinds = [
            ("/sys/fs/cgroup", "cgroup.controllers", true),
            ("/sys/fs/cgroup/unified", "cgroup.controllers", true),
            ("/sys/fs/cgroup/freezer", "cgroup.procs", false),
        ];
        let mut tried = 0;
        for (root, sign, v2) in kinds {
            if !Path::new(root).join(sign).exists() {
                continue;
            }
            tried += 1;
            let cgroup = Cgroup {
                path: Path::new(root).join(&name),
                v2,
            };
            cgroup.make().unwrap();
            let mut child = Command::new("/bin/sh")
                .args(["-c", "echo 0 >\"$0\" && echo in && exec sleep 100"])
                .arg(cgroup.procs_file())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut said = [0; 3];
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
            assert_eq!(cgroup.members().len(), 1);
            assert!(!cgroup.frozen());
            cgroup.freeze(Duration::from_secs(5)).unwrap();
            cgroup.thaw().unwrap();
            assert!(!cgroup.frozen());
            cgroup.freeze(Duration::from_secs(5)).unwrap();
            cgroup.kill().unwrap();
            assert!(
                !child.wait().unwrap().success(),
                "{root}: it was not killed"
            );
            cgroup.remove().unwrap();
            assert!(!cgroup.path.exists());
        }
        assert!(tried > 0, "no cgroup here");
    }
}
