//! Two replicator processes and real QEMUs, driven by orders: sync, protection, comparison, handover with
//! the old primary as standby, and failover. No libvirt and no network here; those are in `tests/e2e`.

use havm_core::ids::{GuestName, LifeId, Term};
use havm_core::order::{Order, PromoteAs, Report, StreamBase};
use havm_core::spec::{Ack, DiskSpec, LinkSpec, SPEC_VERSION, Settings, Spec};
use havm_links::identity::Identity;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DISK_BYTES: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct Ours(Child);

impl Drop for Ours {
    fn drop(&mut self) {
        // By its handle: nobody else's.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Node {
    dir: PathBuf,
    life: LifeId,
    conn: BufReader<UnixStream>,
    qemu: Option<Ours>,
    replicator: Ours,
    seen: Vec<String>,
}

fn connect(path: &Path) -> UnixStream {
    let since = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(c) => return c,
            Err(e) if since.elapsed() > PATIENCE => panic!("{}: {e}", path.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

impl Node {
    fn new(root: &Path, name: &str, id: &Identity, peer: &Identity, number: u8) -> Node {
        let dir = root.join(name);
        std::fs::create_dir_all(dir.join("identity")).unwrap();
        id.save(&dir.join("identity/identity.pem")).unwrap();
        let disk = dir.join("disk.raw");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(DISK_BYTES)
            .unwrap();
        let spec = Spec {
            version: SPEC_VERSION,
            guest: GuestName::try_from("pairtest".to_owned()).unwrap(),
            run_dir: dir.clone(),
            state_dir: dir.clone(),
            identity_dir: dir.join("identity"),
            peer_fingerprint: peer.fingerprint().to_string(),
            links: (1..=2)
                .map(|i| LinkSpec {
                    name: format!("l{i}"),
                    local: [127, 0, i, number].into(),
                    peer: [127, 0, i, 3 - number].into(),
                })
                .collect(),
            port_range: (0, 0),
            disks: vec![DiskSpec {
                path: disk,
                meta_path: dir.join("meta"),
                export: "d0".into(),
                nbd_socket: dir.join("nbd.sock"),
                size_bytes: DISK_BYTES,
            }],
            nics: vec![],
            qmp_socket: dir.join("qmp.sock"),
            qemu_uid: 0,
            qemu_gid: 0,
            machine: "pc-q35-10.0".into(),
            settings: Settings {
                ack: Ack::Memory,
                max_interval_ms: 30,
                ..Settings::default()
            },
        };
        std::fs::write(dir.join("spec.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let replicator = Command::new(env!("CARGO_BIN_EXE_havm-replicator"))
            .arg("--spec")
            .arg(dir.join("spec.json"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let conn = connect(&dir.join("control.sock"));
        conn.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut n = Node {
            dir,
            life: LifeId([number; 16]),
            conn: BufReader::new(conn),
            qemu: None,
            replicator: Ours(replicator),
            seen: Vec::new(),
        };
        n.order(&Order::Status);
        n.wait("state", |r| matches!(r, Report::State(_)));
        n
    }

    fn start_qemu(&mut self, waiting: bool) {
        self.qemu = None;
        let d = &self.dir;
        let _ = std::fs::remove_file(d.join("qmp.sock"));
        let _ = std::fs::remove_file(d.join("ram"));
        let mut c = Command::new("qemu-system-x86_64");
        c.args([
            "-machine",
            "pc-q35-10.0,memory-backend=pc.ram,suppress-vmdesc=on",
        ])
        .args([
            "-cpu",
            "qemu64",
            "-accel",
            "tcg",
            "-m",
            "64",
            "-nodefaults",
            "-S",
        ])
        .args(["-display", "none", "-no-shutdown"])
        .arg("-object")
        .arg(format!(
            "memory-backend-file,id=pc.ram,size=64M,share=on,mem-path={}",
            d.join("ram").display()
        ))
        .arg("-blockdev")
        .arg(format!(
            "driver=nbd,node-name=d0,server.type=unix,server.path={},export=d0,reconnect-delay=10",
            d.join("nbd.sock").display()
        ))
        .args(["-device", "virtio-blk-pci,drive=d0"])
        .arg("-qmp")
        .arg(format!(
            "unix:{},server=on,wait=off",
            d.join("qmp.sock").display()
        ));
        if waiting {
            c.args(["-incoming", "defer"]);
        }
        let log = std::fs::File::create(d.join("qemu.log")).unwrap();
        let child = c
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.qemu = Some(Ours(child.spawn().unwrap()));
        connect(&d.join("qmp.sock"));
    }

    fn order(&mut self, o: &Order) {
        let mut line = serde_json::to_vec(o).unwrap();
        line.push(b'\n');
        self.conn.get_mut().write_all(&line).unwrap();
    }

    #[track_caller]
    fn wait(&mut self, what: &str, mut want: impl FnMut(&Report) -> bool) -> Report {
        let since = Instant::now();
        loop {
            let mut line = String::new();
            let n = self.conn.read_line(&mut line);
            if !matches!(n, Ok(n) if n > 0) || since.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                panic!("no {what} ({n:?}); seen {:#?}; log:\n{log}", self.seen);
            }
            let r: Report = serde_json::from_str(&line).unwrap();
            if !matches!(r, Report::State(_)) {
                self.seen.push(line.trim().to_owned());
            }
            if want(&r) {
                return r;
            }
        }
    }

    /// Writes a pattern to the guest's disk as another NBD client would.
    fn write_disk(&self, offset: u64, byte: u8) {
        let out = Command::new("qemu-io")
            .args(["-f", "raw", "-c", &format!("write -P {byte} {offset} 64k")])
            .arg(format!(
                "nbd+unix:///d0?socket={}",
                self.dir.join("nbd.sock").display()
            ))
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stdout)
        );
    }

    fn disk_byte(&self, offset: u64) -> u8 {
        std::fs::read(self.dir.join("disk.raw")).unwrap()[offset as usize]
    }
}

fn ports(r: Report) -> Vec<SocketAddr> {
    match r {
        Report::Listening { ports, .. } | Report::HandedOver { ports, .. } => ports,
        other => panic!("{other:?} names no ports"),
    }
}

#[track_caller]
fn verify(n: &mut Node, id: u64) {
    n.order(&Order::Verify { id });
    let r = n.wait(
        "verified",
        |r| matches!(r, Report::Verified { id: i, .. } if *i == id),
    );
    match r {
        Report::Verified {
            ram_different: 0,
            disk_different: 0,
            error: None,
            ram_pages,
            disk_blocks,
            ..
        } => {
            assert!(
                ram_pages > 16_000 && disk_blocks == DISK_BYTES / 65536,
                "{ram_pages} {disk_blocks}"
            );
        }
        other => panic!("{other:?}"),
    }
}

/// B receives from A until the guest is protected.
fn protect(a: &mut Node, b: &mut Node, term: Term) {
    b.order(&Order::Receive {
        term,
        my_life: b.life,
        peer_life: Some(a.life),
    });
    let to = ports(b.wait("listening", |r| matches!(r, Report::Listening { .. })));
    b.start_qemu(true);
    b.order(&Order::AttachStandby { life: b.life });
    b.wait("ready", |r| matches!(r, Report::Ready));
    a.order(&Order::StartStream {
        term,
        my_life: a.life,
        peer_life: b.life,
        ports: to,
        base: StreamBase::Unknown,
    });
    a.wait("synced", |r| matches!(r, Report::Synced { .. }));
    a.order(&Order::CloseGate { term });
    a.order(&Order::Arm { term });
    b.wait("an eligible image", |r| {
        matches!(r, Report::EligibleImage { .. })
    });
    b.order(&Order::ConfirmEligible { term });
    a.wait("protected", |r| matches!(r, Report::Protected { .. }));
}

#[test]
fn a_pair_syncs_compares_hands_over_and_fails_over() {
    let root = tempfile::tempdir().unwrap();
    let (ia, ib) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let mut a = Node::new(root.path(), "a", &ia, &ib, 1);
    let mut b = Node::new(root.path(), "b", &ib, &ia, 2);

    a.start_qemu(false);
    a.order(&Order::AttachPrimary { life: a.life });
    a.wait("attached", |r| matches!(r, Report::Attached { .. }));
    a.order(&Order::OpenGate { term: Term(1) });
    a.order(&Order::Run { term: Term(1) });
    a.write_disk(1 << 20, 0xa1);
    protect(&mut a, &mut b, Term(1));
    verify(&mut a, 1);
    a.write_disk(2 << 20, 0xa2);
    verify(&mut a, 2);

    // A stale order is refused.
    b.order(&Order::Seal { term: Term(0) });
    b.wait("refused", |r| matches!(r, Report::Refused { .. }));

    // Handover: B goes on, protected by A's paused RAM.
    a.order(&Order::HandOver { term: Term(1) });
    let r = a.wait("handed over", |r| {
        matches!(r, Report::HandedOver { .. } | Report::HandOverFailed { .. })
    });
    let Report::HandedOver { n, .. } = &r else {
        panic!("{r:?}")
    };
    let n = *n;
    let t = Instant::now();
    let then = PromoteAs::Protected {
        my_life: b.life,
        peer_life: a.life,
        ports: ports(r),
    };
    b.order(&Order::Promote {
        term: Term(2),
        expect: Some(n),
        then,
    });
    b.wait("promoted", |r| matches!(r, Report::Promoted { .. }));
    a.order(&Order::BecomeStandby {
        term: Term(2),
        my_life: a.life,
        peer_life: b.life,
    });
    a.wait("image held", |r| matches!(r, Report::ImageHeld));
    b.wait("protected", |r| matches!(r, Report::Protected { .. }));
    println!("handover to protected: {:?}", t.elapsed());
    a.start_qemu(true);
    a.order(&Order::AttachStandby { life: a.life });
    a.wait("ready", |r| matches!(r, Report::Ready));
    b.write_disk(3 << 20, 0xb3);
    verify(&mut b, 3);

    // Power off B: A goes on.
    b.qemu = None;
    let _ = b.replicator.0.kill();
    a.wait("silence", |r| matches!(r, Report::StreamSilent { .. }));
    a.order(&Order::Seal { term: Term(3) });
    a.wait("sealed", |r| matches!(r, Report::Sealed { n: Some(_) }));
    a.order(&Order::Promote {
        term: Term(3),
        expect: None,
        then: PromoteAs::Solo,
    });
    let r = a.wait("promoted", |r| {
        matches!(r, Report::Promoted { .. } | Report::PromoteFailed { .. })
    });
    println!("{r:?}");
    assert!(matches!(r, Report::Promoted { .. }));
    a.wait("flushed", |r| matches!(r, Report::DiskFlushed { .. }));
    assert_eq!(
        [1 << 20, 2 << 20, 3 << 20].map(|o| a.disk_byte(o)),
        [0xa1, 0xa2, 0xb3]
    );

    // B comes back, blank of memory, and is brought up to date.
    let mut b = Node::new(root.path(), "b2", &ib, &ia, 2);
    protect(&mut a, &mut b, Term(3));
    verify(&mut a, 4);
    assert_eq!(
        [1 << 20, 2 << 20, 3 << 20].map(|o| b.disk_byte(o)),
        [0xa1, 0xa2, 0xb3]
    );
}
