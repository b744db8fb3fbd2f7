//! All disks of the guest: one barrier over all of them.

use anyhow::{Context, Result, bail};
use havm_core::ids::{EpochNo, GuestName, StreamId};
use havm_core::order::Counters;
use havm_core::spec::{DiskSpec, Spec};
use havm_disk::nbd::{NbdConfig, NbdServer};
use havm_disk::{Disk, DiskConfig, DiskError, EpochWrites, MetaError};
use std::sync::{Arc, Mutex, PoisonError};

/// The disks, cheap to clone.
#[derive(Clone)]
pub struct Disks {
    disks: Arc<Vec<Arc<Disk>>>,
    servers: Arc<Mutex<Vec<NbdServer>>>,
    exports: Arc<Vec<NbdConfig>>,
}

impl Disks {
    /// Opens the disks, and makes their metadata where there is none. Nothing is served yet.
    ///
    /// # Errors
    /// Names the disk and the remedy. A disk of another guest, of another size or of a newer havm is
    /// refused untouched; damaged metadata is made anew with every block marked.
    pub fn open(spec: &Spec) -> Result<(Disks, Vec<String>)> {
        let mut warnings = Vec::new();
        let mut disks = Vec::new();
        let mut exports = Vec::new();
        for (i, d) in spec.disks.iter().enumerate() {
            let name = || format!("disk {}", d.path.display());
            let disk = open_one(&spec.guest, i, d, &mut warnings).with_context(name)?;
            if disk.size() != d.size_bytes {
                bail!(
                    "{} has {} bytes here, {} on the peer: make them equal, then start again",
                    name(),
                    disk.size(),
                    d.size_bytes
                );
            }
            let mut export = NbdConfig::new(d.nbd_socket.clone(), d.export.clone());
            export.owner = Some((spec.qemu_uid, spec.qemu_gid));
            exports.push(export);
            disks.push(disk);
        }
        let disks = Disks {
            disks: Arc::new(disks),
            servers: Arc::default(),
            exports: Arc::new(exports),
        };
        Ok((disks, warnings))
    }

    /// Starts the NBD servers, once. A guest that outlived the last replicator reconnects at once and writes:
    /// so they start only when it is known what a write means.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn serve(&self) -> Result<()> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if !servers.is_empty() {
            return Ok(());
        }
        for (disk, export) in self.disks.iter().zip(self.exports.iter()) {
            let server = NbdServer::start(disk.clone(), export)
                .with_context(|| format!("serve {}", export.socket.display()))?;
            servers.push(server);
        }
        Ok(())
    }

    /// One of them.
    pub fn get(&self, i: u16) -> Option<&Arc<Disk>> {
        self.disks.get(usize::from(i))
    }

    /// All of them, in the guest's order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Disk>> {
        self.disks.iter()
    }

    /// Closes the open epoch of each.
    ///
    /// # Errors
    /// See [`Disk::barrier`].
    pub fn barrier(&self) -> havm_disk::Result<Vec<EpochWrites>> {
        self.disks.iter().map(|d| d.barrier()).collect()
    }

    /// From now on writes ride in the epochs of this stream.
    ///
    /// # Errors
    /// See [`Disk::begin_tracking`].
    pub fn begin_tracking(&self, stream: StreamId, first: EpochNo) -> havm_disk::Result<()> {
        self.disks
            .iter()
            .try_for_each(|d| d.begin_tracking(stream, first))
    }

    /// No stream any more: writes are marked for the peer.
    ///
    /// # Errors
    /// See [`Disk::end_tracking`].
    pub fn end_tracking(&self) -> havm_disk::Result<()> {
        self.disks.iter().try_for_each(|d| d.end_tracking())
    }

    /// The guest runs, or will, here.
    ///
    /// # Errors
    /// See [`Disk::go_solo`].
    pub fn go_solo(&self) -> havm_disk::Result<()> {
        let standby = |d: &&Arc<Disk>| d.mode() == havm_disk::Mode::Standby;
        self.disks
            .iter()
            .filter(standby)
            .try_for_each(|d| d.go_solo())
    }

    /// The guest runs elsewhere.
    ///
    /// # Errors
    /// See [`Disk::become_standby`].
    pub fn become_standby(&self) -> havm_disk::Result<()> {
        self.disks.iter().try_for_each(|d| d.become_standby())
    }

    /// The standby acked.
    pub fn acked(&self, n: EpochNo) {
        self.disks.iter().for_each(|d| d.acked(n));
    }

    /// The standby has it durable.
    pub fn peer_durable(&self, n: EpochNo) {
        self.disks.iter().for_each(|d| d.peer_durable(n));
    }

    /// Some disk holds too much for the standby.
    pub fn over_limit(&self) -> bool {
        self.disks.iter().any(|d| d.over_limit())
    }

    /// Bytes of all disks.
    pub fn total_bytes(&self) -> u64 {
        self.disks.iter().map(|d| d.size()).sum()
    }

    /// Adds what the disks counted.
    pub fn count(&self, c: &mut Counters) {
        for d in self.disks.iter() {
            let n = d.counters();
            c.disk_writes += n.writes;
            c.disk_write_bytes += n.write_bytes;
            c.disk_out_of_sync_bytes += d.out_of_sync_bytes();
        }
    }
}

fn open_one(
    guest: &GuestName,
    index: usize,
    spec: &DiskSpec,
    warnings: &mut Vec<String>,
) -> Result<Arc<Disk>> {
    std::fs::create_dir_all(&spec.meta_path)
        .with_context(|| format!("make {}", spec.meta_path.display()))?;
    let meta = spec.meta_path.join("disk.meta");
    let cfg = DiskConfig::new(spec.path.clone(), meta, disk_id(guest, index));
    match Disk::open(&cfg, None) {
        Ok(d) => Ok(d),
        Err(DiskError::Meta(MetaError::Missing(_))) => Ok(Disk::create(&cfg, true)?),
        Err(DiskError::Meta(e @ MetaError::Corrupt { .. })) => {
            warnings.push(format!("{e}: made anew, all blocks will be compared"));
            Ok(Disk::create(&cfg, true)?)
        }
        Err(e) => Err(e.into()),
    }
}

/// The same on both nodes: made from what both know.
fn disk_id(guest: &GuestName, index: usize) -> [u8; 16] {
    let hash = blake3::hash(format!("havm disk {index} of {guest}").as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hash.as_bytes()[..16]);
    id
}
