//! The committer: writes what is staged into image and disk, in stream order, behind the acks.
//!
//! An error here means that an epoch which may have been acked cannot be kept: the copy's life has ended,
//! and with it this process (decision 0001). The daemon sees it go and starts over.

use super::shared::{Shared, Work};
use super::{Events, Reply, StandbyEvent};
use crate::disks::Disks;
use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use havm_core::ids::{EpochId, EpochNo};
use havm_core::order::StreamBase;
use havm_disk::{BlockData, DiskWrite, Durability, EpochWrites, WriteOp};
use havm_image::{BlockInfo, RamImage};
use havm_wire::assemble::CompleteEpoch;
use havm_wire::back::Back;
use havm_wire::frame::{DiskSync, Frame, StreamStart, WriteKind};
use havm_wire::page;
use std::sync::Arc;
use std::time::Duration;

/// How often durability is looked at when nothing else happens.
const IDLE: Duration = Duration::from_millis(50);

/// What is handed back when the thread ends: for a promotion.
pub(super) struct Held {
    pub image: Option<RamImage>,
    pub device_state: Vec<u8>,
}

/// The thread's state.
pub(super) struct Committer {
    pub shared: Arc<Shared>,
    pub image: Option<RamImage>,
    pub disks: Disks,
    pub reply: Reply,
    pub events: Events,
    pub stream: Option<EpochId>,
    pub device_state: Vec<u8>,
    pub durable: EpochNo,
    pub touched: bool,
    pub verify: Option<super::answer::Verifying>,
}

impl Committer {
    /// Runs until the copy ends.
    pub(super) fn run(mut self) -> Held {
        loop {
            match self.shared.pop(IDLE) {
                Some(work) => {
                    if let Err(e) = self.work(work) {
                        let why = format!("{e:#}");
                        self.shared.lock().end = true;
                        self.shared.notify();
                        self.events.tell(StandbyEvent::Spoilt(why));
                    }
                }
                None if self.shared.lock().end => break,
                None => {}
            }
            self.tell_durable();
        }
        Held {
            image: self.image,
            device_state: self.device_state,
        }
    }

    fn work(&mut self, work: Work) -> Result<()> {
        match work {
            Work::Begin(start) => self.begin(&start),
            Work::Direct(Frame::Pages { block, entries }) => {
                self.touched = true;
                let image = image(&mut self.image)?;
                for e in page::entries(&entries) {
                    apply(image, block, &e?)?;
                }
                Ok(())
            }
            Work::Direct(Frame::DiskSync(s)) => self.sync_block(&s),
            Work::Direct(other) => bail!("{other:?} is not bulk content"),
            Work::Commit(e, _) => self.commit(&e),
            Work::Request(r) => self.answer(r),
            Work::Rehome(fresh) => {
                match &mut self.image {
                    Some(i) => {
                        i.rehome(fresh)?;
                    }
                    None => self.image = Some(fresh),
                }
                self.events.tell(StandbyEvent::Ready);
                Ok(())
            }
        }
    }

    fn begin(&mut self, start: &StreamStart) -> Result<()> {
        let blocks: Vec<BlockInfo> = start
            .blocks
            .iter()
            .map(|b| BlockInfo {
                name: b.name.clone(),
                len: b.len,
                guest_addr: b.guest_addr,
                shared: b.shared,
            })
            .collect();
        let image = image(&mut self.image)?;
        image.check_equal(&blocks)?;
        if start.disks.len() != self.disks.iter().count() {
            bail!(
                "the primary has {} disks, this copy another number",
                start.disks.len()
            );
        }
        for (theirs, mine) in start.disks.iter().zip(self.disks.iter()) {
            if theirs.size != mine.size() {
                bail!(
                    "a disk has {} bytes here, {} at the primary",
                    mine.size(),
                    theirs.size
                );
            }
        }
        if start.base == StreamBase::Unknown && self.touched {
            image.clear()?;
        }
        for d in self.disks.iter() {
            d.begin_receiving(start.stream, EpochNo(0))?;
        }
        self.durable = EpochNo(0);
        self.stream = Some(EpochId {
            term: start.term,
            stream: start.stream,
            n: EpochNo(0),
        });
        Ok(())
    }

    fn sync_block(&self, s: &DiskSync) -> Result<()> {
        let disk = self.disks.get(s.disk).context("no such disk")?;
        let block = u32::try_from(s.block)?;
        let data = match &s.data {
            None => BlockData::Zero,
            Some(p) => BlockData::Data(Bytes::from(p.unpack()?.into_owned())),
        };
        Ok(disk.apply_sync(block, &data)?)
    }

    fn commit(&mut self, e: &CompleteEpoch) -> Result<()> {
        let n = e.id().n;
        for s in e.disk_syncs() {
            self.sync_block(s)?;
        }
        self.commit_disks(e)
            .with_context(|| format!("disks of epoch {n}"))?;
        let image = image(&mut self.image)?;
        for p in e.pages() {
            let (block, entry) = p?;
            apply(image, block, &entry)?;
        }
        if let Some(d) = e.device_state() {
            self.device_state = d.unpack()?.into_owned();
        }
        let first = {
            let mut p = self.shared.lock();
            p.committed = n;
            p.guest_shut_down |= e.shutdown();
            e.eligible() && !p.confirmed && !p.image_reported
        };
        if first {
            for d in self.disks.iter() {
                d.mark_consistent()?;
                // The primary had flushed what it had before this stream (it reports `Synced` only
                // then), and all of it is durable here now.
                d.forget_differences()?;
            }
            self.shared.lock().image_reported = true;
            self.events.tell(StandbyEvent::EligibleImage(e.id()));
        }
        let late = !e.eligible() || self.shared.ack_after_commit;
        if late {
            self.reply.ack(&self.shared, e.id(), e.eligible());
        }
        if e.shutdown() {
            self.events.tell(StandbyEvent::GuestShutdown);
        }
        Ok(())
    }

    fn commit_disks(&self, e: &CompleteEpoch) -> Result<()> {
        let mut writes: Vec<Vec<DiskWrite>> = self.disks.iter().map(|_| Vec::new()).collect();
        for w in e.disk_writes() {
            let op = match &w.kind {
                WriteKind::Data(p) => WriteOp::Data(Bytes::from(p.unpack()?.into_owned())),
                WriteKind::Zero { len, .. } | WriteKind::Trim { len } => {
                    WriteOp::Zero(u64::from(*len))
                }
            };
            let list = writes
                .get_mut(usize::from(w.disk))
                .context("no such disk")?;
            list.push(DiskWrite {
                offset: w.offset,
                op,
            });
        }
        let durability = if self.shared.ack_after_commit {
            Durability::Disk
        } else {
            Durability::Memory
        };
        for (d, list) in self.disks.iter().zip(writes) {
            let epoch = Arc::new(EpochWrites::new(e.id().n, list));
            if e.eligible() {
                d.commit_epochs(&[epoch], durability)?;
            } else {
                d.commit_direct(&epoch)?;
            }
        }
        Ok(())
    }

    fn tell_durable(&mut self) {
        let Some(stream) = self.stream else { return };
        let Some(n) = self.disks.iter().map(|d| d.durable_upto()).min() else {
            return;
        };
        if n > self.durable && !self.shared.lock().sealed {
            self.durable = n;
            self.reply.send(Back::Durable {
                epoch: EpochId { n, ..stream },
            });
        }
    }
}

fn image(i: &mut Option<RamImage>) -> Result<&mut RamImage> {
    i.as_mut()
        .ok_or_else(|| anyhow!("the waiting QEMU is not attached yet"))
}

fn apply(image: &mut RamImage, block: u16, entry: &page::Entry<'_>) -> Result<()> {
    let index = u32::try_from(entry.index)?;
    let page = image
        .page_mut(block, index)
        .with_context(|| format!("page {index} of block {block} lies outside the image"))?;
    Ok(entry.apply(page)?)
}
