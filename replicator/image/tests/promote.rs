//! On two real QEMUs: what is loaded at a standby is what the primary was, registers and memory.

use havm_capture::ram_blocks;
use havm_image::{BlockInfo, PAGE_BYTES, RamImage, promote};
use havm_qmp::Qmp;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MACHINE_ALIAS: &str = "q35";

struct Qemu {
    child: Child,
    qmp: Qmp,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Ours, by its handle.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(dir: &Path, name: &str, waiting: bool) -> Qemu {
    let ram = dir.join(format!("{name}.ram"));
    let sock = dir.join(format!("{name}.qmp"));
    let mut c = Command::new("qemu-system-x86_64");
    c.args([
        "-machine",
        &format!("{MACHINE_ALIAS},memory-backend=pc.ram,suppress-vmdesc=on"),
    ])
    .args([
        "-cpu",
        "qemu64",
        "-accel",
        "tcg",
        "-m",
        "64",
        "-nodefaults",
        "-display",
        "none",
    ])
    .args(["-device", "virtio-net-pci,addr=0x3", "-S"])
    .arg("-object")
    .arg(format!(
        "memory-backend-file,id=pc.ram,size=64M,share=on,mem-path={}",
        ram.display()
    ))
    .arg("-qmp")
    .arg(format!("unix:{},server=on,wait=off", sock.display()));
    if waiting {
        c.args(["-incoming", "defer"]);
    }
    let child = c
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("start QEMU");
    let since = Instant::now();
    let qmp = loop {
        match Qmp::connect(&sock, Duration::from_secs(5)) {
            Ok(q) => break q,
            Err(e) if since.elapsed() > Duration::from_secs(20) => panic!("no monitor: {e}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    Qemu { child, qmp }
}

fn save_devices(q: &mut Qmp, file: &PathBuf) -> Vec<u8> {
    q.execute(
        "xen-save-devices-state",
        serde_json::json!({"filename": file, "live": false}),
    )
    .expect("save the device state");
    std::fs::read(file).expect("read the device state")
}

fn private(
    q: &Qmp,
    blocks: &[havm_capture::RamBlock],
    i: u16,
    to: &mut [u8],
) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mem = std::fs::File::open(format!("/proc/{}/mem", q.peer_pid()))?;
    let b = &blocks[i as usize];
    mem.read_exact_at(&mut to[..b.len as usize], b.hva)
}

/// The state that the guest will go on from, without what QEMU counts for itself.
fn registers(q: &mut Qmp) -> String {
    q.human("info registers").expect("registers")
}

#[test]
fn a_loaded_standby_has_the_primarys_registers_and_runs() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut a = start(dir.path(), "a", false);
    let machine = a
        .qmp
        .execute(
            "qom-get",
            serde_json::json!({"path": "/machine", "property": "type"}),
        )
        .expect("machine type");
    let machine = machine
        .as_str()
        .expect("text")
        .trim_end_matches("-machine")
        .to_owned();
    a.qmp.cont().expect("run");
    std::thread::sleep(Duration::from_millis(700));
    a.qmp.stop().expect("stop");
    let saved = save_devices(&mut a.qmp, &dir.path().join("state"));
    let blocks = ram_blocks(&mut a.qmp).expect("blocks");
    let mut from = RamImage::map(&a.qmp, &blocks).expect("map the primary");
    from.read_private(|i, to| private(&a.qmp, &blocks, i, to))
        .expect("private blocks");
    let infos: Vec<BlockInfo> = blocks.iter().map(BlockInfo::from).collect();

    let mut b = start(dir.path(), "b", true);
    promote::prepare(&mut b.qmp).expect("capabilities");
    let blocks_b = ram_blocks(&mut b.qmp).expect("blocks");
    let mut image = RamImage::map(&b.qmp, &blocks_b).expect("map the standby");
    image.check_equal(&infos).expect("equal definitions");
    for (i, info) in infos.iter().enumerate() {
        for p in 0..(info.len as usize / PAGE_BYTES) as u32 {
            let page = *from.page(i as u16, p).expect("inside");
            *image.page_mut(i as u16, p).expect("inside") = page;
        }
    }
    // Through a second waiting QEMU, as after a handover.
    let mut c = start(dir.path(), "c", true);
    promote::prepare(&mut c.qmp).expect("capabilities");
    let blocks_c = ram_blocks(&mut c.qmp).expect("blocks");
    let fresh = RamImage::map(&c.qmp, &blocks_c).expect("map");
    drop(b);
    assert!(image.rehome(fresh).expect("rehome") > 0);

    let t = promote::load(&mut c.qmp, &machine, &image, &saved).expect("load");
    assert_eq!(registers(&mut c.qmp), registers(&mut a.qmp));
    promote::run(&mut c.qmp).expect("run");
    assert!(c.qmp.run_state().expect("state").0, "the vCPUs run");
    println!("promotion: {t:?}");
}

#[test]
fn a_damaged_device_state_is_an_error_and_not_a_running_guest() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut a = start(dir.path(), "a", false);
    let mut saved = save_devices(&mut a.qmp, &dir.path().join("state"));
    let mut b = start(dir.path(), "b", true);
    promote::prepare(&mut b.qmp).expect("capabilities");
    let blocks_b = ram_blocks(&mut b.qmp).expect("blocks");
    let image = RamImage::map(&b.qmp, &blocks_b).expect("map");
    let middle = saved.len() / 2;
    saved.drain(middle..middle + 40);
    let machine = "pc-q35-9.0"; // not the waiting one's either
    let err = promote::load(&mut b.qmp, machine, &image, &saved).expect_err("refused");
    println!("{err}");
    assert!(!b.qmp.run_state().map(|s| s.0).unwrap_or(false));
}
