//! What one daemon of a pair may ask of the other beside the guests' messages: to prepare, install
//! and remove a guest, and to pass an operator's wish on. JSON over the daemons' connection.

use super::shared::Shared;
use crate::control::Op;
use crate::guests::{self, GuestFile};
use crate::libvirt::transform::relocate;
use crate::libvirt::tree::Element;
use havm_config::Agreement;
use havm_core::event::Operator;
use havm_core::ids::GuestName;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The largest file whose content both nodes compare (a kernel or initrd).
const MAX_COMPARED_BYTES: u64 = 1024 * 1024 * 1024;

/// A file that both nodes must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SameFile {
    /// Where.
    pub path: PathBuf,
    /// BLAKE3 of its content.
    pub hash: String,
}

/// A question to the peer's daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum Ask {
    /// What is the same in both configs?
    Agreement,
    /// Could this guest have its standby here? Answered by a list of obstacles.
    Prepare {
        /// The guest and its parts.
        file: GuestFile,
        /// Files that must be there, equal.
        same: Vec<SameFile>,
    },
    /// Make it so, and begin as its standby.
    Install {
        /// The guest and its parts.
        file: GuestFile,
        /// The whole definition.
        domain_xml: String,
        /// What `unprotect` puts back.
        original_xml: String,
    },
    /// It is protected no more: forget it, remove the definition. The disk stays.
    Remove {
        /// Which.
        guest: GuestName,
    },
    /// For the guest's engine at the peer, because it is its primary.
    Operate {
        /// Which.
        guest: GuestName,
        /// What.
        op: Op,
    },
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Told {
    /// The peer's part of the agreement.
    Agreement {
        /// It.
        agreement: Agreement,
    },
    /// What stands in the way; empty where nothing does.
    Obstacles {
        /// Each with its remedy.
        list: Vec<String>,
    },
    /// Done.
    Done,
    /// Not done.
    Failed {
        /// Why.
        why: String,
    },
}

/// The engine's word for an operator's.
pub fn operator(op: Op) -> Operator {
    match op {
        Op::Switchover => Operator::Switchover,
        Op::Failback => Operator::Failback,
        Op::Start => Operator::Start,
        Op::Stop => Operator::Stop,
        Op::ForcePromote => Operator::ForcePromote,
        Op::DiscardMine => Operator::DiscardMine,
    }
}

impl Shared {
    /// Answers the peer's question.
    pub async fn answer(&self, ask: Ask) -> Told {
        let done = match ask {
            Ask::Agreement => {
                return Told::Agreement {
                    agreement: self.config.agreement(),
                };
            }
            Ask::Prepare { file, same } => {
                return Told::Obstacles {
                    list: self.obstacles(&file, &same).await,
                };
            }
            Ask::Install {
                file,
                domain_xml,
                original_xml,
            } => self.install(file, &domain_xml, &original_xml).await,
            Ask::Remove { guest } => self.remove(&guest).await,
            // Force and discard are for the node that the operator stands at.
            Ask::Operate {
                op: Op::ForcePromote | Op::DiscardMine,
                ..
            } => Err("this must be asked of the node itself".into()),
            Ask::Operate { guest, op } => self.operate(&guest, operator(op)).await,
        };
        match done {
            Ok(()) => Told::Done,
            Err(why) => Told::Failed { why },
        }
    }

    async fn obstacles(&self, file: &GuestFile, same: &[SameFile]) -> Vec<String> {
        let here = &self.config.node.name;
        let mut out = Vec::new();
        if self.guest_status(&file.guest).await.is_some() {
            out.push(format!(
                "{here} protects guest {} already: `havm unprotect` it there",
                file.guest
            ));
        }
        match self.libvirt.host().await {
            Ok(host) if !host.knows_machine(&file.machine) => out.push(format!(
                "{here}'s QEMU has no machine type {}: name an older one in the guest's definition, or upgrade {here}",
                file.machine
            )),
            Ok(_) => {}
            Err(e) => out.push(format!("{here}: {e}")),
        }
        match self.libvirt.inactive_xml(file.guest.as_str()).await {
            Ok(_) => out.push(format!(
                "{here}'s libvirt has a domain {} already: if it is not needed, `virsh undefine {}` there",
                file.guest, file.guest
            )),
            Err(e) if e.no_domain() => {}
            Err(e) => out.push(format!("{here}: {e}")),
        }
        for n in &file.nics {
            if !Path::new("/sys/class/net")
                .join(&n.bridge)
                .join("bridge")
                .exists()
            {
                out.push(format!(
                    "{here} has no bridge {}: make one, in the same network",
                    n.bridge
                ));
            }
        }
        for d in &file.disks {
            if let Err(why) = room_for(d) {
                out.push(format!("{here}: {why}"));
            }
        }
        for s in same {
            let path = s.path.clone();
            let found = tokio::task::spawn_blocking(move || hash_of(&path)).await;
            match found {
                Ok(Ok(h)) if h == s.hash => {}
                Ok(Ok(_)) => out.push(format!(
                    "{here}'s {} differs: copy it from the other node",
                    s.path.display()
                )),
                Ok(Err(e)) => out.push(format!(
                    "{here} lacks {} ({e}): copy it from the other node",
                    s.path.display()
                )),
                Err(e) => out.push(e.to_string()),
            }
        }
        out
    }

    async fn install(&self, file: GuestFile, xml: &str, original: &str) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let guest = file.guest.clone();
        if self.guest_status(&guest).await.is_some() {
            return Err(format!("{} protects it already", self.config.node.name));
        }
        for d in &file.disks {
            make_disk(&d.path, d.size_bytes).map_err(|e| {
                format!(
                    "cannot make {} on {}: {e}",
                    d.path.display(),
                    self.config.node.name
                )
            })?;
        }
        let tree = Element::parse(xml).map_err(|e| text(&e))?;
        let here = relocate(&tree, &self.paths.run(&guest)).to_xml();
        self.libvirt
            .define(here.clone())
            .await
            .map_err(|e| text(&e))?;
        guests::store_original_xml(&self.paths, &guest, original).map_err(|e| text(&e))?;
        guests::store_domain_xml(&self.paths, &guest, &here).map_err(|e| text(&e))?;
        file.store(&self.paths).map_err(|e| text(&e))?;
        self.take_in(&guest, Some(Operator::InitStandby)).await
    }

    async fn remove(&self, guest: &GuestName) -> Result<(), String> {
        match self.operate(guest, Operator::Unprotect).await {
            Err(e) if self.guest_status(guest).await.is_some() => return Err(e),
            _ => {}
        }
        // The loop forgets the guest when its record is gone.
        for _ in 0..100 {
            if self.guest_status(guest).await.is_none() {
                return self
                    .libvirt
                    .undefine(guest.as_str())
                    .await
                    .map_err(|e| e.to_string());
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        Err(format!(
            "{} could not give the guest up in time",
            self.config.node.name
        ))
    }
}

/// Whether a disk of that size can be here: an equal one is there, or there is room for it.
fn room_for(d: &guests::GuestDisk) -> Result<(), String> {
    let shown = d.path.display();
    match size_of(&d.path) {
        Ok(n) if n == d.size_bytes => Ok(()),
        Ok(n) => Err(format!(
            "{shown} is there with {n} bytes, {} are needed: move it away, or make it that size",
            d.size_bytes
        )),
        Err(e) if e.kind() == io::ErrorKind::NotFound && !d.block => {
            let folder = d.path.parent().unwrap_or(Path::new("/"));
            let s = nix::sys::statvfs::statvfs(folder)
                .map_err(|e| format!("{}: {e}: make the folder", folder.display()))?;
            let free = s.blocks_available().saturating_mul(s.fragment_size());
            if free < d.size_bytes {
                return Err(format!(
                    "{} has {free} bytes free, {} may be needed for {shown}",
                    folder.display(),
                    d.size_bytes
                ));
            }
            Ok(())
        }
        Err(e) => Err(format!("{shown}: {e}")),
    }
}

/// The size of a file or block device.
pub fn size_of(path: &Path) -> io::Result<u64> {
    use std::io::Seek;
    let mut f = std::fs::File::open(path)?;
    let kind = f.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("neither a file nor a block device"));
    }
    f.seek(io::SeekFrom::End(0))
}

fn make_disk(path: &Path, size: u64) -> io::Result<()> {
    match std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
    {
        Ok(f) => {
            f.set_len(size)?;
            f.sync_all()
        }
        // Its content does not matter: the first sync makes it equal.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => match size_of(path)? {
            n if n == size => Ok(()),
            n => Err(io::Error::other(format!(
                "it is there with {n} bytes, not {size}"
            ))),
        },
        Err(e) => Err(e),
    }
}

/// BLAKE3 of a file's content.
pub fn hash_of(path: &Path) -> io::Result<String> {
    let f = std::fs::File::open(path)?;
    let len = f.metadata()?.len();
    if len > MAX_COMPARED_BYTES {
        return Err(io::Error::other("too large to compare"));
    }
    let (mut hasher, mut at, mut buf) = (blake3::Hasher::new(), 0, vec![0u8; 1 << 20]);
    loop {
        match f.read_at(&mut buf, at)? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            n => {
                hasher.update(&buf[..n]);
                at += n as u64;
            }
        }
    }
}
