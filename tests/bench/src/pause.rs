//! How long a checkpoint stops the guest, and the floor under it measured in the same run.
//!
//! As the replicator does it: one round of scan and copy while the guest runs, then the pause. The floor
//! is a bare stop, save, cont cycle (before anything is tracked) and a memcpy of the epoch's bytes.
//! The same guest is measured without the round before, too: that shows what the round is worth.

use crate::guest::{Guest, Spec};
use crate::machine;
use crate::report::{Found, attempt};
use crate::stats::{Spread, median, round, spread};
use anyhow::{Context, Result};
use havm_capture::{Capture, PAGE_BYTES, PageSet, Pause};
use havm_qmp::Qmp;
use serde_json::{Value, json};
use std::io::Seek;
use std::time::{Duration, Instant};

/// Between two epochs.
const INTERVAL: Duration = Duration::from_millis(50);
/// Epochs of each phase.
const EPOCHS: usize = 200;
/// Pages of a round while all of memory is copied for the first time.
const FIRST_ROUND_PAGES: usize = 16 * 1024;
/// What a guest has besides memory: its state is in every epoch.
pub const DEVICES: &[&str] = &[
    "-netdev",
    "hubport,id=net,hubid=0",
    "-device",
    "virtio-net-pci,netdev=net,addr=0x3",
    "-blockdev",
    "null-co,node-name=disk,size=1073741824,read-zeroes=on",
    "-device",
    "virtio-blk-pci,drive=disk,addr=0x4",
];

struct Case {
    figure: &'static str,
    ram_mib: u32,
    /// Written again and again.
    dirty_mib: u32,
    /// Written once before: a guest that ran for long has used its memory.
    touch_mib: u32,
}

const CASES: [Case; 3] = [
    Case {
        figure: "pause_idle_256_mib",
        ram_mib: 256,
        dirty_mib: 0,
        touch_mib: 128,
    },
    Case {
        figure: "pause_idle_4_gib",
        ram_mib: 4096,
        dirty_mib: 0,
        touch_mib: 3072,
    },
    Case {
        figure: "pause_1_gib_dirty_11_mib",
        ram_mib: 1024,
        dirty_mib: 11,
        touch_mib: 512,
    },
];

/// All cases, one guest after another.
///
/// # Errors
/// None: a case that could not be measured says so in what was found.
pub fn measure() -> Result<Found> {
    let mut found = Found::default();
    let mut detail = serde_json::Map::new();
    for case in &CASES {
        println!("   {} MiB, dirtying {} MiB", case.ram_mib, case.dirty_mib);
        match attempt(|| run(case)) {
            Ok(seen) => {
                found.seen(case.figure, seen.pause_ms, seen.floor_ms);
                detail.insert(case.figure.into(), seen.detail);
            }
            Err(e) => found.unseen(case.figure, format!("{e:#}")),
        }
    }
    found.detail = detail.into();
    Ok(found)
}

struct Seen {
    pause_ms: f64,
    floor_ms: f64,
    detail: Value,
}

fn run(case: &Case) -> Result<Seen> {
    machine::need_memory(u64::from(case.ram_mib) + 1024)?;
    let guest = start(case);
    let mut qmp = guest.connect();
    std::thread::sleep(Duration::from_secs(2));
    let bare = bare_cycles(&mut qmp, &guest)?;
    let mut capture = Capture::attach(&mut qmp)?;
    let first = first_round(&mut capture)?;
    let with_round = epochs(&mut qmp, &mut capture, true)?;
    let without = epochs(&mut qmp, &mut capture, false)?;
    let empty = "no epoch was measured";
    let bare = spread(bare).context(empty)?;
    let memcpy = spread(with_round.memcpy_ms).context(empty)?;
    let pause = column(&with_round.pauses, |p| p.total_us).context(empty)?;
    Ok(Seen {
        pause_ms: pause.p50,
        floor_ms: bare.p50 + memcpy.p50,
        detail: json!({
            "ram_mib": case.ram_mib, "used_mib": case.touch_mib, "interval_ms": INTERVAL.as_millis(),
            "first_round_pages": first.0, "first_round_ms": first.1.as_millis(),
            "bare_stop_save_cont_ms": bare, "memcpy_ms": memcpy,
            "pages_before_the_pause_p50": median(with_round.before),
            "pause_ms": parts(&with_round.pauses),
            "pause_without_round_ms": parts(&without.pauses),
            "memcpy_without_round_ms": spread(without.memcpy_ms),
            "device_state_bytes": with_round.state_bytes,
        }),
    })
}

fn start(case: &Case) -> Guest {
    let work = match case.dirty_mib {
        0 => "sleep 1000".to_owned(),
        n => {
            format!("dd if=/dev/zero of=/m/f bs=1M count={n} conv=notrunc 2>/dev/null; usleep 2000")
        }
    };
    Guest::start(&Spec {
        ram_mib: case.ram_mib,
        first: &fill(case.touch_mib),
        work: &work,
        extra: DEVICES,
        user: None,
    })
}

/// A shell command that uses so much memory for good. Not zeroes: these would not be sent, nor look used.
pub fn fill(mib: u32) -> String {
    // Copies are much faster than a pipe, under TCG.
    format!(
        "yes havm | dd of=/m/s bs=1M count=32 iflag=fullblock 2>/dev/null\n\
         for i in $(seq {}); do dd if=/m/s bs=1M 2>/dev/null; done > /m/t",
        mib / 32
    )
}

/// Pages and time of bringing all of memory over once.
fn first_round(capture: &mut Capture) -> Result<(usize, Duration)> {
    let (clock, mut set, mut pages) = (Instant::now(), PageSet::new(), 0);
    loop {
        let done = capture.collect(&mut set, FIRST_ROUND_PAGES)?;
        pages += done.pages;
        set.clear();
        if !done.more {
            return Ok((pages, clock.elapsed()));
        }
    }
}

struct Epochs {
    pauses: Vec<Pause>,
    /// Of all the epoch's bytes, whether they were copied in the pause or before.
    memcpy_ms: Vec<f64>,
    /// Pages copied while the guest ran.
    before: Vec<f64>,
    state_bytes: usize,
}

fn epochs(qmp: &mut Qmp, capture: &mut Capture, round_before: bool) -> Result<Epochs> {
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    let mut buffers = Buffers::default();
    let mut e = Epochs {
        pauses: vec![],
        memcpy_ms: vec![],
        before: vec![],
        state_bytes: 0,
    };
    for _ in 0..EPOCHS {
        std::thread::sleep(INTERVAL);
        if round_before {
            e.before
                .push(capture.collect(&mut set, usize::MAX)?.pages as f64);
        }
        e.pauses
            .push(capture.checkpoint(qmp, &mut set, &mut state, &mut || {}, true)?);
        qmp.take_events().for_each(drop);
        e.memcpy_ms.push(buffers.memcpy_ms(set.len()));
        set.clear();
    }
    e.state_bytes = state.len();
    Ok(e)
}

/// Plain stop, save, cont, one after another, milliseconds each.
fn bare_cycles(qmp: &mut Qmp, guest: &Guest) -> Result<Vec<f64>> {
    let mut file = std::fs::File::create(guest.dir.path().join("state"))?;
    let set = qmp.add_fd(&file, "bench")?;
    let args = json!({"filename": format!("/dev/fdset/{set}"), "live": false});
    let mut out = Vec::new();
    for _ in 0..EPOCHS {
        std::thread::sleep(INTERVAL);
        file.rewind()?;
        let clock = Instant::now();
        qmp.stop()?;
        qmp.execute("xen-save-devices-state", args.clone())?;
        qmp.cont()?;
        out.push(clock.elapsed().as_secs_f64() * 1000.0);
        qmp.take_events().for_each(drop);
    }
    qmp.remove_fd(set)?;
    Ok(out)
}

/// Warm memory for one thread's memcpy.
#[derive(Default)]
struct Buffers {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Buffers {
    fn memcpy_ms(&mut self, pages: usize) -> f64 {
        let len = pages * PAGE_BYTES;
        if self.from.len() < len {
            self.from.resize(len, 1);
            self.to.resize(len, 2);
        }
        let clock = Instant::now();
        self.to[..len].copy_from_slice(&self.from[..len]);
        std::hint::black_box(&self.to);
        clock.elapsed().as_secs_f64() * 1000.0
    }
}

fn column(pauses: &[Pause], part: fn(&Pause) -> u64) -> Option<Spread> {
    spread(pauses.iter().map(|p| part(p) as f64 / 1000.0))
}

fn parts(pauses: &[Pause]) -> Value {
    json!({
        "all": column(pauses, |p| p.total_us),
        "stop": column(pauses, |p| p.stop_us),
        "scan": column(pauses, |p| p.scan_us),
        "copy": column(pauses, |p| p.copy_us),
        "state": column(pauses, |p| p.state_us),
        "cont": column(pauses, |p| p.cont_us),
        "pages_p50": median(pauses.iter().map(|p| p.pages as f64)).map(round),
    })
}
