//! A replicator that replicates nothing: for tests of how the daemon finds, starts, orders and
//! loses one (`tests/replicators.rs`). It keeps to the real one's outside: spec file, pid file,
//! control socket, JSON lines. It writes every order it gets to `orders.log`; `Detach` makes it
//! die as if it had crashed.

use havm_core::ids::{EpochNo, Term};
use havm_core::order::{CONTROL_VERSION, Counters, Mode, Order, ReplicaState, Report};
use havm_core::spec::{PidFile, Spec};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

fn state(term: Term) -> ReplicaState {
    ReplicaState {
        version: CONTROL_VERSION,
        mode: Mode::Idle,
        term,
        life: None,
        stream: None,
        acked: EpochNo(0),
        closed: EpochNo(0),
        running: false,
        stream_alive: false,
        ports: vec![],
        ram_bytes: 0,
        vcpus: 0,
        disk_bytes: 0,
        sync: None,
        counters: Counters::default(),
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    assert_eq!(args[1], "--spec");
    let spec: Spec =
        serde_json::from_slice(&std::fs::read(&args[2]).expect("spec")).expect("a spec");
    let run: PathBuf = spec.run_dir;
    let stat = std::fs::read_to_string("/proc/self/stat").expect("stat");
    let rest = &stat[stat.rfind(')').expect("name") + 1..];
    let start_ticks = rest
        .split_whitespace()
        .nth(19)
        .expect("field")
        .parse()
        .expect("number");
    let pid = PidFile {
        pid: std::process::id() as i32,
        start_ticks,
    };
    let tmp = run.join("pid.tmp");
    std::fs::write(&tmp, serde_json::to_vec(&pid).expect("json")).expect("pid file");
    std::fs::rename(tmp, Spec::pid_file(&run)).expect("renamed");
    let listener = UnixListener::bind(Spec::control_socket(&run)).expect("bind");
    // Orphaned by a failed test, it must not stay for ever.
    std::thread::spawn(|| {
        std::thread::sleep(std::time::Duration::from_secs(60));
        std::process::exit(3);
    });
    let mut term = Term(0);
    let mut log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(run.join("orders.log"))
        .expect("log");
    for stream in listener.incoming() {
        let mut out = stream.expect("stream");
        let input = BufReader::new(out.try_clone().expect("clone"));
        for line in input.lines().map_while(Result::ok) {
            writeln!(log, "{line}").expect("logged");
            let answer = match serde_json::from_str(&line).expect("an order") {
                Order::Status => Report::State(state(term)),
                Order::OpenGate { term: t } => {
                    term = t;
                    Report::Attached {
                        life: havm_core::ids::LifeId([1; 16]),
                    }
                }
                Order::Detach => {
                    let last = serde_json::to_string(&Report::Detached).expect("json");
                    let _ = writeln!(out, "{last}");
                    std::process::exit(1)
                }
                Order::Quit => std::process::exit(0),
                other => Report::Refused {
                    order: format!("{other:?}"),
                    why: "fake".into(),
                },
            };
            let text = serde_json::to_string(&answer).expect("json");
            if writeln!(out, "{text}").is_err() {
                break;
            }
        }
    }
}
