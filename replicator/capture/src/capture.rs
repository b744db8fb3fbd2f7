//! Capture of one running guest: rounds while it runs, and the checkpoint that closes an epoch.
//!
//! ```text
//!   attach ─> all dirty ──collect… (rounds, guest runs)──> little left ──checkpoint──> epoch N
//!                ^  ^                                                        │ resume
//!   mark_all_dirty  └── put_back (a failed attempt) <── collect… <───────────┘
//! ```
//!
//! A page counts as dirty if its bit in `forced` is set, or if the kernel says that it was written
//! since it was last protected. Scanning takes that away, so whatever fails afterwards sets the bit.

mod gather;

use crate::bits::Bits;
use crate::blocks::{self, RamBlock};
use crate::copy::Copies;
use crate::device_state::DeviceState;
use crate::error::CaptureError;
use crate::mapping::RamFile;
use crate::page_set::{PageRange, PageSet};
use crate::pagemap::Pagemap;
use crate::pool::{Latecomer, Pool};
use crate::probe::probe;
use crate::refuse;
use crate::scan::Scanner;
use crate::uffd::{self, Uffd};
use gather::Tracked;
use havm_qmp::{EventKind, Qmp};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// More scan threads bring nothing: the walk is bound by memory.
const MAX_WORKERS: usize = 4;
/// Room kept ready in a page set before a pause, beyond what the last one needed: 8 MiB.
const SPARE_PAGES: usize = 2048;

/// What one [`Capture::collect`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Pages copied (a page that was in the set already counts too).
    pub pages: usize,
    /// Microseconds of finding and protecting.
    pub scan_us: u64,
    /// Microseconds of copying.
    pub copy_us: u64,
    /// It stopped at the limit: call again for the rest.
    pub more: bool,
}

/// Where the time of a checkpoint went, in microseconds. Saving the devices' state runs in QEMU beside
/// our scan and copy; `state_us` is only what was left to wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pause {
    /// Until the vCPUs stood and block requests were drained.
    pub stop_us: u64,
    /// In the caller's barrier.
    pub barrier_us: u64,
    /// Finding and protecting the last pages.
    pub scan_us: u64,
    /// Copying them.
    pub copy_us: u64,
    /// Waiting for the devices' state.
    pub state_us: u64,
    /// Until QEMU said that the vCPUs run; 0 if they were not resumed.
    pub cont_us: u64,
    /// From the order to stop until here.
    pub total_us: u64,
    /// Pages of the last collect.
    pub pages: usize,
    /// The guest ran before. It is only resumed if it did: an admin's pause stays.
    pub was_running: bool,
}

/// Settings of a capture; `None` chooses what suits host and guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Threads that scan and copy in a pause, the caller's included.
    pub workers: Option<usize>,
    /// Walk without protecting first, then protect around what was found. Right for KVM, whose second-level
    /// tables would be dropped for all that is walked with protecting.
    pub look_first: Option<bool>,
}

/// The capture of one guest.
pub struct Capture {
    pid: u32,
    pidfd: OwnedFd,
    uffd: Uffd,
    blocks: Vec<RamBlock>,
    tracked: Vec<Tracked>,
    scanner: Scanner,
    pool: Pool,
    scan_over: EventFd,
    /// Each processor has a worker: the last one waits for QEMU's save.
    crowded: bool,
    state: DeviceState,
    /// Nothing was protected since everything was marked dirty.
    protect_first: bool,
    ranges: Vec<PageRange>,
    copies: Copies,
    last_pages: usize,
}

impl Capture {
    /// Attaches to the QEMU behind `qmp`, running or stopped. All pages count as dirty. After our own
    /// process died, a new one attaches to the same QEMU in the same way. Detaching is dropping: QEMU
    /// keeps running, with its tracking descriptor open for the next one.
    ///
    /// Only one capture at a time: two would take each other's dirty pages.
    ///
    /// # Errors
    /// [`CaptureError::Refused`] with every reason found; [`CaptureError::Kernel`];
    /// [`CaptureError::Trace`] where ptrace is not allowed.
    pub fn attach(qmp: &mut Qmp) -> Result<Capture, CaptureError> {
        Capture::attach_with(qmp, Options::default())
    }

    /// [`Capture::attach`] with settings other than the usual ones.
    ///
    /// # Errors
    /// As [`Capture::attach`].
    pub fn attach_with(qmp: &mut Qmp, options: Options) -> Result<Capture, CaptureError> {
        probe()?;
        let pid = qmp.peer_pid();
        let system = |what| move |source| CaptureError::System { what, source };
        let blocks = blocks::ram_blocks(qmp)?;
        let refusals = refuse::check(qmp, &blocks)?;
        if !refusals.is_empty() {
            return Err(CaptureError::Refused(refusals));
        }
        let pidfd = uffd::pidfd_open(pid).map_err(system("open a handle of QEMU"))?;
        let uffd = Uffd::take(pid, &pidfd)?;
        for block in &blocks {
            register(&uffd, pid, block)?;
        }
        let maps = blocks::read_maps(pid)?;
        let tracked = blocks
            .iter()
            .map(|block| {
                let file = match blocks::backing(&maps, block) {
                    Some(entry) => Some(
                        RamFile::open(pid, entry, block.hva, block.len)
                            .map_err(system("map the guest's RAM file"))?,
                    ),
                    None => None,
                };
                let known = Bits::new(block.pages(), file.is_none());
                let forced = Bits::new(block.pages(), false);
                Ok(Tracked {
                    file,
                    held: None,
                    forced,
                    known,
                })
            })
            .collect::<Result<Vec<_>, CaptureError>>()?;
        let pagemap = Pagemap::open(pid).map_err(system("open QEMU's page map"))?;
        let workers = options.workers.unwrap_or(cpus().min(MAX_WORKERS)).max(1);
        let gentle = options.look_first.unwrap_or_else(|| refuse::uses_kvm(pid));
        let mut capture = Capture {
            pid,
            pidfd,
            uffd,
            tracked,
            scanner: Scanner::new(pagemap, workers, gentle),
            pool: Pool::new(workers).map_err(system("start the scan threads"))?,
            scan_over: Latecomer::event()
                .map_err(|e| system("make an event descriptor")(e.into()))?,
            crowded: workers >= cpus(),
            state: DeviceState::new(qmp)?,
            protect_first: true,
            ranges: Vec::with_capacity(16 * 1024),
            copies: Copies::default(),
            last_pages: 0,
            blocks,
        };
        capture.shape();
        capture.mark_all_dirty();
        Ok(capture)
    }

    /// The guest's RAM blocks; a page set names them by their index here.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Bytes in use of all blocks.
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.len).sum()
    }

    /// Whether an earlier process' tracking was taken over (instead of a new one being set up).
    pub fn taken_again(&self) -> bool {
        self.uffd.taken_again
    }

    /// Pages that count as dirty whatever the kernel says: what is left of a first round.
    pub fn forced_pages(&self) -> u64 {
        self.tracked.iter().map(|t| t.forced.count()).sum()
    }

    /// Protects everything; nothing counts as dirty any more. For a stream whose two images are equal:
    /// the guest must stand still from before that equality until this returns.
    ///
    /// # Errors
    /// QEMU is gone, or its blocks changed.
    pub fn forget_all(&mut self) -> Result<(), CaptureError> {
        self.protect_all()?;
        self.tracked.iter_mut().for_each(|t| t.forced.clear());
        Ok(())
    }

    /// Everything counts as dirty once, for the first round of a stream to a standby of which nothing
    /// is known.
    pub fn mark_all_dirty(&mut self) {
        for (tracked, block) in self.tracked.iter_mut().zip(&self.blocks) {
            tracked.forced.set_range(0, block.pages());
        }
        self.protect_first = true;
    }

    /// The pages of a failed attempt count as dirty again.
    pub fn put_back(&mut self, pages: &PageSet) {
        for (block, page) in pages.entries() {
            if let Some(tracked) = self.tracked.get_mut(usize::from(*block)) {
                tracked.forced.set_range(*page, 1);
            }
        }
        for range in pages.absent() {
            if let Some(tracked) = self.tracked.get_mut(usize::from(range.block)) {
                tracked.forced.set_range(range.first, range.count);
            }
        }
    }

    /// Asks QEMU for its blocks again: a resizable one may have grown (the guest's firmware does that
    /// at boot), which makes the new part dirty. Call it after a `Reset` event and now and then.
    ///
    /// # Errors
    /// [`CaptureError::BlocksChanged`] after a hot-plug or unplug of memory or ROMs.
    pub fn refresh(&mut self, qmp: &mut Qmp) -> Result<(), CaptureError> {
        let now = blocks::ram_blocks(qmp)?;
        let changed = |what: String| Err(CaptureError::BlocksChanged { what });
        if now.len() != self.blocks.len() {
            return changed(format!("{} before, {} now", self.blocks.len(), now.len()));
        }
        let mut grown = false;
        for (i, new) in now.iter().enumerate() {
            let old = &self.blocks[i];
            if (&new.name, new.hva, new.max_len) != (&old.name, old.hva, old.max_len) {
                return changed(format!("{} moved or was replaced", old.name));
            }
            if new.len != old.len && old.shared_file {
                return changed(format!("{} was resized", old.name));
            }
            if new.len > old.len {
                let tracked = &mut self.tracked[i];
                tracked.forced.grow(new.pages());
                tracked.known.grow(new.pages());
                let fresh = new.pages() - old.pages();
                tracked.forced.set_range(old.pages(), fresh);
                tracked.known.set_range(old.pages(), fresh);
            } else if new.len < old.len {
                let count = old.pages() - new.pages();
                self.tracked[i].forced.clear_range(new.pages(), count);
            }
            grown |= new.len != old.len;
        }
        if grown {
            self.blocks = now;
            self.shape();
        }
        Ok(())
    }

    /// Takes what was written: finds it, protects it again, copies it into `out`; about `max_pages`
    /// at most. With the guest running or stopped; leaves one processor to it. On an error everything in
    /// `out` counts as dirty again, and `out` is empty.
    ///
    /// # Errors
    /// QEMU is gone, its blocks changed, or memory is short.
    pub fn collect(
        &mut self,
        out: &mut PageSet,
        max_pages: usize,
    ) -> Result<Collected, CaptureError> {
        let result = self.gather(out, max_pages, 1, None);
        if result.is_err() {
            self.put_back(out);
            out.clear();
        }
        result
    }

    /// Closes an epoch: stops the guest, calls `barrier` while it stands and its disk requests are
    /// drained, adds the last pages to `out`, fills `device_state`, and with `resume` lets it run
    /// again if it ran before.
    ///
    /// # Errors
    /// On any error the guest runs again if it ran before (whatever `resume` says), all pages in `out` count as
    /// dirty again, and `out` and `device_state` are empty. [`CaptureError::NotStopped`]: somebody else
    /// let it run in between.
    pub fn checkpoint(
        &mut self,
        qmp: &mut Qmp,
        out: &mut PageSet,
        device_state: &mut Vec<u8>,
        barrier: &mut dyn FnMut(),
        resume: bool,
    ) -> Result<Pause, CaptureError> {
        let result = self.try_checkpoint(qmp, out, device_state, barrier, resume);
        match &result {
            Ok(pause) => self.last_pages = pause.pages,
            Err(_) => {
                self.put_back(out);
                out.clear();
                device_state.clear();
            }
        }
        result
    }

    fn try_checkpoint(
        &mut self,
        qmp: &mut Qmp,
        out: &mut PageSet,
        device_state: &mut Vec<u8>,
        barrier: &mut dyn FnMut(),
        resume: bool,
    ) -> Result<Pause, CaptureError> {
        // All that may allocate or wait happens before the guest stands.
        self.shape_set(out);
        let room = self.last_pages + self.last_pages / 2 + SPARE_PAGES;
        out.reserve(room).map_err(|source| CaptureError::System {
            what: "make room for pages",
            source,
        })?;
        self.ranges.reserve(room);
        self.copies.reserve(room);
        self.state.rewind()?;
        qmp.poll_events()?;
        let before = qmp.queued_events().last().map_or(0, |e| e.seq);

        let clock = Instant::now();
        let stop = qmp.submit("stop", &serde_json::Value::Null)?;
        // QEMU goes on with this one by itself while we scan. Device state after stop but beside the RAM
        // scan is what QEMU's own migration relies on too: saving does not write guest memory.
        let save = self.state.submit(qmp);
        let stopped = qmp.wait(stop);
        let was_running = stopped.is_err()
            || qmp
                .queued_events()
                .any(|e| e.seq > before && e.kind == EventKind::Stop);
        let stop_seq = qmp.reply_seq();
        let mut pause = Pause {
            stop_us: us(clock),
            was_running,
            ..Pause::default()
        };

        let outcome = match (stopped, save) {
            (Ok(_), Ok(save)) => {
                let mark = Instant::now();
                barrier();
                pause.barrier_us = us(mark);
                let collected =
                    self.gather(out, usize::MAX, self.pool.workers(), Some(qmp.as_fd()));
                let mark = Instant::now();
                let saved = qmp.wait(save);
                pause.state_us = us(mark);
                collected.and_then(|c| {
                    (pause.scan_us, pause.copy_us, pause.pages) = (c.scan_us, c.copy_us, c.pages);
                    saved.map_err(CaptureError::from)?;
                    self.still_stopped(qmp, stop_seq)
                })
            }
            (Err(e), _) => Err(e.into()),
            (_, Err(e)) => Err(e),
        };
        if was_running && (resume || outcome.is_err()) {
            let mark = Instant::now();
            let resumed = qmp.cont();
            pause.cont_us = us(mark);
            // The first error says more.
            outcome.and(resumed.map_err(CaptureError::from))?;
        } else {
            outcome?;
        }
        pause.total_us = us(clock);
        self.state.read(device_state)?;
        Ok(pause)
    }

    /// Whether the pages and the state just taken belong together: nobody let the guest run, and
    /// QEMU still lives (the page map of a dead process scans as "nothing written").
    fn still_stopped(&self, qmp: &mut Qmp, stop_seq: u64) -> Result<(), CaptureError> {
        qmp.poll_events()?;
        for event in qmp.queued_events().filter(|e| e.seq > stop_seq) {
            match event.kind {
                EventKind::Resume => return Err(CaptureError::NotStopped("somebody resumed it")),
                EventKind::Reset { .. } => return Err(CaptureError::NotStopped("it was reset")),
                _ => {}
            }
        }
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => Ok(()),
            _ => Err(CaptureError::NotStopped("QEMU ended")),
        }
    }

    fn shape(&mut self) {
        self.tracked.iter_mut().for_each(|t| t.held = None);
        self.scanner
            .shape(self.blocks.iter().map(|b| (b.hva, b.pages())));
    }

    fn shape_set(&self, out: &mut PageSet) {
        out.shape(self.blocks.iter().map(RamBlock::pages));
    }
}

fn register(uffd: &Uffd, pid: u32, block: &RamBlock) -> Result<(), CaptureError> {
    uffd.register(block.hva, block.max_len)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => CaptureError::Busy { pid },
            _ => CaptureError::System {
                what: "track a RAM block of QEMU",
                source,
            },
        })
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn us(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}
