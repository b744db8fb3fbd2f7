//! Protects the client from whatever listens on a monitor socket: no panic, no hang, no unbounded
//! memory, and the right kind of error.

use havm_qmp::{EventKind, MAX_EVENTS, Qmp, QmpError};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "capabilities": []}}"#;

struct Fake {
    path: PathBuf,
    _dir: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn fake(serve: impl FnOnce(UnixStream) + Send + 'static) -> Fake {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).expect("bind");
    let thread = std::thread::spawn(move || serve(listener.accept().expect("accept").0));
    Fake {
        path,
        _dir: dir,
        thread: Some(thread),
    }
}

/// Greets, answers qmp_capabilities, then answers each further command with the lines given.
fn greet_and(mut s: UnixStream, mut answer: impl FnMut(u64, &str) -> Option<String>) {
    writeln!(s, "{GREETING}").expect("greeting");
    let mut lines = BufReader::new(s.try_clone().expect("clone")).lines();
    while let Some(Ok(line)) = lines.next() {
        let v: Value = serde_json::from_str(&line).expect("the client sends JSON");
        let id = v["id"].as_u64().expect("the client sends ids");
        let cmd = v["execute"].as_str().expect("command");
        let reply = match cmd {
            "qmp_capabilities" => Some(format!("{{\"return\": {{}}, \"id\": {id}}}\n")),
            _ => answer(id, cmd),
        };
        match reply {
            Some(text) => {
                if s.write_all(text.as_bytes()).is_err() {
                    return;
                }
            }
            None => return,
        }
    }
}

fn connect(f: &Fake) -> Result<Qmp, QmpError> {
    Qmp::connect(&f.path, Duration::from_secs(2))
}

#[test]
fn garbage_greetings_are_protocol_errors() {
    for text in [
        &b"hello\n"[..],
        b"{}\n",
        b"[1,2]\n",
        b"\xff\xfe\n",
        b"{\"QMP\": 7}\n",
        b"\n",
        b"\0\n",
    ] {
        let f = fake(move |mut s| {
            let _ = s.write_all(text);
            let _ = s.shutdown(std::net::Shutdown::Write);
        });
        let e = connect(&f).err().expect("must fail");
        assert!(matches!(e, QmpError::Protocol { .. }), "{text:?}: {e}");
    }
}

#[test]
fn a_silent_listener_times_out_and_a_hang_up_is_closed() {
    let f = fake(|s| {
        std::thread::sleep(Duration::from_millis(400));
        drop(s);
    });
    let start = Instant::now();
    let e = Qmp::connect(&f.path, Duration::from_millis(100))
        .err()
        .expect("must fail");
    assert!(matches!(e, QmpError::Timeout { .. }), "{e}");
    assert!(start.elapsed() < Duration::from_millis(350));
    let f = fake(drop);
    let e = connect(&f).err().expect("must fail");
    assert!(e.is_closed(), "{e}");
}

#[test]
fn an_endless_line_ends_in_an_error_not_in_memory() {
    let f = fake(|mut s| {
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..64 {
            if s.write_all(&chunk).is_err() {
                return;
            }
        }
    });
    let e = Qmp::connect(&f.path, Duration::from_secs(10))
        .err()
        .expect("must fail");
    assert!(matches!(e, QmpError::Protocol { .. }), "{e}");
}

#[test]
fn a_reply_after_its_deadline_does_not_answer_the_next_command() {
    let f = fake(|s| {
        greet_and(s, |id, cmd| {
            if cmd == "slow" {
                std::thread::sleep(Duration::from_millis(150));
            }
            Some(format!(
                "{{\"return\": {{\"cmd\": \"{cmd}\"}}, \"id\": {id}}}\n"
            ))
        })
    });
    let mut q = connect(&f).expect("connect");
    let e = q
        .execute_within("slow", Value::Null, Duration::from_millis(30))
        .expect_err("late");
    assert!(matches!(e, QmpError::Timeout { .. }), "{e}");
    let v = q
        .execute("quick", Value::Null)
        .expect("the connection stays usable");
    assert_eq!(v["cmd"], "quick");
}

#[test]
fn events_keep_their_place_between_replies() {
    let f = fake(|s| {
        greet_and(s, |id, _| {
            Some(format!(
                "{{\"event\": \"STOP\", \"timestamp\": {{\"seconds\": 1, \"microseconds\": 2}}}}\n\
                 {{\"return\": {{}}, \"id\": {id}}}\n\
                 {{\"event\": \"SHUTDOWN\", \"data\": {{\"guest\": true, \"reason\": \"guest-shutdown\"}}}}\n"
            ))
        })
    });
    let mut q = connect(&f).expect("connect");
    q.stop().expect("stop");
    let at = q.reply_seq();
    let event = q
        .wait_event(Duration::from_secs(1))
        .expect("no error")
        .expect("an event");
    assert_eq!((event.kind, event.at_us), (EventKind::Stop, 1_000_002));
    assert!(event.seq < at, "STOP came before the reply");
    let event = q
        .wait_event(Duration::from_secs(1))
        .expect("no error")
        .expect("an event");
    assert_eq!(
        event.kind,
        EventKind::Shutdown {
            guest: true,
            reason: "guest-shutdown".into()
        }
    );
    assert!(event.seq > at, "SHUTDOWN came after the reply");
}

#[test]
fn submitted_commands_may_be_awaited_in_any_order() {
    let f = fake(|s| {
        greet_and(s, |id, cmd| {
            Some(format!("{{\"return\": \"{cmd}\", \"id\": {id}}}\n"))
        })
    });
    let mut q = connect(&f).expect("connect");
    let a = q.submit("a", &Value::Null).expect("a");
    let b = q.submit("b", &Value::Null).expect("b");
    assert_eq!(q.wait(b).expect("b"), "b");
    assert_eq!(q.wait(a).expect("a"), "a");
}

#[test]
fn a_storm_of_events_is_bounded_and_counted() {
    let n = MAX_EVENTS + 100;
    let f = fake(move |s| {
        greet_and(s, move |id, _| {
            let mut text = "{\"event\": \"RTC_CHANGE\", \"data\": {\"offset\": 1}}\n".repeat(n);
            text.push_str(&format!("{{\"return\": {{}}, \"id\": {id}}}\n"));
            Some(text)
        })
    });
    let mut q = connect(&f).expect("connect");
    q.execute("storm", Value::Null)
        .expect("the reply behind the storm");
    assert_eq!(q.lost_events(), 100);
    assert_eq!(q.take_events().count(), MAX_EVENTS);
}

#[test]
fn garbage_in_place_of_a_reply_breaks_the_connection_for_good() {
    for text in [
        "nonsense\n",
        "{\"neither\": 1}\n",
        "{\"event\": 5}\n",
        "[]\n",
    ] {
        let f = fake(move |s| greet_and(s, move |_, _| Some(text.to_owned())));
        let mut q = connect(&f).expect("connect");
        let e = q.stop().expect_err("garbage");
        assert!(matches!(e, QmpError::Protocol { .. }), "{text}: {e}");
        let e = q.cont().expect_err("still broken");
        assert!(matches!(e, QmpError::Protocol { .. }), "{text}: {e}");
    }
}
