//! The gate at a real guest: QEMU holds the guest's tap, and its epochs are cut by `stop` and
//! `cont`. Needs root, QEMU and the testifying guest's image (`cargo run -p havm-lab -- guest-image`);
//! says so and passes where one is missing.

mod common;

use common::{CLIENT, GUEST, Lab, numbers, send, until, usable};
use havm_core::ids::{EpochId, EpochNo, StreamId, Term};
use havm_gate::{Gate, Limits, NicSpec, remove_guest_tap};
use havm_wire::acked::AckedEpoch;
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TERM: Term = Term(3);
const STREAM: StreamId = StreamId([3; 16]);
const QUIET: Duration = Duration::from_millis(400);

fn image() -> Option<(PathBuf, PathBuf)> {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let (kernel, initrd) = (base.join("kernel/vmlinuz"), base.join("initramfs.cpio"));
    (kernel.exists() && initrd.exists()).then_some((kernel, initrd))
}

struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
    socket: PathBuf,
}

impl Qemu {
    fn start(lab: &Lab, image: &(PathBuf, PathBuf), vnet_hdr: bool) -> Qemu {
        let (kernel, initrd) = image;
        let vnet_hdr = if vnet_hdr { "on" } else { "off" };
        let socket = std::env::temp_dir().join(format!("{}.qmp", lab.ns("qemu")));
        let child = Command::new("ip")
            .args(["netns", "exec", &lab.ns("H"), "qemu-system-x86_64"])
            .args("-M q35 -accel tcg -m 160 -nodefaults -display none -no-user-config".split(' '))
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", &format!("quiet havm.ip={GUEST}/24")])
            .args([
                "-netdev",
                &format!("tap,id=n,ifname=hvg7,script=no,downscript=no,vnet_hdr={vnet_hdr}"),
            ])
            .args(["-device", "virtio-net-pci,netdev=n,mac=52:54:00:66:00:01"])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        until("QEMU's monitor listens", || {
            UnixStream::connect(&socket).is_ok()
        });
        let stream = UnixStream::connect(&socket).expect("the monitor");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a timeout");
        let mut q = Qemu {
            child,
            qmp: BufReader::new(stream),
            socket,
        };
        q.ask("qmp_capabilities");
        q
    }

    fn ask(&mut self, command: &str) {
        writeln!(self.qmp.get_mut(), "{{\"execute\":\"{command}\"}}").expect("asked");
        let mut line = String::new();
        while !line.starts_with("{\"return\"") {
            line.clear();
            assert!(
                self.qmp.read_line(&mut line).expect("an answer") > 0,
                "QEMU is gone"
            );
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn answered(client: &UdpSocket, within: Duration) -> bool {
    let end = Instant::now() + within;
    client
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("a timeout");
    while Instant::now() < end {
        let _ = client.send(&[0xee; 16]);
        if client.recv(&mut [0; 64]).is_ok() {
            return true;
        }
    }
    false
}

/// A real guest's answers leave epoch by epoch; a stopped guest blocks nobody; the tap outlives
/// gate and QEMU until it is removed.
#[test]
fn a_real_guests_answers_wait_for_their_epoch() {
    if !usable() {
        return;
    }
    let Some(image) = image() else {
        eprintln!("SKIPPED: no guest image (cargo run -p havm-lab -- guest-image)");
        return;
    };
    let lab = Lab::new();
    lab.fix_neighbours();
    let spec = NicSpec {
        guest_tap: "hvg7".into(),
        ..lab.spec()
    };
    let open = || {
        lab.within("H", || {
            Gate::open(&spec, Limits::default()).expect("a gate")
        })
    };
    let gate = open();
    gate.pass(true);
    let mut qemu = Qemu::start(&lab, &image, true);
    let client = lab.within("C", || UdpSocket::bind((CLIENT, 0)).expect("bind"));
    client.connect((GUEST, 7001)).expect("connect");
    assert!(
        answered(&client, Duration::from_secs(60)),
        "the guest does not come up"
    );
    numbers(&client, QUIET);

    gate.hold(STREAM, TERM, EpochNo(1));
    send(&client, 0..20);
    until("20 answers held", || gate.held().frames >= 20);
    qemu.ask("stop");
    gate.barrier(EpochNo(1));
    qemu.ask("cont");
    send(&client, 20..25);
    until("5 more", || gate.held().frames >= 25);
    assert!(
        numbers(&client, QUIET).is_empty(),
        "an answer got out before its ack"
    );
    let ack = |n| {
        AckedEpoch::for_tests(EpochId {
            term: TERM,
            stream: STREAM,
            n: EpochNo(n),
        })
    };
    assert!(gate.release(ack(1)) >= 20);
    assert_eq!(numbers(&client, QUIET), (0..20).collect::<Vec<_>>());
    qemu.ask("stop");
    gate.barrier(EpochNo(2));
    qemu.ask("cont");
    gate.release(ack(2));
    assert_eq!(numbers(&client, QUIET), (20..25).collect::<Vec<_>>());

    // A guest that stands still: what is sent to it is dropped at a bound, and nobody waits.
    gate.pass(true);
    qemu.ask("stop");
    let t = Instant::now();
    send(&client, 0..5000);
    gate.hold(STREAM, TERM, EpochNo(3));
    gate.close();
    assert!(
        t.elapsed() < Duration::from_secs(2),
        "the gate waited for a stopped guest"
    );
    gate.pass(false);
    qemu.ask("cont");
    numbers(&client, QUIET);
    assert!(
        answered(&client, Duration::from_secs(5)),
        "no answer after the guest went on"
    );

    // The replicator restarts under the running guest.
    drop(gate);
    numbers(&client, QUIET);
    assert!(
        !answered(&client, Duration::from_secs(1)),
        "an answer without a gate"
    );
    let gate = open();
    gate.pass(true);
    assert!(gate.announce());
    assert!(
        answered(&client, Duration::from_secs(5)),
        "the new gate does not carry"
    );
    assert!(
        lab.within("H", || remove_guest_tap("hvg7")).is_err(),
        "removed under a running guest"
    );
    drop(qemu);
    drop(gate);
    lab.within("H", || remove_guest_tap("hvg7"))
        .expect("removed");
}

/// Without virtio-net headers it works too, with a guest that is given no offloads.
#[test]
fn a_guest_without_offloads() {
    if !usable() {
        return;
    }
    let Some(image) = image() else {
        eprintln!("SKIPPED: no guest image (cargo run -p havm-lab -- guest-image)");
        return;
    };
    let lab = Lab::new();
    lab.fix_neighbours();
    let spec = NicSpec {
        guest_tap: "hvg7".into(),
        ..lab.spec()
    };
    let limits = Limits {
        vnet_hdr: false,
        ..Limits::default()
    };
    let gate = lab.within("H", || Gate::open(&spec, limits).expect("a gate"));
    assert!(!gate.has_offloads());
    gate.pass(true);
    let _qemu = Qemu::start(&lab, &image, false);
    let client = lab.within("C", || UdpSocket::bind((CLIENT, 0)).expect("bind"));
    client.connect((GUEST, 7001)).expect("connect");
    assert!(answered(&client, Duration::from_secs(60)), "no answer");
    assert_eq!(gate.counters().unusable, 0);
}
