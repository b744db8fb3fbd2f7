//! Answers to the primary's questions, from the state at their place in the stream.

use super::commit::Committer;
use crate::primary::page_hash;
use anyhow::{Context, Result};
use havm_core::ids::EpochNo;
use havm_image::PAGE_BYTES;
use havm_wire::back::Back;
use havm_wire::frame::Frame;

/// A comparison under way.
pub(super) struct Verifying {
    id: u64,
    /// Pages and blocks at a time other than that of the last commit cannot be compared.
    error: Option<String>,
    ram: (u64, u64),
    disk: (u64, u64),
}

impl Verifying {
    fn new(id: u64) -> Verifying {
        Verifying {
            id,
            error: None,
            ram: (0, 0),
            disk: (0, 0),
        }
    }
}

impl Committer {
    pub(super) fn answer(&mut self, request: Frame) -> Result<()> {
        match request {
            Frame::PeerSetRequest { disk } => {
                let set = self.disks.get(disk).context("no such disk")?.out_of_sync();
                let encoded = set.encode().into();
                self.reply.send(Back::PeerSet {
                    disk,
                    more: false,
                    encoded,
                });
            }
            Frame::HashRange(r) => {
                let disk = self.disks.get(r.object).context("no such disk")?;
                let first = u32::try_from(r.first)?;
                let differing = disk.compare(first, &r.hashes)?;
                let differing = differing.iter().map(|b| b - first).collect();
                self.reply.send(Back::HashReply {
                    id: r.id,
                    differing,
                });
            }
            Frame::VerifyAt { id, n } => self.verify_at(id, n),
            Frame::VerifyRam(r) => {
                let (Some(v), Some(image)) = (&mut self.verify, &self.image) else {
                    return Ok(());
                };
                let mut page = [0; PAGE_BYTES];
                for (h, i) in r.hashes.iter().zip(r.first..) {
                    let there = image.read(r.object, u32::try_from(i)?, &mut page);
                    v.ram.1 += 1;
                    if !there || page_hash(&page) != *h {
                        v.ram.0 += 1;
                        if v.ram.0 <= 8 {
                            tracing::error!(
                                block = r.object,
                                page = i,
                                "a page differs from the primary's"
                            );
                        }
                    }
                }
            }
            Frame::VerifyDisk(r) => {
                let disk = self.disks.get(r.object).context("no such disk")?;
                let differing = disk.compare(u32::try_from(r.first)?, &r.hashes)?;
                if let Some(v) = &mut self.verify {
                    v.disk.1 += r.hashes.len() as u64;
                    v.disk.0 += differing.len() as u64;
                }
                for b in differing.iter().take(8) {
                    tracing::error!(
                        disk = r.object,
                        block = b,
                        "a disk block differs from the primary's"
                    );
                }
            }
            Frame::VerifyEnd { id } => {
                if let Some(v) = self.verify.take().filter(|v| v.id == id) {
                    self.reply.send(Back::Verified {
                        id,
                        ram_different: v.ram.0,
                        ram_pages: v.ram.1,
                        disk_different: v.disk.0,
                        disk_blocks: v.disk.1,
                        error: v.error,
                    });
                }
            }
            other => tracing::warn!(?other, "not a question"),
        }
        Ok(())
    }

    fn verify_at(&mut self, id: u64, n: EpochNo) {
        let committed = self.shared.lock().committed;
        let v = match &mut self.verify {
            Some(v) if v.id == id => v,
            other => other.insert(Verifying::new(id)),
        };
        if committed != n {
            v.error = Some(format!(
                "asked at epoch {n}, but {committed} is the last committed"
            ));
        }
    }
}
