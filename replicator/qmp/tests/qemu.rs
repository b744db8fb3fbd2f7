//! The client against a real QEMU: commands, events, descriptors, and QEMU's end.
//! Needs `qemu-system-x86_64`; fails without it, as the product does.

use havm_qmp::{EventKind, Qmp, QmpError};
use serde_json::{Value, json};
use std::io::{Read, Seek};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Qemu {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn qemu(machine: &[&str]) -> (Qemu, Qmp) {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("qmp");
    let child = Command::new("qemu-system-x86_64")
        .args(machine)
        .args([
            "-accel",
            "tcg",
            "-S",
            "-display",
            "none",
            "-nodefaults",
            "-qmp",
        ])
        .arg(format!("unix:{},server=on,wait=off", path.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64 starts");
    let q = Qemu { child, dir };
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match Qmp::connect(&path, Duration::from_secs(5)) {
            Ok(qmp) => return (q, qmp),
            Err(e) if Instant::now() > end => panic!("no monitor: {e}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[test]
fn commands_events_and_the_end() {
    let (mut guest, mut q) = qemu(&["-M", "q35", "-m", "64"]);
    assert_eq!(q.peer_pid(), guest.child.id());
    assert!(q.version().major >= 7, "{:?}", q.version());
    assert_eq!(q.run_state().expect("status"), (false, "prelaunch".into()));
    q.cont().expect("cont");
    assert!(q.run_state().expect("status").0);
    q.stop().expect("stop");
    let at = q.reply_seq();
    let kinds: Vec<_> = q
        .take_events()
        .filter(|e| e.seq < at)
        .map(|e| e.kind)
        .collect();
    assert_eq!(kinds, [EventKind::Resume, EventKind::Stop]);
    let text = q.human("info ramblock").expect("human");
    assert!(text.contains("pc.ram") && !text.contains('\r'), "{text}");

    let e = q
        .execute("no-such-command", Value::Null)
        .expect_err("refused");
    assert!(e.is_unknown_command(), "{e}");
    let e = q.execute("cont", json!({"bogus": 1})).expect_err("refused");
    assert!(
        matches!(e, QmpError::Command { ref class, .. } if class == "GenericError"),
        "{e}"
    );

    q.execute("system_reset", Value::Null).expect("reset");
    let event = q
        .wait_event(Duration::from_secs(5))
        .expect("ok")
        .expect("an event");
    assert!(
        matches!(event.kind, EventKind::Reset { guest: false, .. }),
        "{event:?}"
    );

    guest.child.kill().expect("kill");
    guest.child.wait().expect("wait");
    assert!(q.stop().expect_err("gone").is_closed());
    assert!(q.poll_events().expect_err("gone").is_closed());
}

#[test]
fn a_descriptor_reaches_qemu_and_quit_is_seen() {
    let (mut guest, mut q) = qemu(&["-M", "q35", "-m", "64"]);
    let mut file = tempfile::tempfile().expect("tempfile");
    q.send_fd("one", &file).expect("getfd");
    // A migration to a file by descriptor shows that QEMU got the right one.
    q.execute("migrate", json!({"uri": "fd:one"}))
        .expect("migrate");
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let v = q
            .execute("query-migrate", Value::Null)
            .expect("query-migrate");
        match v["status"].as_str() {
            Some("completed") => break,
            Some("failed") => panic!("{v}"),
            _ => assert!(Instant::now() < end, "{v}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut magic = [0; 4];
    file.rewind().expect("rewind");
    file.read_exact(&mut magic)
        .expect("the stream is in the file");
    assert_eq!(&magic, b"QEVM");

    let set = q.add_fd(&file, "havm").expect("add-fd");
    let sets = q
        .execute("query-fdsets", Value::Null)
        .expect("query-fdsets");
    assert_eq!(sets[0]["fdset-id"], set);
    assert_eq!(sets[0]["fds"][0]["opaque"], "havm");
    q.remove_fd(set).expect("remove-fd");

    q.execute("quit", Value::Null).expect("quit");
    let mut seen = false;
    loop {
        match q.wait_event(Duration::from_secs(10)) {
            Ok(Some(e)) => {
                seen |= matches!(e.kind, EventKind::Shutdown { guest: false, ref reason } if reason == "host-qmp-quit");
            }
            Ok(None) => panic!("QEMU did not end"),
            Err(e) => {
                assert!(e.is_closed(), "{e}");
                break;
            }
        }
    }
    assert!(seen, "the shutdown event came before the end");
    guest.child.wait().expect("wait");
    assert!(guest.dir.path().exists());
}

#[test]
fn a_machine_without_ram_is_fine_too() {
    let (guest, mut q) = qemu(&["-M", "none"]);
    q.cont().expect("cont");
    q.stop().expect("stop");
    assert_eq!(q.peer_pid(), guest.child.id());
}
