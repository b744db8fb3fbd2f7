//! Opening and making a disk, and its background flusher.

use super::Disk;
use crate::backing::Backing;
use crate::blocks::EXTENT_BYTES;
use crate::counters::Live;
use crate::error::{DiskError, MetaError, Result};
use crate::journal::replay::Files;
use crate::meta::{MetaFile, Opened, Superblock};
use crate::store::{FileStore, Store};
use crate::tracker::{Mode, Tracker};
use havm_core::ids::{EpochNo, StreamId};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the flusher shrinks the log and bitmap of a primary.
const TIDY_EVERY: Duration = Duration::from_secs(60);

/// What a disk is made of.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The raw file or block device.
    pub image: PathBuf,
    /// Its metadata file. The journal's two files stand beside it (`.journal0`, `.journal1`).
    pub meta: PathBuf,
    /// Names the guest's disk: the same on both sides, and in the metadata.
    pub disk_id: [u8; 16],
    /// Bytes of guest writes that may wait for the standby before [`Disk::over_limit`] says so;
    /// at four times that the stream is given up.
    pub limit_bytes: u64,
    /// Bytes of one of the two journal segments; both are reserved on disk.
    pub segment_bytes: u64,
    /// Extents of 1 MiB in the write-intent log of new metadata: what a crash makes us compare.
    pub log_extents: u32,
}

impl DiskConfig {
    /// The usual sizes: 256 MiB of waiting writes, segments of 64 MiB, 4096 log extents.
    pub fn new(image: PathBuf, meta: PathBuf, disk_id: [u8; 16]) -> Self {
        DiskConfig {
            image,
            meta,
            disk_id,
            limit_bytes: 256 << 20,
            segment_bytes: 64 << 20,
            log_extents: 4096,
        }
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut p = self.meta.clone().into_os_string();
        p.push(suffix);
        p.into()
    }
}

/// The stores of a disk; the crash tests bring their own.
#[derive(Debug, Clone)]
pub struct Stores {
    /// The guest's data.
    pub image: Arc<dyn Store>,
    /// The metadata.
    pub meta: Arc<dyn Store>,
    /// The journal's segments.
    pub journal: [Arc<dyn Store>; 2],
}

impl Disk {
    /// Opens a disk whose metadata exists, in mode [`Mode::Standby`]. `upto` is the commit index
    /// that outlived the last replicator, where there is one: epochs of that stream that were
    /// staged beyond it are not replayed.
    ///
    /// On [`DiskError::Meta`] the image is untouched: decide, then [`Disk::create`].
    pub fn open(cfg: &DiskConfig, upto: Option<(StreamId, EpochNo)>) -> Result<Arc<Self>> {
        let image: Arc<dyn Store> = Arc::new(FileStore::open_disk(&cfg.image)?);
        if !cfg.meta.exists() {
            return Err(MetaError::Missing(cfg.meta.clone()).into());
        }
        let stores = Self::stores(cfg, image, false)?;
        let disk = Arc::new(Self::open_stores(cfg, stores, upto)?);
        disk.start_flusher()?;
        Ok(disk)
    }

    /// Makes new metadata beside an existing image and opens the disk. `all_differ`: nothing is
    /// known of the peer's copy, so every block is marked (and will be compared).
    pub fn create(cfg: &DiskConfig, all_differ: bool) -> Result<Arc<Self>> {
        let image: Arc<dyn Store> = Arc::new(FileStore::open_disk(&cfg.image)?);
        let stores = Self::stores(cfg, image, true)?;
        let disk = Arc::new(Self::create_stores(cfg, stores, all_differ)?);
        disk.start_flusher()?;
        Ok(disk)
    }

    fn stores(cfg: &DiskConfig, image: Arc<dyn Store>, create: bool) -> Result<Stores> {
        let meta = FileStore::open_side(&cfg.meta, create)?;
        let segment = |suffix: &str| -> Result<Arc<dyn Store>> {
            let path = cfg.beside(suffix);
            if !create && !path.exists() {
                let what = format!("{} is missing", path.display());
                return Err(MetaError::journal(&cfg.meta, &what));
            }
            Ok(Arc::new(FileStore::open_side(&path, create)?))
        };
        let stores = Stores {
            image,
            meta: Arc::new(meta),
            journal: [segment(".journal0")?, segment(".journal1")?],
        };
        if create {
            // New names must outlive a power failure like what is in them.
            let dir = cfg.meta.parent().filter(|p| !p.as_os_str().is_empty());
            std::fs::File::open(dir.unwrap_or(std::path::Path::new(".")))
                .and_then(|d| d.sync_all())
                .map_err(DiskError::io("syncing the folder of the disk metadata"))?;
        }
        Ok(stores)
    }

    /// [`Disk::create`] on given stores, without a background flusher.
    pub fn create_stores(cfg: &DiskConfig, stores: Stores, all_differ: bool) -> Result<Self> {
        let size = stores
            .image
            .size()
            .map_err(DiskError::io("size of the disk"))?;
        for j in &stores.journal {
            // Whatever journal was here belonged to metadata that is given up.
            j.set_size(0)
                .map_err(DiskError::io("emptying the disk journal"))?;
            j.flush()
                .map_err(DiskError::io("emptying the disk journal"))?;
        }
        let sb = Superblock::new(cfg.disk_id, size, cfg.log_extents.clamp(4, 1 << 16));
        MetaFile::create(stores.meta.clone(), &cfg.meta, sb, all_differ)?;
        Self::assemble(cfg, stores, true, None)
    }

    /// [`Disk::open`] on given stores, without a background flusher: call [`Disk::work`].
    pub fn open_stores(
        cfg: &DiskConfig,
        stores: Stores,
        upto: Option<(StreamId, EpochNo)>,
    ) -> Result<Self> {
        Self::assemble(cfg, stores, false, upto)
    }

    fn assemble(
        cfg: &DiskConfig,
        stores: Stores,
        fresh: bool,
        upto: Option<(StreamId, EpochNo)>,
    ) -> Result<Self> {
        let size = stores
            .image
            .size()
            .map_err(DiskError::io("size of the disk"))?;
        let opened: Opened = MetaFile::open(stores.meta, &cfg.meta, cfg.disk_id, size)?;
        let counters = Arc::<Live>::default();
        let journal = Files {
            segments: stores.journal,
            meta: cfg.meta.clone(),
            disk_id: cfg.disk_id,
            segment_bytes: cfg.segment_bytes.max(1 << 16),
            fresh,
        };
        let (backing, replayed) =
            Backing::open(stores.image, size, journal, upto, counters.clone())?;
        let sb = opened.meta.superblock();
        let tracker = Tracker::new(
            opened,
            sb.log_extents as usize,
            cfg.limit_bytes,
            counters.clone(),
        );
        Ok(Disk {
            tracker,
            backing: Arc::new(backing),
            counters,
            size,
            pool: Arc::default(),
            zero_piece: EXTENT_BYTES * u64::from(sb.log_extents / 4).max(1),
            replayed,
            inconsistent: AtomicBool::new(sb.inconsistent),
            flusher: Mutex::new(None),
            stop: Arc::default(),
        })
    }

    fn start_flusher(self: &Arc<Self>) -> Result<()> {
        let (backing, stop, disk) = (
            self.backing.clone(),
            self.stop.clone(),
            Arc::downgrade(self),
        );
        let t = std::thread::Builder::new()
            .name("disk-flusher".into())
            .spawn(move || {
                let (mut flushed, mut tidied) = (Instant::now(), Instant::now());
                while !stop.load(SeqCst) {
                    let work = backing.wait_work(Duration::from_millis(200));
                    let mut done = if work {
                        backing.step(false).map(drop)
                    } else {
                        Ok(())
                    };
                    // A full sync must not turn into an fsync for every epoch.
                    if done.is_ok() && flushed.elapsed() > Duration::from_millis(500) {
                        done = backing.flush_direct().map(drop);
                        flushed = Instant::now();
                    }
                    if done.is_ok()
                        && tidied.elapsed() > TIDY_EVERY
                        && let Some(disk) = disk.upgrade()
                    {
                        if disk.mode() != Mode::Standby {
                            done = disk.tidy();
                        }
                        tidied = Instant::now();
                    }
                    if done.is_err() {
                        // Said already where it happened, and kept: nothing more can be promised.
                        backing.wake();
                        break;
                    }
                }
            })
            .map_err(DiskError::io("starting the disk's flusher"))?;
        *self.flusher.lock().unwrap_or_else(PoisonError::into_inner) = Some(t);
        Ok(())
    }

    /// One round of what the background flusher does; for disks opened without one.
    pub fn work(&self) -> Result<bool> {
        Ok(self.backing.step(false)? | self.backing.flush_direct()?)
    }

    pub(super) fn stop_flusher(&self) {
        self.stop.store(true, SeqCst);
        self.backing.wake();
        let t = self
            .flusher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(t) = t
            // The flusher itself may be the last to hold the disk; then it ends by itself.
            && t.thread().id() != std::thread::current().id()
            && t.join().is_err()
        {
            tracing::error!("the disk's flusher panicked");
        }
    }
}
