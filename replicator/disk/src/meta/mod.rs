//! The metadata file beside a disk.
//!
//! ```text
//! 0        superblock, copy A (4 KiB)      superblock.rs
//! 4096     superblock, copy B
//! 8192     write-intent log, area 0        log.rs: the active extents, written whole
//! +L       write-intent log, area 1        (even transactions in 0, odd ones in 1)
//! +2L      bitmap pages (4 KiB each)       bitmap.rs: 64 KiB blocks that may differ
//! ```
//!
//! What may differ from the peer after a crash is: the bitmap's blocks, and every block of every
//! extent in the newest whole log transaction. Both are supersets at every instant, because
//! (1) an extent is durable in the log before its first write starts, and (2) it leaves the log
//! only after its blocks are durable in the bitmap, or are known to be equal on both disks.
//!
//! Crash stories:
//! - superblock half written: the other copy is whole and at most one change old; changes that
//!   matter for safety (`inconsistent`) are awaited before what they announce.
//! - log transaction half written: its sectors carry two sequence numbers, both intact; the other
//!   area is used, and no write that waited for the torn transaction has started.
//! - a bitmap page half written or rotten: all its blocks count as possibly different.
//! - a log sector or both superblocks rotten: [`MetaError::Corrupt`], full compare.

pub mod bitmap;
pub mod log;
pub mod superblock;

use crate::blocks::{BLOCKS_PER_EXTENT, BlockSet};
use crate::error::{DiskError, MetaError, Result};
use crate::store::Store;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
pub use superblock::Superblock;

const LOG_AT: u64 = 2 * superblock::BYTES as u64;

/// The metadata file, open.
#[derive(Debug)]
pub struct MetaFile {
    store: Arc<dyn Store>,
    path: PathBuf,
    sb: Mutex<Superblock>,
}

/// What metadata said when it was opened.
#[derive(Debug)]
pub struct Opened {
    /// The metadata, for further use.
    pub meta: MetaFile,
    /// The number of the newest log transaction.
    pub log_seq: u64,
    /// The extents that were active.
    pub extents: Vec<u32>,
    /// The blocks that may differ: bitmap and log together.
    pub may_differ: BlockSet,
}

impl MetaFile {
    /// Writes fresh metadata in which every block may differ (`all_differ`) or none.
    pub fn create(
        store: Arc<dyn Store>,
        path: &Path,
        sb: Superblock,
        all_differ: bool,
    ) -> Result<Self> {
        let me = MetaFile {
            store,
            path: path.to_owned(),
            sb: Mutex::new(sb),
        };
        let sb = me.superblock();
        let set = if all_differ {
            BlockSet::full(sb.blocks())
        } else {
            BlockSet::new(sb.blocks())
        };
        // The old superblocks go first: a crash in here must not leave them over a new layout.
        me.write(0, &[0; LOG_AT as usize])?;
        me.flush()?;
        me.io(me
            .store
            .set_size(me.bitmap_at(&sb) + bitmap::area_bytes(sb.blocks())))?;
        for area in [1u64, 0] {
            me.write(me.log_at(&sb, area), &log::encode(area, &[]))?;
        }
        me.write_bitmap_pages(&set, &(0..bitmap::pages(sb.blocks())).collect::<Vec<_>>())?;
        me.flush()?;
        me.update_superblock(|_| ())?;
        Ok(me)
    }

    /// Reads and checks existing metadata.
    pub fn open(
        store: Arc<dyn Store>,
        path: &Path,
        disk_id: [u8; 16],
        size: u64,
    ) -> Result<Opened> {
        let corrupt = |what: &str| MetaError::Corrupt {
            path: path.to_owned(),
            what: what.into(),
        };
        let len = store
            .size()
            .map_err(DiskError::io(format!("size of {}", path.display())))?;
        if len == 0 {
            return Err(MetaError::Missing(path.to_owned()).into());
        }
        if len < LOG_AT {
            return Err(corrupt("it is too short").into());
        }
        let mut raw = [0u8; LOG_AT as usize];
        store
            .read_at(0, &mut raw)
            .map_err(DiskError::io(format!("reading {}", path.display())))?;
        let sb = superblock::choose(&raw, path)?;
        if sb.disk_id != disk_id {
            return Err(MetaError::Foreign {
                path: path.to_owned(),
                found: hex(&sb.disk_id),
                expected: hex(&disk_id),
            }
            .into());
        }
        if sb.size != size {
            return Err(MetaError::SizeChanged {
                path: path.to_owned(),
                found: size,
                recorded: sb.size,
            }
            .into());
        }
        let me = MetaFile {
            store,
            path: path.to_owned(),
            sb: Mutex::new(sb.clone()),
        };
        if len < me.bitmap_at(&sb) + bitmap::area_bytes(sb.blocks()) {
            return Err(corrupt("it is too short").into());
        }
        let (log_seq, extents) = me.read_log(&sb).map_err(|what| corrupt(&what))?;
        let mut may_differ = BlockSet::new(sb.blocks());
        let mut page = vec![0u8; bitmap::PAGE];
        for i in 0..bitmap::pages(sb.blocks()) {
            me.io(me.store.read_at(
                me.bitmap_at(&sb) + u64::from(i) * bitmap::PAGE as u64,
                &mut page,
            ))?;
            if !bitmap::decode_into(&mut may_differ, i, &page) {
                tracing::warn!(path = %path.display(), page = i, "bitmap page damaged: its blocks will be compared");
            }
        }
        for e in &extents {
            let first = e.saturating_mul(BLOCKS_PER_EXTENT as u32);
            may_differ.insert_span(first, first.saturating_add(BLOCKS_PER_EXTENT as u32 - 1));
        }
        Ok(Opened {
            meta: me,
            log_seq,
            extents,
            may_differ,
        })
    }

    fn read_log(&self, sb: &Superblock) -> std::result::Result<(u64, Vec<u32>), String> {
        let mut best: Option<(u64, Vec<u32>)> = None;
        let mut raw = vec![0u8; log::area_bytes(sb.log_extents) as usize];
        for area in 0..2 {
            self.store
                .read_at(self.log_at(sb, area), &mut raw)
                .map_err(|e| format!("write-intent log: {e}"))?;
            match log::decode(&raw) {
                log::Area::Whole(seq, ext) if best.as_ref().is_none_or(|b| b.0 < seq) => {
                    best = Some((seq, ext));
                }
                log::Area::Whole(..) | log::Area::Torn => (),
                log::Area::Rotten => return Err("a sector of the write-intent log".into()),
            }
        }
        best.ok_or_else(|| "both areas of the write-intent log".into())
    }

    /// The superblock as it is.
    pub fn superblock(&self) -> Superblock {
        self.lock().clone()
    }

    /// Changes the superblock, durably in both copies, one after the other.
    pub fn update_superblock(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let mut sb = self.lock();
        let mut new = sb.clone();
        change(&mut new);
        new.seq += 1;
        let raw = new.encode();
        // The copy that this sequence number would have hit anyway goes first, so that the newest
        // whole one is never the one being overwritten.
        let first = new.seq % 2;
        for copy in [first, 1 - first] {
            self.write(copy * superblock::BYTES as u64, &raw)?;
            self.flush()?;
        }
        *sb = new;
        Ok(())
    }

    /// Writes one log transaction and makes it durable.
    pub(crate) fn write_log(&self, seq: u64, extents: &[u32]) -> Result<()> {
        let at = self.log_at(&self.superblock(), seq % 2);
        self.write(at, &log::encode(seq, extents))?;
        self.flush()
    }

    /// Writes the given bitmap pages from `set`; not yet durable.
    pub(crate) fn write_bitmap_pages(&self, set: &BlockSet, pages: &[u32]) -> Result<()> {
        let at = self.bitmap_at(&self.superblock());
        for p in pages {
            self.write(
                at + u64::from(*p) * bitmap::PAGE as u64,
                &bitmap::encode(set, *p),
            )?;
        }
        Ok(())
    }

    pub(crate) fn write_encoded_pages(&self, pages: &[(u32, Vec<u8>)]) -> Result<()> {
        let at = self.bitmap_at(&self.superblock());
        for (p, raw) in pages {
            self.write(at + u64::from(*p) * bitmap::PAGE as u64, raw)?;
        }
        self.flush()
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&self) -> Result<()> {
        self.io(self.store.flush())
    }

    fn write(&self, at: u64, raw: &[u8]) -> Result<()> {
        self.io(self.store.write_at(at, raw))
    }

    fn io(&self, r: std::io::Result<()>) -> Result<()> {
        r.map_err(DiskError::io(format!(
            "disk metadata {}",
            self.path.display()
        )))
    }

    fn log_at(&self, sb: &Superblock, area: u64) -> u64 {
        LOG_AT + area * log::area_bytes(sb.log_extents)
    }

    fn bitmap_at(&self, sb: &Superblock) -> u64 {
        LOG_AT + 2 * log::area_bytes(sb.log_extents)
    }

    fn lock(&self) -> MutexGuard<'_, Superblock> {
        self.sb.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|b| format!("{b:02x}")).collect()
}
