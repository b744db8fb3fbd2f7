//! Copies guest pages into the arena: memcpy from our mapping of the RAM file, or
//! `process_vm_readv` for blocks that no file backs.

use crate::pool::{Latecomer, Pool, Tickets};
use std::io;

/// Bytes that one worker takes at a time.
const BATCH_BYTES: usize = 512 * 1024;
/// Below this, waking a helper costs more than it copies.
const PARALLEL_BYTES: usize = 512 * 1024;
/// Ranges in one `process_vm_readv` (UIO_MAXIOV is 1024).
const IOVECS: usize = 512;

/// Copies to be made. Addresses as numbers: the source lies in our own mapping of the RAM file, or in
/// QEMU; the destination in the arena.
#[derive(Default)]
pub(crate) struct Copies {
    mapped: Vec<(usize, usize, usize)>,
    remote: Vec<(u64, usize, usize)>,
    /// Ends of batches in `mapped`.
    batches: Vec<usize>,
    batch_bytes: usize,
    bytes: usize,
}

impl Copies {
    pub(crate) fn clear(&mut self) {
        self.mapped.clear();
        self.remote.clear();
        self.batches.clear();
        self.batch_bytes = 0;
        self.bytes = 0;
    }

    /// Makes room for the plans of so many pages, before a pause.
    pub(crate) fn reserve(&mut self, pages: usize) {
        self.clear();
        self.mapped.reserve(pages);
    }

    /// Plans a copy from our mapping.
    pub(crate) fn mapped(&mut self, from: *const u8, to: *mut u8, len: usize) {
        self.mapped.push((from as usize, to as usize, len));
        self.bytes += len;
        self.batch_bytes += len;
        if self.batch_bytes >= BATCH_BYTES {
            self.batches.push(self.mapped.len());
            self.batch_bytes = 0;
        }
    }

    /// Plans a copy from QEMU's address `from`.
    pub(crate) fn remote(&mut self, from: u64, to: *mut u8, len: usize) {
        self.remote.push((from, to as usize, len));
    }

    /// Makes all planned copies.
    ///
    /// # Safety
    /// Every planned source in our mappings must be mapped, and every destination be room of the planned
    /// length, no two overlapping, that nobody else reads or writes meanwhile.
    pub(crate) unsafe fn run(
        &mut self,
        pid: u32,
        pool: &Pool,
        workers: usize,
        late: &Latecomer<'_>,
    ) -> io::Result<()> {
        if self.batch_bytes > 0 {
            self.batches.push(self.mapped.len());
            self.batch_bytes = 0;
        }
        let tickets = Tickets::new(self.batches.len());
        let workers = if self.bytes >= PARALLEL_BYTES {
            workers
        } else {
            1
        };
        let this = &*self;
        pool.run(workers, &|n| {
            late.hold(n, workers);
            while let Some(i) = tickets.take() {
                let first = if i == 0 { 0 } else { this.batches[i - 1] };
                for (from, to, len) in &this.mapped[first..this.batches[i]] {
                    // SAFETY: by this function's contract. The guest may write to the source
                    // meanwhile: the bytes copied are then any mix, and the page counts as written
                    // again, because it was protected before.
                    unsafe {
                        std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *len);
                    }
                }
            }
            late.release(n);
        });
        for batch in self.remote.chunks(IOVECS) {
            // SAFETY: by this function's contract.
            unsafe { read_remote(pid, batch) }?;
        }
        Ok(())
    }
}

/// # Safety
/// The destinations must be room of the given lengths.
unsafe fn read_remote(pid: u32, batch: &[(u64, usize, usize)]) -> io::Result<()> {
    let iovec = |base: usize, len| libc::iovec {
        iov_base: base as *mut libc::c_void,
        iov_len: len,
    };
    let mut local = [iovec(0, 0); IOVECS];
    let mut remote = [iovec(0, 0); IOVECS];
    for (i, (from, to, len)) in batch.iter().enumerate() {
        local[i] = iovec(*to, *len);
        remote[i] = iovec(*from as usize, *len);
    }
    let n = batch.len() as libc::c_ulong;
    // SAFETY: both arrays hold `n` valid entries; the local ones are room by the caller's promise,
    // the remote ones are checked by the kernel.
    let r = unsafe {
        libc::process_vm_readv(pid as libc::pid_t, local.as_ptr(), n, remote.as_ptr(), n, 0)
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    if r as usize != batch.iter().map(|b| b.2).sum::<usize>() {
        return Err(io::Error::other(
            "a RAM block of QEMU could not be read in full",
        ));
    }
    Ok(())
}
