//! The server against clients that no one here wrote (libnbd's tools, qemu-io), and against
//! clients that behave badly. Tests that need a tool say so when it is missing.

use havm_core::ids::{EpochNo, StreamId};
use havm_disk::nbd::{NbdConfig, NbdServer};
use havm_disk::{Disk, DiskConfig};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Served {
    dir: tempfile::TempDir,
    disk: Arc<Disk>,
    server: NbdServer,
}

impl Served {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        let mut cfg = DiskConfig::new(image, dir.path().join("meta"), [1; 16]);
        cfg.segment_bytes = 1 << 20;
        let disk = Disk::create(&cfg, false).unwrap();
        disk.go_solo().unwrap();
        let nbd = NbdConfig::new(dir.path().join("s"), "disk0");
        let server = NbdServer::start(disk.clone(), &nbd).unwrap();
        Served { dir, disk, server }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn uri(&self) -> String {
        format!("nbd+unix:///disk0?socket={}", self.path("s").display())
    }
    fn connect(&self) -> UnixStream {
        let s = UnixStream::connect(self.path("s")).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        s
    }
    /// A client in transmission, through EXPORT_NAME.
    fn client(&self) -> UnixStream {
        let mut s = self.connect();
        let mut hello = [0u8; 18];
        s.read_exact(&mut hello).unwrap();
        s.write_all(&3u32.to_be_bytes()).unwrap();
        s.write_all(b"IHAVEOPT").unwrap();
        s.write_all(&1u32.to_be_bytes()).unwrap();
        s.write_all(&5u32.to_be_bytes()).unwrap();
        s.write_all(b"disk0").unwrap();
        let mut export = [0u8; 10];
        s.read_exact(&mut export).unwrap();
        assert_eq!(export[..8], self.disk.size().to_be_bytes());
        s
    }
    /// It still serves.
    fn alive(&self) {
        let mut s = self.client();
        s.write_all(&request(0, 0, 77, 0, 512)).unwrap();
        let mut reply = [0u8; 16 + 512];
        s.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4]);
    }
}

fn request(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut r = 0x2560_9513u32.to_be_bytes().to_vec();
    r.extend_from_slice(&flags.to_be_bytes());
    r.extend_from_slice(&kind.to_be_bytes());
    r.extend_from_slice(&cookie.to_be_bytes());
    r.extend_from_slice(&offset.to_be_bytes());
    r.extend_from_slice(&len.to_be_bytes());
    r
}

/// A reply without data: its error number.
fn status(s: &mut UnixStream) -> u32 {
    let mut r = [0u8; 16];
    s.read_exact(&mut r).unwrap();
    assert_eq!(r[..4], 0x6744_6698u32.to_be_bytes());
    u32::from_be_bytes([r[4], r[5], r[6], r[7]])
}

fn tool(name: &str, args: &[&str]) -> Option<String> {
    match Command::new("timeout")
        .arg("60")
        .arg(name)
        .args(args)
        .output()
    {
        Ok(o) if o.status.code() == Some(127) => {
            eprintln!("NOT RUN: {name} is not installed");
            None
        }
        Ok(o) => {
            let text = format!(
                "{}{}",
                String::from_utf8_lossy(&o.stdout),
                String::from_utf8_lossy(&o.stderr)
            );
            assert!(o.status.success(), "{name} {args:?}: {text}");
            Some(text)
        }
        Err(e) => panic!("{name}: {e}"),
    }
}

#[test]
fn nbdinfo_sees_the_export() {
    let s = Served::new(8 << 20);
    let Some(text) = tool("nbdinfo", &[&s.uri()]) else {
        return;
    };
    for line in [
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "is_read_only: false",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    let list = format!("nbd+unix:///?socket={}", s.path("s").display());
    assert!(
        tool("nbdinfo", &["--list", &list])
            .unwrap()
            .contains("disk0")
    );
    // Block status: one written block in an empty disk.
    s.disk.write(1 << 20, &mut vec![1; 65536], false).unwrap();
    let map = tool("nbdinfo", &["--map", &s.uri()]).unwrap();
    let lines: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0][..3], ["0", "1048576", "3"]);
    assert_eq!(lines[1][..3], ["1048576", "65536", "0"]);
    assert_eq!(lines[2][2], "3");
}

// The bytes that a copy puts in come out again, over several connections, in and out of epochs.
#[test]
fn nbdcopy_there_and_back() {
    let s = Served::new(24 << 20);
    s.disk
        .begin_tracking(StreamId([1; 16]), EpochNo(1))
        .unwrap();
    let mut data = vec![0u8; 24 << 20];
    let mut x = 1u64;
    for b in &mut data[1 << 20..20 << 20] {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1);
        *b = (x >> 56) as u8;
    }
    std::fs::write(s.path("src"), &data).unwrap();
    let (src, dst) = (s.path("src"), s.path("dst"));
    if tool("nbdcopy", &["--flush", src.to_str().unwrap(), &s.uri()]).is_none() {
        return;
    }
    tool("nbdcopy", &[&s.uri(), dst.to_str().unwrap()]);
    assert!(std::fs::read(&dst).unwrap() == data);
    // And the epoch has exactly those bytes.
    let e = s.disk.barrier().unwrap();
    let mut replica = vec![0u8; data.len()];
    for w in &e.writes {
        match &w.op {
            havm_disk::WriteOp::Data(d) => {
                replica[w.offset as usize..w.end() as usize].copy_from_slice(d);
            }
            havm_disk::WriteOp::Zero(_) => replica[w.offset as usize..w.end() as usize].fill(0),
        }
    }
    assert!(replica == data);
    drop(e);
    assert_eq!(s.disk.held_bytes(), 0);
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    let s = Served::new(8 << 20);
    let uri = s.uri();
    let cmds = [
        "write -P 7 1M 3M",
        "write -P 9 4095 5",
        "read -P 7 1M 3M",
        "read -P 9 4095 5",
        "flush",
        "write -f -P 5 0 512",
        "write -z 2M 64k",
        "write -z -u 2M 64k",
        "read -P 0 2M 64k",
        "discard 3M 128k",
        "read -P 0 3M 128k",
        "read -P 5 0 512",
        "aio_write -P 1 5M 64k",
        "aio_write -P 2 5M 64k",
        "aio_flush",
    ];
    let mut args = vec!["-f", "raw"];
    cmds.iter().for_each(|c| args.extend(["-c", c]));
    args.push(&uri);
    if let Some(text) = tool("qemu-io", &args) {
        assert!(
            !text.contains("verification failed") && !text.contains("error"),
            "{text}"
        );
    }
}

#[test]
fn standby_refuses_writes_and_serves_reads() {
    let s = Served::new(1 << 20);
    s.disk.become_standby().unwrap();
    let mut c = s.client();
    let mut w = request(0, 1, 1, 0, 512);
    w.extend_from_slice(&[1; 512]);
    for (r, want) in [
        (w.clone(), libc::EPERM as u32),
        (request(0, 4, 2, 0, 512), libc::EPERM as u32),
        (request(0, 6, 3, 0, 512), libc::EPERM as u32),
        (request(0, 3, 4, 0, 0), 0),
    ] {
        c.write_all(&r).unwrap();
        assert_eq!(status(&mut c), want);
    }
    s.alive();
    s.disk.promote().unwrap();
    c.write_all(&w).unwrap();
    assert_eq!(status(&mut c), 0);
}

// A bad request gets an error and the connection goes on, as long as the stream is in step.
#[test]
fn bad_requests_are_answered() {
    let s = Served::new(1 << 20);
    let mut c = s.client();
    let einval = libc::EINVAL as u32;
    for (r, want) in [
        (request(0, 0, 1, (1 << 20) - 100, 512), einval), // past the end
        (request(0, 0, 1, u64::MAX - 10, 512), einval),
        (request(0, 0, 2, 0, u32::MAX), einval), // over 32 MiB
        (request(0, 4, 3, u64::MAX, u32::MAX), einval),
        (request(0, 6, 4, 1 << 20, 1), einval),
        (request(0, 99, 5, 0, 0), einval),     // unknown command
        (request(0xfff0, 3, 6, 0, 0), einval), // unknown flags
        (request(0, 7, 7, 0, 512), einval),    // block status without a context
        (request(0, 4, 8, 512, 0), 0),
        (request(0, 3, 9, 0, 0), 0),
    ] {
        c.write_all(&r).unwrap();
        assert_eq!(status(&mut c), want, "{r:?}");
    }
    let mut w = request(0, 1, 1, 1 << 20, 512);
    w.extend_from_slice(&[1; 512]);
    c.write_all(&w).unwrap();
    assert_eq!(status(&mut c), einval, "its data was taken off the stream");
    c.write_all(&request(0, 3, 9, 0, 0)).unwrap();
    assert_eq!(status(&mut c), 0);
}

// Nonsense in every phase ends that connection, within bounds, and no other.
#[test]
fn garbage_is_hung_up_on() {
    let s = Served::new(1 << 20);
    let mut x = 7u64;
    for round in 0..200usize {
        let mut c = if round % 2 == 0 {
            s.connect()
        } else {
            s.client()
        };
        let junk: Vec<u8> = (0..round * 3 + 1)
            .map(|_| {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1);
                (x >> 56) as u8
            })
            .collect();
        let _ = c.write_all(&junk);
        if round % 4 < 2 {
            let _ = c.shutdown(std::net::Shutdown::Write);
            let mut rest = Vec::new();
            let _ = c.read_to_end(&mut rest);
            assert!(rest.len() < 1 << 20);
        }
    }
    s.alive();
    // A write that announces far too much.
    let mut c = s.client();
    c.write_all(&request(0, 1, 1, 0, u32::MAX)).unwrap();
    assert_eq!(c.read(&mut [0; 16]).unwrap(), 0);
    s.alive();
}

// The client dies in the middle of sending a write, and in the middle of reading a reply.
#[test]
fn disconnect_in_the_middle() {
    let s = Served::new(64 << 20);
    let mut c = s.client();
    let mut w = request(0, 1, 1, 0, 1 << 20);
    w.extend_from_slice(&vec![9; 1000]);
    c.write_all(&w).unwrap();
    drop(c);
    for _ in 0..8 {
        let mut c = s.client();
        for i in 0..8 {
            c.write_all(&request(0, 0, i, 0, 32 << 20)).unwrap();
        }
        let mut some = [0u8; 1000];
        c.read_exact(&mut some).unwrap();
    }
    s.alive();
    let t = Instant::now();
    while s.server.connections() > 0 {
        assert!(
            t.elapsed() < Duration::from_secs(5),
            "connections are left over"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut first = [0u8; 1000];
    s.disk.read(0, &mut first).unwrap();
    assert_eq!(first, [0; 1000], "half a write was not written");
}

// Many clients, each with its own region and one shared with all: no answer is mixed up.
#[test]
fn many_clients() {
    let s = Served::new(16 << 20);
    std::thread::scope(|scope| {
        for t in 0..12u64 {
            let s = &s;
            scope.spawn(move || {
                let mut c = s.client();
                for i in 0..40u64 {
                    let at = t * (1 << 20) + i * 4096;
                    let mut w = request(0, 1, i, at, 4096);
                    w.extend_from_slice(&[(t * 40 + i) as u8; 4096]);
                    w.extend(request(0, 1, i, 15 << 20, 4096));
                    w.extend_from_slice(&[t as u8; 4096]);
                    w.extend(request(0, 0, 1000 + i, at, 4096));
                    c.write_all(&w[..2 * (28 + 4096)]).unwrap();
                    assert_eq!((status(&mut c), status(&mut c)), (0, 0));
                    c.write_all(&w[2 * (28 + 4096)..]).unwrap();
                    let mut r = [0u8; 16 + 4096];
                    c.read_exact(&mut r).unwrap();
                    assert_eq!(r[8..16], (1000 + i).to_be_bytes());
                    assert_eq!(r[16..], [(t * 40 + i) as u8; 4096]);
                }
            });
        }
    });
    // The shared block is one writer's, whole: overlapping writes are not mixed.
    let mut b = [0u8; 4096];
    s.disk.read(15 << 20, &mut b).unwrap();
    assert!(b.iter().all(|x| *x == b[0]));
}

#[test]
fn the_socket_is_private_and_replaced() {
    let s = Served::new(1 << 20);
    let m = std::fs::metadata(s.path("s")).unwrap();
    assert_eq!(m.permissions().mode() & 0o777, 0o600);
    // A second server takes the name over; the end of the first does not take it away.
    let mut cfg = NbdConfig::new(s.path("s"), "disk0");
    if nix::unistd::geteuid().is_root() {
        cfg.owner = Some((12345, 23456));
    } else {
        eprintln!("NOT RUN: giving the socket away needs root");
    }
    let second = NbdServer::start(s.disk.clone(), &cfg).unwrap();
    if cfg.owner.is_some() {
        let m = std::fs::metadata(s.path("s")).unwrap();
        assert_eq!((m.uid(), m.gid()), (12345, 23456));
    }
    let Served { dir, disk, server } = s;
    drop(server);
    assert!(UnixStream::connect(dir.path().join("s")).is_ok());
    drop(second);
    assert!(!dir.path().join("s").exists());
    drop(disk);
}
