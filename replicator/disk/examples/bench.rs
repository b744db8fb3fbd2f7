//! fio's nbd engine against this server, nbdkit's file plugin and qemu-nbd, each on the same file
//! on tmpfs, one after the other in one run. Prints figures and ratios as JSON.
//! `bench [SECONDS a job] [MiB of the file]`. Needs fio, nbdkit, qemu-nbd. Build with --release.

use havm_core::ids::{EpochNo, StreamId};
use havm_disk::nbd::{NbdConfig, NbdServer};
use havm_disk::{Disk, DiskConfig};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

type Res<T> = Result<T, Box<dyn std::error::Error>>;

const JOBS: [(&str, &[&str]); 5] = [
    (
        "randwrite_4k_d16_iops",
        &["--rw=randwrite", "--bs=4k", "--iodepth=16"],
    ),
    (
        "randread_4k_d16_iops",
        &["--rw=randread", "--bs=4k", "--iodepth=16"],
    ),
    (
        "write_4k_d1_fsync_iops",
        &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"],
    ),
    ("write_1m_d4_mbs", &["--rw=write", "--bs=1m", "--iodepth=4"]),
    ("read_1m_d4_mbs", &["--rw=read", "--bs=1m", "--iodepth=4"]),
];

fn fio(uri: &str, job: &(&str, &[&str]), seconds: u64) -> Res<f64> {
    let out = Command::new("fio")
        .args([
            "--name=j",
            "--ioengine=nbd",
            "--time_based",
            "--output-format=json",
        ])
        .arg(format!("--uri={uri}"))
        .arg(format!("--runtime={seconds}"))
        .args(job.1)
        .output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let v: Value = serde_json::from_str(
        text.get(text.find('{').ok_or("no JSON from fio")?..)
            .ok_or("")?,
    )?;
    let j = &v["jobs"][0];
    let side = if j["read"]["total_ios"].as_u64() > Some(0) {
        &j["read"]
    } else {
        &j["write"]
    };
    let iops = side["iops"].as_f64().ok_or("no iops from fio")?;
    let bw = side["bw_bytes"].as_f64().ok_or("no bandwidth from fio")?;
    Ok(if job.0.ends_with("mbs") {
        bw / 1e6
    } else {
        iops
    })
}

struct Ended(Child);
impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(socket: &Path) -> Res<()> {
    let t = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        if t.elapsed() > Duration::from_secs(5) {
            return Err("the server did not come up".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn run(uri: &str, seconds: u64) -> Res<Value> {
    let mut out = serde_json::Map::new();
    for j in &JOBS {
        out.insert(j.0.into(), json!(fio(uri, j, seconds)?.round()));
    }
    Ok(out.into())
}

fn ours(dir: &Path, image: &Path, tracking: bool, workers: usize, seconds: u64) -> Res<Value> {
    let meta = dir.join("meta");
    let cfg = DiskConfig::new(image.into(), meta, [9; 16]);
    let disk = Disk::create(&cfg, false)?;
    disk.go_solo()?;
    let socket = dir.join("havm.sock");
    let mut n = NbdConfig::new(socket.clone(), "d");
    n.workers = workers;
    let server = NbdServer::start(disk.clone(), &n)?;
    let stop = Arc::new(AtomicBool::new(false));
    let pump = if tracking {
        disk.begin_tracking(StreamId([1; 16]), EpochNo(1))?;
        let (d, s) = (disk.clone(), stop.clone());
        Some(std::thread::spawn(move || {
            while !s.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
                if let Ok(e) = d.barrier() {
                    d.acked(e.epoch);
                    d.peer_durable(e.epoch);
                }
            }
        }))
    } else {
        None
    };
    let r = run(
        &format!("nbd+unix:///d?socket={}", socket.display()),
        seconds,
    );
    stop.store(true, SeqCst);
    if let Some(p) = pump {
        let _ = p.join();
    }
    drop(server);
    r
}

fn main() -> Res<()> {
    let a: Vec<String> = std::env::args().collect();
    let seconds = a.get(1).map_or(Ok(2), |s| s.parse())?;
    let mib: u64 = a.get(2).map_or(Ok(512), |s| s.parse())?;
    let dir = PathBuf::from(format!("/dev/shm/havm-disk-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let image = dir.join("image");
    let file = std::fs::File::create(&image)?;
    file.set_len(mib << 20)?;
    // Allocated beforehand, so that nobody measures the file system's allocation.
    let piece = vec![0x5au8; 1 << 20];
    for i in 0..mib {
        std::os::unix::fs::FileExt::write_all_at(&file, &piece, i << 20)?;
    }
    drop(file);
    let result = (|| -> Res<Value> {
        let sock = dir.join("nbdkit.sock");
        let uri = format!("nbd+unix:///?socket={}", sock.display());
        let kit = Command::new("nbdkit")
            .args(["-f", "-U"])
            .arg(&sock)
            .arg("file")
            .arg(&image)
            .stdout(Stdio::null())
            .spawn()
            .map(Ended)?;
        wait_for(&sock)?;
        let nbdkit = run(&uri, seconds)?;
        drop(kit);
        let sock = dir.join("qemu.sock");
        let uri = format!("nbd+unix:///?socket={}", sock.display());
        let q = Command::new("qemu-nbd")
            .args(["-t", "-f", "raw", "--cache=writeback", "-e", "16", "-k"])
            .arg(&sock)
            .arg(&image)
            .spawn()
            .map(Ended)?;
        wait_for(&sock)?;
        let qemu = run(&uri, seconds)?;
        drop(q);
        let workers = a.get(3).map_or(Ok(4), |s| s.parse())?;
        let solo = ours(&dir, &image, false, workers, seconds)?;
        let epoch = ours(&dir, &image, true, workers, seconds)?;
        let mut ratios = serde_json::Map::new();
        for j in &JOBS {
            let f = |v: &Value| v[j.0].as_f64().unwrap_or(f64::NAN);
            let r = |a: f64, b: f64| json!((a / b * 100.0).round() / 100.0);
            ratios.insert(
                j.0.into(),
                json!({
                    "solo_per_nbdkit": r(f(&solo), f(&nbdkit)),
                    "epoch_per_nbdkit": r(f(&epoch), f(&nbdkit)),
                    "epoch_per_qemu_nbd": r(f(&epoch), f(&qemu)),
                }),
            );
        }
        Ok(
            json!({"nbdkit": nbdkit, "qemu_nbd": qemu, "solo": solo, "epoch": epoch, "ratios": ratios}),
        )
    })();
    std::fs::remove_dir_all(&dir)?;
    println!("{}", serde_json::to_string_pretty(&result?)?);
    Ok(())
}
