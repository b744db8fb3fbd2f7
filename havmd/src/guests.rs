//! What this node keeps about each protected guest, and where.
//!
//! ```text
//!   STATE_DIR/guests/GUEST/guest.json            that it is protected, and its parts (below)
//!                          domain.xml            the whole definition, of a primary, for this node
//!                          domain-original.xml   what `unprotect` puts back (on the home node)
//!                          a.rec b.rec           the durable record
//!                          disk0/ disk1/ …       what the replicator remembers about each disk
//!   RUN_DIR/g/GUEST/       spec.json control.sock replicator.pid nbd-0.sock …
//!                   life.json                    the life of the QEMU that runs
//!                   qemu/qmp.sock                QEMU's own folder
//! ```

use crate::durable;
use crate::libvirt::transform::{PlannedNic, nbd_export, nbd_socket, qemu_dir, qmp_socket};
use havm_config::model::{Config, Guest, Policy};
use havm_core::ids::{GuestName, LifeId};
use havm_core::spec::{DiskSpec, NicSpec, PidFile, SPEC_VERSION, Spec};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The largest of these files that is read.
const MAX_FILE_BYTES: usize = 1024 * 1024;
/// The version of guest.json.
pub const GUEST_VERSION: u32 = 1;
/// How many guests a node takes.
pub const MAX_GUESTS: usize = 256;

/// Where things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// What lasts.
    pub state_dir: PathBuf,
    /// What a boot clears.
    pub run_dir: PathBuf,
}

impl Paths {
    /// Of a node's config.
    pub fn of(config: &Config) -> Paths {
        Paths {
            state_dir: config.node.state_dir.clone(),
            run_dir: config.node.run_dir.clone(),
        }
    }
    /// A guest's lasting folder.
    pub fn state(&self, g: &GuestName) -> PathBuf {
        self.state_dir.join("guests").join(g.as_str())
    }
    /// A guest's run folder.
    pub fn run(&self, g: &GuestName) -> PathBuf {
        self.run_dir.join("g").join(g.as_str())
    }
    /// The daemon's control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join("havmd.sock")
    }
}

/// A disk of a protected guest on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDisk {
    /// The raw image or block device.
    pub path: PathBuf,
    /// Its size, equal on both nodes.
    pub size_bytes: u64,
    /// It is a block device.
    pub block: bool,
}

/// `guest.json`: that a guest is protected, and its parts. The same on both nodes but for paths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestFile {
    /// See [`GUEST_VERSION`].
    pub version: u32,
    /// The guest.
    pub guest: GuestName,
    /// The name of its home node; a `[[guest]]` entry of the config overrides it.
    pub home: String,
    /// The versioned machine type.
    pub machine: String,
    /// Its disks in order.
    pub disks: Vec<GuestDisk>,
    /// Its NICs in order.
    pub nics: Vec<PlannedNic>,
}

impl GuestFile {
    /// Reads it; `None` where the guest is not protected here.
    pub fn load(paths: &Paths, g: &GuestName) -> io::Result<Option<GuestFile>> {
        let path = paths.state(g).join("guest.json");
        let Some(bytes) = durable::read_bounded(&path, MAX_FILE_BYTES)? else {
            return Ok(None);
        };
        let f: GuestFile = serde_json::from_slice(&bytes)
            .map_err(|e| io::Error::other(format!("{}: {e}", path.display())))?;
        if f.version != GUEST_VERSION || f.guest != *g {
            return Err(io::Error::other(format!(
                "{} is for version {} and guest {}, expected {GUEST_VERSION} and {g}",
                path.display(),
                f.version,
                f.guest
            )));
        }
        Ok(Some(f))
    }

    /// Writes it durably.
    pub fn store(&self, paths: &Paths) -> io::Result<()> {
        durable::make_folder(&paths.state(&self.guest))?;
        let bytes = serde_json::to_vec_pretty(self)?;
        durable::replace(&paths.state(&self.guest).join("guest.json"), &bytes)
    }

    /// All that are protected here, and what could not be read.
    pub fn all(paths: &Paths) -> (Vec<GuestFile>, Vec<String>) {
        let (mut guests, mut faults) = (Vec::new(), Vec::new());
        let entries = match std::fs::read_dir(paths.state_dir.join("guests")) {
            Ok(e) => e,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return (guests, faults),
            Err(e) => return (guests, vec![format!("{}: {e}", paths.state_dir.display())]),
        };
        for e in entries.flatten().take(MAX_GUESTS) {
            let Ok(name) = e.file_name().to_string_lossy().parse::<GuestName>() else {
                continue;
            };
            match GuestFile::load(paths, &name) {
                Ok(Some(f)) => guests.push(f),
                Ok(None) => {}
                Err(e) => faults.push(e.to_string()),
            }
        }
        guests.sort_by(|a, b| a.guest.cmp(&b.guest));
        (guests, faults)
    }

    /// What is done for it: the config's entry, or the defaults for a guest without one.
    pub fn policy(&self, config: &Config) -> Guest {
        config.guest(&self.guest).cloned().unwrap_or_else(|| Guest {
            name: self.guest.clone(),
            home: self.home.clone(),
            policy: Policy::Ft,
            failback: config.failback,
            replication: config.replication,
        })
    }

    /// What its replicator is told.
    pub fn spec(
        &self,
        paths: &Paths,
        config: &Config,
        identity_dir: &Path,
        peer_fingerprint: &str,
        qemu: (u32, u32),
    ) -> Spec {
        let (run_dir, state_dir) = (paths.run(&self.guest), paths.state(&self.guest));
        let disks = self.disks.iter().enumerate().map(|(k, d)| DiskSpec {
            path: d.path.clone(),
            meta_path: state_dir.join(format!("disk{k}")),
            export: nbd_export(k),
            nbd_socket: nbd_socket(&run_dir, k),
            size_bytes: d.size_bytes,
        });
        let nics = self.nics.iter().map(|n| NicSpec {
            guest_tap: n.guest_tap.clone(),
            bridge_tap: n.bridge_tap.clone(),
            bridge: n.bridge.clone(),
            mac: n.mac.clone(),
        });
        Spec {
            version: SPEC_VERSION,
            guest: self.guest.clone(),
            identity_dir: identity_dir.to_owned(),
            peer_fingerprint: peer_fingerprint.to_owned(),
            links: config.peer.links.clone(),
            port_range: config.peer.replication_ports,
            disks: disks.collect(),
            nics: nics.collect(),
            qmp_socket: qmp_socket(&run_dir),
            qemu_uid: qemu.0,
            qemu_gid: qemu.1,
            machine: self.machine.clone(),
            settings: config.settings(&self.policy(config)),
            run_dir,
            state_dir,
        }
    }
}

/// Reads the definition kept for this node.
pub fn domain_xml(paths: &Paths, g: &GuestName) -> io::Result<Option<String>> {
    read_text(&paths.state(g).join("domain.xml"))
}
/// Writes it.
pub fn store_domain_xml(paths: &Paths, g: &GuestName, xml: &str) -> io::Result<()> {
    durable::make_folder(&paths.state(g))?;
    durable::replace(&paths.state(g).join("domain.xml"), xml.as_bytes())
}
/// Reads the definition from before protection.
pub fn original_xml(paths: &Paths, g: &GuestName) -> io::Result<Option<String>> {
    read_text(&paths.state(g).join("domain-original.xml"))
}
/// Writes it.
pub fn store_original_xml(paths: &Paths, g: &GuestName, xml: &str) -> io::Result<()> {
    durable::make_folder(&paths.state(g))?;
    durable::replace(&paths.state(g).join("domain-original.xml"), xml.as_bytes())
}

fn read_text(path: &Path) -> io::Result<Option<String>> {
    durable::read_bounded(path, MAX_FILE_BYTES)?
        .map(|b| {
            String::from_utf8(b)
                .map_err(|_| io::Error::other(format!("{} is not text", path.display())))
        })
        .transpose()
}

/// Takes back what protection left behind, but for the record (the engine's) and the run folder.
pub fn forget(paths: &Paths, g: &GuestName) -> io::Result<()> {
    let dir = paths.state(g);
    // guest.json first: from then on it is not protected, whatever else still lies there.
    for f in ["guest.json", "domain.xml", "domain-original.xml"] {
        durable::remove(&dir.join(f))?;
    }
    for k in 0..64 {
        let d = dir.join(format!("disk{k}"));
        match std::fs::metadata(&d) {
            Ok(m) if m.is_dir() => std::fs::remove_dir_all(&d)?,
            Ok(_) => std::fs::remove_file(&d)?,
            Err(_) => {}
        }
    }
    Ok(())
}

/// Makes the folders that a guest's processes need. QEMU's user may make its monitor's socket in
/// its own folder, and pass through ours; nobody else sees either.
pub fn make_run_folders(paths: &Paths, g: &GuestName, qemu: (u32, u32)) -> io::Result<()> {
    let mode = |p: &Path, m| std::fs::set_permissions(p, std::fs::Permissions::from_mode(m));
    let run = paths.run(g);
    std::fs::create_dir_all(&run)?;
    for p in [&paths.run_dir, &paths.run_dir.join("g"), &run] {
        mode(p, 0o711)?;
    }
    let own = qemu_dir(&run);
    std::fs::create_dir_all(&own)?;
    mode(&own, 0o700)?;
    std::os::unix::fs::chown(&own, Some(qemu.0), Some(qemu.1))
}

/// `life.json`: the life that the running QEMU of a guest stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifeFile {
    /// As ordered by the engine.
    pub life: LifeId,
    /// Started as a waiting QEMU of a standby.
    pub waiting: bool,
    /// QEMU.
    pub qemu: PidFile,
}

impl LifeFile {
    fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("life.json")
    }
    /// Reads it; a damaged one counts as none, for it then names no life.
    pub fn load(run_dir: &Path) -> Option<LifeFile> {
        let bytes = durable::read_bounded(&LifeFile::path(run_dir), 4096).ok()??;
        serde_json::from_slice(&bytes).ok()
    }
    /// Writes it, aside and renamed. It need not survive a boot.
    pub fn store(&self, run_dir: &Path) -> io::Result<()> {
        let tmp = run_dir.join("life.json.tmp");
        std::fs::write(&tmp, serde_json::to_vec(self)?)?;
        std::fs::rename(&tmp, LifeFile::path(run_dir))
    }
    /// Removes it.
    pub fn remove(run_dir: &Path) {
        let _ = std::fs::remove_file(LifeFile::path(run_dir));
    }
}
