//! How long a checkpoint stops the guest, and the floor under it measured in the same run.
//!
//! `cargo run --release -p havm-capture --example pause -- --ram 256 --dirty 0 [--epochs 300] [--rounds 0]
//! [--interval-ms 50] [--threads N] [--touch MiB] [--look-first 1]`
//!
//! `--touch` has the guest fill so much of its memory first: a guest that ran for long has touched all.
//!
//! The floor: a bare stop, save, cont cycle (without any capture, in its own phase), and a memcpy of as
//! many bytes as the pause copied.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Guest, Spec};
use havm_capture::{Capture, Options, PAGE_BYTES, PageSet, Pause};
use havm_qmp::Qmp;
use serde_json::json;
use std::time::{Duration, Instant};

struct Args {
    ram: u32,
    dirty: u32,
    epochs: usize,
    rounds: usize,
    interval: Duration,
    threads: usize,
    touch: u32,
    look_first: bool,
}

fn args() -> Args {
    let mut all = std::env::args().skip(1);
    let mut a = Args {
        ram: 256,
        dirty: 0,
        epochs: 300,
        rounds: 0,
        interval: Duration::from_millis(50),
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        touch: 0,
        look_first: false,
    };
    while let (Some(name), Some(value)) = (all.next(), all.next()) {
        let n: u32 = value.parse().expect("a number");
        match name.as_str() {
            "--ram" => a.ram = n,
            "--dirty" => a.dirty = n,
            "--epochs" => a.epochs = n as usize,
            "--rounds" => a.rounds = n as usize,
            "--interval-ms" => a.interval = Duration::from_millis(n.into()),
            "--threads" => a.threads = n as usize,
            "--touch" => a.touch = n,
            "--look-first" => a.look_first = n != 0,
            other => panic!("unknown option {other}"),
        }
    }
    a
}

fn main() {
    let a = args();
    let work = match a.dirty {
        0 => "sleep 1000".to_owned(),
        n => {
            format!("dd if=/dev/zero of=/m/f bs=1M count={n} conv=notrunc 2>/dev/null; usleep 2000")
        }
    };
    let touch = format!(
        "dd if=/dev/zero of=/m/t bs=1M count={} 2>/dev/null",
        a.touch
    );
    let guest = Guest::start(&Spec {
        ram_mib: a.ram,
        first: &touch,
        work: &work,
        extra: &[],
        user: None,
    });
    let mut qmp = guest.connect();
    std::thread::sleep(Duration::from_secs(2));
    let mut bare = bare_cycles(&mut qmp, &guest, a.epochs, a.interval);

    let options = Options {
        workers: Some(a.threads),
        look_first: Some(a.look_first),
    };
    let mut capture = Capture::attach_with(&mut qmp, options).expect("attach");
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    let first = Instant::now();
    let mut first_pages = 0;
    loop {
        let done = capture.collect(&mut set, 16 * 1024).expect("collect");
        first_pages += done.pages;
        set.clear();
        if !done.more {
            break;
        }
    }
    println!(
        "guest {} MiB, dirtying {} MiB; first round: {first_pages} pages in {} ms; {} scan threads",
        a.ram,
        a.dirty,
        first.elapsed().as_millis(),
        a.threads
    );
    let mut pauses: Vec<Pause> = Vec::new();
    let mut memcpy = Vec::new();
    let (mut before, mut scan_us) = (0, 0);
    for _ in 0..a.epochs {
        std::thread::sleep(a.interval);
        for _ in 0..a.rounds {
            let done = capture.collect(&mut set, usize::MAX).expect("collect");
            before += done.pages;
            scan_us += done.scan_us + done.copy_us;
        }
        let pause = capture
            .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
            .expect("checkpoint");
        qmp.take_events().for_each(drop);
        memcpy.push(copy_floor(pause.pages));
        pauses.push(pause);
        set.clear();
    }
    let column = |f: fn(&Pause) -> u64| -> Vec<u64> { pauses.iter().map(f).collect() };
    println!("             p50     p90     p99  microseconds");
    line("pause", column(|p| p.total_us));
    line("  stop", column(|p| p.stop_us));
    line("  scan", column(|p| p.scan_us));
    line("  copy", column(|p| p.copy_us));
    line("  state", column(|p| p.state_us));
    line("  cont", column(|p| p.cont_us));
    line("pages", column(|p| p.pages as u64));
    line("floor bare", bare.clone());
    line("floor memcpy", memcpy.clone());
    bare.sort_unstable();
    memcpy.sort_unstable();
    println!(
        "floor in all (p50s added): {} us; device state {} bytes; pages before the pause {} an epoch ({} us)",
        bare[bare.len() / 2] + memcpy[memcpy.len() / 2],
        state.len(),
        before / a.epochs,
        scan_us / a.epochs as u64,
    );
}

/// Plain stop, save, cont, one after another.
fn bare_cycles(qmp: &mut Qmp, guest: &Guest, n: usize, interval: Duration) -> Vec<u64> {
    let path = guest.dir.path().join("state");
    let file = std::fs::File::create(&path).expect("file");
    let set = qmp.add_fd(&file, "bench").expect("add-fd");
    let args = json!({"filename": format!("/dev/fdset/{set}"), "live": false});
    let mut out = Vec::new();
    for _ in 0..n {
        std::thread::sleep(interval);
        std::io::Seek::rewind(&mut &file).expect("seek");
        let clock = Instant::now();
        qmp.stop().expect("stop");
        qmp.execute("xen-save-devices-state", args.clone())
            .expect("save");
        qmp.cont().expect("cont");
        out.push(clock.elapsed().as_micros() as u64);
        qmp.take_events().for_each(drop);
    }
    qmp.remove_fd(set).expect("remove-fd");
    out
}

/// One thread's memcpy of `pages` pages between warm buffers.
fn copy_floor(pages: usize) -> u64 {
    thread_local! {
        static BUFFERS: std::cell::RefCell<(Vec<u8>, Vec<u8>)> = const { std::cell::RefCell::new((Vec::new(), Vec::new())) };
    }
    BUFFERS.with_borrow_mut(|(from, to)| {
        let len = pages * PAGE_BYTES;
        if from.len() < len {
            from.resize(len, 1);
            to.resize(len, 2);
        }
        let clock = Instant::now();
        to[..len].copy_from_slice(&from[..len]);
        std::hint::black_box(&to);
        clock.elapsed().as_micros() as u64
    })
}

fn line(name: &str, mut values: Vec<u64>) {
    values.sort_unstable();
    let at = |p: usize| values[(values.len() - 1) * p / 100];
    println!("{name:12} {:5}   {:5}   {:5}", at(50), at(90), at(99));
}
