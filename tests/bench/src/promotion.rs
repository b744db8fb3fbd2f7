//! From a standby's image to running vCPUs, for a small guest and a large one.
//!
//! ```text
//!   guest A (stopped) ──pages, device state──> image in the RAM file of waiting QEMU B ──> promote: timed
//!                     ──QEMU's own stream────> file ──> waiting QEMU C loads it, runs: the floor, timed
//! ```
//! Each promotion spends its QEMU; the next one gets a fresh one.

use crate::guest::{Guest, Spec};
use crate::machine;
use crate::pause::{DEVICES, fill};
use crate::report::{Found, attempt};
use crate::stats::{median, spread};
use anyhow::{Context, Result, bail, ensure};
use havm_capture::{RamBlock, ram_blocks};
use havm_image::{PAGE_BYTES, RamImage, promote};
use havm_qmp::{EventKind, Qmp};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// For what should take milliseconds.
const DEADLINE: Duration = Duration::from_secs(60);

struct Case {
    figure: &'static str,
    ram_mib: u32,
    /// Of it the guest has used so much.
    used_mib: u32,
    times: usize,
}

const CASES: [Case; 2] = [
    Case {
        figure: "promotion_256_mib",
        ram_mib: 256,
        used_mib: 128,
        times: 9,
    },
    Case {
        figure: "promotion_4_gib",
        ram_mib: 4096,
        used_mib: 3072,
        times: 5,
    },
];

/// Both sizes and their ratio.
///
/// # Errors
/// None: a case that could not be measured says so in what was found.
pub fn measure() -> Result<Found> {
    let mut found = Found::default();
    let mut detail = serde_json::Map::new();
    let mut medians = Vec::new();
    for case in &CASES {
        println!("   {} MiB", case.ram_mib);
        match attempt(|| run(case)) {
            Ok((value, floor, seen)) => {
                found.seen(case.figure, value, floor);
                detail.insert(case.figure.into(), seen);
                medians.push((value, floor));
            }
            Err(e) => found.unseen(case.figure, format!("{e:#}")),
        }
    }
    if let [(small, small_floor), (large, large_floor)] = medians[..] {
        found.seen(
            "promotion_4_gib_over_256_mib",
            large / small,
            large_floor / small_floor,
        );
    } else {
        found.unseen(
            "promotion_4_gib_over_256_mib",
            "one of both promotions was not measured",
        );
    }
    found.detail = detail.into();
    Ok(found)
}

fn start(case: &Case, waiting: bool) -> Guest {
    let mut extra = DEVICES.to_vec();
    if waiting {
        extra.extend(["-incoming", "defer"]);
    }
    let spec = Spec {
        ram_mib: case.ram_mib,
        first: &fill(case.used_mib),
        work: "sleep 1000",
        extra: &extra,
        user: None,
    };
    if waiting {
        Guest::spawn(&spec)
    } else {
        Guest::start(&spec)
    }
}

fn run(case: &Case) -> Result<(f64, f64, Value)> {
    // The guest, and one standby at a time.
    machine::need_memory(2 * u64::from(case.ram_mib) + 1024)?;
    let primary = start(case, false);
    let mut qmp = primary.connect();
    qmp.stop()?;
    let saved = save_devices(&mut qmp, &primary.dir.path().join("state"))?;
    let machine = machine_type(&mut qmp)?;
    let blocks = ram_blocks(&mut qmp)?;
    let mut from = RamImage::map(&qmp, &blocks)?;
    let mem = std::fs::File::open(format!("/proc/{}/mem", primary.pid()))?;
    from.read_private(|i, to| read_block(&mem, &blocks, i, to))?;
    let own = primary.dir.path().join("own-stream");
    write_own_stream(&mut qmp, &own)?;

    let (mut ours, mut floor, mut load, mut cont, mut made) =
        (vec![], vec![], vec![], vec![], vec![]);
    let mut stream_bytes = 0;
    for _ in 0..case.times {
        let standby = start(case, true);
        let mut qmp = wait_connect(&standby)?;
        promote::prepare(&mut qmp)?;
        let image = copy(&from, &mut qmp)?;
        let clock = Instant::now();
        let p = promote::promote(&mut qmp, &machine, &image, &saved)?;
        ours.push(ms(clock.elapsed()));
        ensure!(qmp.run_state()?.0, "the promoted guest does not run");
        load.push(ms(p.load));
        cont.push(ms(p.cont));
        made.push(ms(p.stream));
        stream_bytes = p.stream_bytes;
        drop(standby);

        let standby = start(case, true);
        let mut qmp = wait_connect(&standby)?;
        promote::prepare(&mut qmp)?;
        // Its RAM file must hold what the guest's does: devices read their rings when they are loaded.
        copy(&from, &mut qmp)?;
        floor.push(ms(load_own_stream(&mut qmp, &own)?));
    }
    let empty = "no promotion was measured";
    let detail = json!({
        "ram_mib": case.ram_mib, "used_mib": case.used_mib, "stream_bytes": stream_bytes,
        "promotion_ms": spread(ours.clone()), "make_stream_ms": spread(made),
        "load_ms": spread(load), "cont_ms": spread(cont), "qemu_own_stream_ms": spread(floor.clone()),
    });
    Ok((
        median(ours).context(empty)?,
        median(floor).context(empty)?,
        detail,
    ))
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

/// A waiting QEMU makes its monitor's socket a moment after its start.
fn wait_connect(guest: &Guest) -> Result<Qmp> {
    let since = Instant::now();
    loop {
        match Qmp::connect(&guest.qmp, Duration::from_secs(5)) {
            Ok(q) => return Ok(q),
            Err(e) if since.elapsed() > DEADLINE => return Err(e).context("a waiting QEMU"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn save_devices(q: &mut Qmp, file: &Path) -> Result<Vec<u8>> {
    q.execute(
        "xen-save-devices-state",
        json!({"filename": file, "live": false}),
    )?;
    std::fs::read(file).context("read the device state")
}

/// As the stream's head names it.
fn machine_type(q: &mut Qmp) -> Result<String> {
    let t = q.execute("qom-get", json!({"path": "/machine", "property": "type"}))?;
    let t = t.as_str().context("the machine's type is no text")?;
    Ok(t.trim_end_matches("-machine").to_owned())
}

fn read_block(
    mem: &std::fs::File,
    blocks: &[RamBlock],
    i: u16,
    to: &mut [u8],
) -> std::io::Result<()> {
    match blocks.get(usize::from(i)) {
        Some(b) => mem.read_exact_at(&mut to[..b.len as usize], b.hva),
        None => Err(std::io::ErrorKind::NotFound.into()),
    }
}

/// Brings the guest's memory into the waiting QEMU's.
fn copy(from: &RamImage, qmp: &mut Qmp) -> Result<RamImage> {
    let blocks = ram_blocks(qmp)?;
    let mut image = RamImage::map(qmp, &blocks)?;
    let infos: Vec<_> = from.blocks().cloned().collect();
    image.check_equal(&infos)?;
    let mut page = [0; PAGE_BYTES];
    for (i, info) in infos.iter().enumerate() {
        for p in 0..info.len.div_ceil(PAGE_BYTES as u64) as u32 {
            ensure!(
                from.read(i as u16, p, &mut page),
                "page {p} of {} is not there",
                info.name
            );
            // A page that was never written stays a hole, here as there.
            if page.iter().any(|&x| x != 0) {
                let to = image.page_mut(i as u16, p);
                *to.with_context(|| format!("page {p} of {} has no place", info.name))? = page;
            }
        }
    }
    Ok(image)
}

/// Lets QEMU write what a planned migration would, without the RAM that is in the file.
fn write_own_stream(qmp: &mut Qmp, path: &Path) -> Result<()> {
    promote::prepare(qmp)?;
    qmp.take_events().for_each(drop);
    qmp.execute(
        "migrate",
        json!({"uri": format!("file:{}", path.display())}),
    )?;
    wait_migration(qmp)
}

/// From the order to load to running vCPUs.
fn load_own_stream(qmp: &mut Qmp, path: &Path) -> Result<Duration> {
    qmp.take_events().for_each(drop);
    let clock = Instant::now();
    let uri = format!("file:{}", path.display());
    qmp.execute(
        "migrate-incoming",
        json!({"uri": uri, "exit-on-error": false}),
    )?;
    wait_migration(qmp)?;
    qmp.cont()?;
    Ok(clock.elapsed())
}

fn wait_migration(qmp: &mut Qmp) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while let Some(e) = qmp.wait_event(end.saturating_duration_since(Instant::now()))? {
        match e.kind {
            EventKind::Migration { status } if status == "completed" => return Ok(()),
            EventKind::Migration { status } if status == "failed" => {
                let why = qmp.execute("query-migrate", json!({}))?;
                bail!("QEMU's own migration failed: {why}");
            }
            _ => {}
        }
    }
    bail!(
        "QEMU's own migration did not end within {} s",
        DEADLINE.as_secs()
    )
}
