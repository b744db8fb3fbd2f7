//! What a resync has to bring over at least: the disk blocks that differ when the dead host comes back.
//!
//! Seen from outside, while the demo plays: at the moment that it tells that the host is plugged in again
//! both hosts' disk files are compared. The dead one's stands still since the power went; what the guest
//! writes in the few milliseconds afterwards is not counted, which makes the figure a little worse.

use anyhow::{Context, Result};
use havm_lab::{Host, Lab, Options};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The demo's lab, and its words when the host is about to come back.
const LAB: &str = "havm-demo";
const PLUGGED_IN: &str = "is plugged in again";
/// Where the guest's disk is on a host.
const DISK: &str = "lib-libvirt/images/web.raw";
/// The guest's sector for this: what it writes at once.
const BLOCK: usize = 4096;
/// Compared at once.
const CHUNK: usize = 1 << 20;

/// Follows one demo.
#[derive(Debug, Default)]
pub struct Watch {
    seen: bool,
    /// Bytes of the blocks that differed; none if the moment was not seen.
    pub differing_bytes: Option<u64>,
}

impl Watch {
    /// Looks at what the demo has told so far.
    ///
    /// # Errors
    /// The disks cannot be read.
    pub fn look(&mut self, log: &Path) -> Result<()> {
        if self.seen {
            return Ok(());
        }
        let told = std::fs::read_to_string(log).unwrap_or_default();
        if told.contains(PLUGGED_IN) {
            self.seen = true;
            self.differing_bytes = Some(differing_bytes()?);
        }
        Ok(())
    }
}

fn differing_bytes() -> Result<u64> {
    let lab = Lab::open(&Options::named(LAB)?)?;
    let open = |host| {
        let path = lab.files(host).path(DISK);
        File::open(&path).with_context(|| format!("open {}", path.display()))
    };
    differing(open(Host::Alpha)?, open(Host::Beta)?).context("compare both disks")
}

/// Bytes in the blocks that differ; what only one of both has differs.
fn differing(mut a: impl Read, mut b: impl Read) -> std::io::Result<u64> {
    let (mut left, mut right) = (Vec::with_capacity(CHUNK), Vec::with_capacity(CHUNK));
    let mut bytes = 0;
    loop {
        left.clear();
        right.clear();
        a.by_ref().take(CHUNK as u64).read_to_end(&mut left)?;
        b.by_ref().take(CHUNK as u64).read_to_end(&mut right)?;
        if left.is_empty() && right.is_empty() {
            return Ok(bytes);
        }
        let block = |v: &[u8], i: usize| v.get(i..v.len().min(i + BLOCK)).map(<[u8]>::to_vec);
        for i in (0..left.len().max(right.len())).step_by(BLOCK) {
            if block(&left, i) != block(&right, i) {
                bytes += BLOCK as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differing_blocks_are_counted_whole() {
        let a = vec![1u8; 3 * CHUNK];
        let mut b = a.clone();
        assert_eq!(differing(&a[..], &b[..]).unwrap(), 0);
        b[5] = 2;
        b[6] = 2;
        b[2 * CHUNK + BLOCK] = 2;
        assert_eq!(differing(&a[..], &b[..]).unwrap(), 2 * BLOCK as u64);
        // A longer disk differs in what the other has not.
        b.extend([0; BLOCK]);
        assert_eq!(differing(&a[..], &b[..]).unwrap(), 3 * BLOCK as u64);
    }
}
