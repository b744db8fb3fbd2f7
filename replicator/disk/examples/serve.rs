//! Serves one raw file over NBD, for looking at the engine by hand:
//! `serve IMAGE META SOCKET EXPORT [solo|tracking|standby] [WORKERS]`. In `tracking` an epoch is
//! closed every 50 ms and acked at once, as a perfect standby would.

use havm_core::ids::{EpochNo, StreamId};
use havm_disk::nbd::{NbdConfig, NbdServer};
use havm_disk::{Disk, DiskConfig, DiskError};
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let a: Vec<String> = std::env::args().collect();
    let [_, image, meta, socket, export, rest @ ..] = &a[..] else {
        return Err("serve IMAGE META SOCKET EXPORT [solo|tracking|standby] [WORKERS]".into());
    };
    let cfg = DiskConfig::new(image.into(), meta.into(), *b"havm-disk-serve!");
    let disk = match Disk::open(&cfg, None) {
        Err(DiskError::Meta(e)) => {
            eprintln!("{e}");
            Disk::create(&cfg, true)?
        }
        r => r?,
    };
    let mode = rest.first().map_or("solo", String::as_str);
    if mode != "standby" {
        disk.go_solo()?;
    }
    let mut nbd = NbdConfig::new(socket.into(), export.as_str());
    if let Some(w) = rest.get(1) {
        nbd.workers = w.parse()?;
    }
    let _server = NbdServer::start(disk.clone(), &nbd)?;
    if mode == "tracking" {
        disk.begin_tracking(StreamId([1; 16]), EpochNo(1))?;
    }
    println!(
        "serving {} bytes as {export} at {socket}, {}",
        disk.size(),
        disk.mode()
    );
    loop {
        std::thread::sleep(Duration::from_millis(50));
        if mode == "tracking" {
            let e = disk.barrier()?;
            disk.acked(e.epoch);
            disk.peer_durable(e.epoch);
        }
    }
}
