//! Protects guests that capture would copy wrongly from being protected in name only: each is refused,
//! with the device's name, before anything is done to QEMU.

mod common;

use havm_capture::{Capture, CaptureError, refusals};
use havm_qmp::Qmp;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Starts a stopped QEMU with `args` and returns what is refused.
fn refused(args: &[&str]) -> Vec<String> {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("qmp");
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("disk");
    let ram = dir.path().join("ram");
    let fill = |a: &&str| {
        a.replace("DISK", &disk.display().to_string())
            .replace("RAM", &ram.display().to_string())
    };
    let mut child = Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            "tcg",
            "-S",
            "-display",
            "none",
            "-nodefaults",
            "-m",
            "64",
            "-qmp",
        ])
        .arg(format!("unix:{},server=on,wait=off", path.display()))
        .args(args.iter().map(fill))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64 starts");
    let end = Instant::now() + Duration::from_secs(20);
    let mut qmp = loop {
        match Qmp::connect(&path, Duration::from_secs(5)) {
            Ok(q) => break q,
            Err(e) => assert!(Instant::now() < end, "{args:?}: {e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let found = refusals(&mut qmp).expect("refusals");
    // Attaching must come to the same conclusion.
    match (Capture::attach(&mut qmp), found.is_empty()) {
        (Ok(_), true) => {}
        (Err(CaptureError::Refused(list)), false) => assert_eq!(list, found),
        (other, _) => panic!("{args:?}: {found:?} but {:?}", other.err()),
    }
    let _ = child.kill();
    let _ = child.wait();
    found.iter().map(ToString::to_string).collect()
}

const GOOD: &[&str] = &[
    "-M",
    "pc-q35-10.0,memory-backend=pc.ram",
    "-object",
    "memory-backend-file,id=pc.ram,share=on,mem-path=RAM,size=64M",
];

fn with(extra: &[&str]) -> Vec<String> {
    refused(&[GOOD, extra].concat())
}

#[test]
fn an_ordinary_guest_is_accepted() {
    let devices = [
        "-device",
        "virtio-net-pci",
        "-device",
        "virtio-gpu-pci",
        "-device",
        "virtio-scsi-pci",
        "-blockdev",
        "file,node-name=d,filename=DISK,cache.direct=off",
        "-device",
        "virtio-blk-pci,drive=d",
        "-device",
        "qemu-xhci",
        "-device",
        "usb-tablet",
        "-device",
        "virtio-rng-pci",
    ];
    assert_eq!(with(&devices), [""; 0]);
}

#[test]
fn each_device_that_cannot_be_followed_is_named() {
    for (extra, name) in [
        (&["-device", "virtio-balloon-pci"][..], "virtio-balloon-pci"),
        (
            &["-device", "virtio-balloon-pci,id=b0"],
            "virtio-balloon-pci",
        ),
        (
            &[
                "-device",
                "ivshmem-plain,memdev=s",
                "-object",
                "memory-backend-ram,id=s,size=1M,share=on",
            ],
            "ivshmem-plain",
        ),
        (
            &[
                "-fsdev",
                "local,id=f,path=/tmp,security_model=none",
                "-device",
                "virtio-9p-pci,fsdev=f,mount_tag=t",
            ],
            "virtio-9p-pci",
        ),
        (
            &[
                "-blockdev",
                "file,node-name=d,filename=DISK,cache.direct=on",
                "-device",
                "virtio-blk-pci,drive=d",
            ],
            "cache.direct=on",
        ),
    ] {
        let found = with(extra);
        assert!(
            found.len() == 1 && found[0].contains(name),
            "{extra:?}: {found:?}"
        );
    }
}

#[test]
fn private_main_memory_is_refused_with_its_remedy() {
    let found = refused(&["-M", "q35"]);
    assert!(
        found.len() == 1 && found[0].contains("memoryBacking"),
        "{found:?}"
    );
    let found = refused(&[
        "-M",
        "q35,memory-backend=m",
        "-object",
        "memory-backend-memfd,id=m,share=on,size=64M",
    ]);
    assert!(
        found.len() == 1 && found[0].contains("type='file'"),
        "{found:?}"
    );
}
