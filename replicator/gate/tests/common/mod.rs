//! Namespaces for the gate's tests and bench: a guest, a host with a bridge, a client.
//!
//! ```text
//!   G: eth0 10.66.0.1 ── veth ── H: hvg0 [gate] hvb0 ── br0 10.66.0.3 ── veth ── C: eth0 10.66.0.2
//!                                            P: eth0 10.66.0.4 (no gate) ──┘
//! ```
//!
//! A veth stands for the guest's tap: its other end emits unsegmented frames, as a guest does.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod raw;

use havm_gate::{Gate, Limits, NicSpec};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::net::{TcpStream, UdpSocket};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The guest's address, and the others'.
pub const GUEST: &str = "10.66.0.1";
pub const CLIENT: &str = "10.66.0.2";
pub const HOST: &str = "10.66.0.3";
pub const PLAIN: &str = "10.66.0.4";
const MACS: [(&str, &str); 4] = [
    (GUEST, "52:54:00:66:00:01"),
    (CLIENT, "52:54:00:66:00:02"),
    (HOST, "52:54:00:66:00:03"),
    (PLAIN, "52:54:00:66:00:04"),
];

/// The namespaces; dropping removes them and all within.
pub struct Lab {
    tag: String,
}

/// Whether these tests can run at all; says so where not.
pub fn usable() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root (network namespaces)");
    }
    root
}

/// Runs a command; panics with its output where it fails.
pub fn run(words: &str) -> String {
    let out = output(words);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{words}: {}{text}",
        String::from_utf8_lossy(&out.stderr)
    );
    text
}

pub fn output(words: &str) -> Output {
    let mut w = words.split_whitespace();
    Command::new(w.next().expect("a command"))
        .args(w)
        .output()
        .expect("it starts")
}

impl Lab {
    pub fn new() -> Lab {
        static N: AtomicU32 = AtomicU32::new(0);
        sweep();
        let tag = format!(
            "gate{}-{}",
            std::process::id(),
            N.fetch_add(1, Ordering::Relaxed)
        );
        let lab = Lab { tag };
        for n in ["G", "H", "C", "P"] {
            run(&format!("ip netns add {}", lab.ns(n)));
            lab.ip(n, "link set lo up");
        }
        let [g, h, c, p] = ["G", "H", "C", "P"].map(|n| lab.ns(n));
        run(&format!(
            "ip link add eth0 netns {g} type veth peer name hvg0 netns {h}"
        ));
        run(&format!(
            "ip link add eth0 netns {c} type veth peer name up0 netns {h}"
        ));
        run(&format!(
            "ip link add eth0 netns {p} type veth peer name plain0 netns {h}"
        ));
        lab.ip(
            "H",
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        );
        for port in ["up0", "plain0"] {
            lab.ip("H", &format!("link set {port} master br0 up"));
        }
        let ends = [("G", "eth0"), ("C", "eth0"), ("H", "br0"), ("P", "eth0")];
        for ((n, dev), (ip, mac)) in ends.into_iter().zip(MACS) {
            lab.exec(
                n,
                "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
            );
            lab.ip(n, &format!("link set {dev} address {mac} up"));
            lab.ip(n, &format!("addr add {ip}/24 dev {dev}"));
        }
        lab.ip("H", "link set hvg0 up");
        // The kernel tells a link's queues of a new carrier a moment later; until then frames are lost.
        for n in ["G", "C", "P"] {
            until("the link is up", || {
                lab.ip(n, "link show eth0").contains("state UP")
            });
        }
        lab
    }

    /// Fixed neighbours, so that no ARP is among the frames that a test counts.
    pub fn fix_neighbours(&self) {
        for (n, dev) in [("G", "eth0"), ("C", "eth0")] {
            for (ip, mac) in [MACS[0], MACS[1]] {
                let _ = output(&format!(
                    "ip -n {} neigh replace {ip} lladdr {mac} dev {dev} nud permanent",
                    self.ns(n)
                ));
            }
        }
    }

    pub fn ns(&self, n: &str) -> String {
        format!("{}-{n}", self.tag)
    }

    pub fn ip(&self, n: &str, words: &str) -> String {
        run(&format!("ip -n {} {words}", self.ns(n)))
    }

    pub fn exec(&self, n: &str, words: &str) -> String {
        run(&format!("ip netns exec {} {words}", self.ns(n)))
    }

    /// Runs `f` in a namespace, on a thread of its own. Sockets made there stay there.
    pub fn within<T: Send>(&self, n: &str, f: impl FnOnce() -> T + Send) -> T {
        let ns = File::open(format!("/run/netns/{}", self.ns(n))).expect("the namespace is there");
        std::thread::scope(|s| {
            s.spawn(|| {
                setns(&ns, CloneFlags::CLONE_NEWNET).expect("root may enter it");
                f()
            })
            .join()
            .expect("no panic inside")
        })
    }

    /// Whether anything answers there within 0.7 s: a refused connection is an answer.
    pub fn reaches(&self, n: &str, ip: &str) -> bool {
        let to = std::net::SocketAddr::new(ip.parse().expect("an address"), 9);
        self.within(n, || {
            match TcpStream::connect_timeout(&to, Duration::from_millis(700)) {
                Ok(_) => true,
                Err(e) => e.kind() == std::io::ErrorKind::ConnectionRefused,
            }
        })
    }

    pub fn spec(&self) -> NicSpec {
        NicSpec {
            guest_tap: "hvg0".into(),
            bridge_tap: "hvb0".into(),
            bridge: "br0".into(),
            mac: [0x52, 0x54, 0, 0x66, 0, 1],
            owner_uid: None,
            mtu: 1500,
        }
    }

    pub fn gate(&self, limits: Limits) -> Gate {
        self.within("H", || Gate::open(&self.spec(), limits).expect("a gate"))
    }

    /// A UDP socket in a namespace, bound and connected.
    pub fn udp(&self, n: &str, me: &str, peer: &str) -> UdpSocket {
        let s = self.within(n, || UdpSocket::bind((me, 7000)).expect("bind"));
        s.connect((peer, 7000)).expect("connect");
        s
    }
}

/// Removes what a killed run left behind.
fn sweep() {
    for entry in std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("gate").and_then(|n| n.split('-').next());
        let dead = pid.is_some_and(|p| {
            p.parse::<u32>().is_ok() && !std::path::Path::new("/proc").join(p).exists()
        });
        if dead {
            let _ = output(&format!("ip netns del {name}"));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for n in ["G", "H", "C", "P"] {
            let _ = output(&format!("ip netns del {}", self.ns(n)));
        }
    }
}

/// The numbers that came within `quiet` of each other.
pub fn numbers(s: &UdpSocket, quiet: Duration) -> Vec<u32> {
    s.set_read_timeout(Some(quiet)).expect("a timeout");
    let mut got = Vec::new();
    let mut buf = [0u8; 2048];
    while let Ok(n) = s.recv(&mut buf) {
        assert!(n >= 4);
        got.push(u32::from_le_bytes([buf[0], buf[1], buf[2], buf[3]]));
    }
    got
}

pub fn send(s: &UdpSocket, range: std::ops::Range<u32>) {
    for i in range {
        let mut frame = [0u8; 200];
        frame[..4].copy_from_slice(&i.to_le_bytes());
        s.send(&frame).expect("send");
    }
}

/// Waits until `f` holds.
pub fn until(what: &str, f: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !f() {
        assert!(Instant::now() < end, "not within 5 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
