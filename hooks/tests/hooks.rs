//! Hooks that behave badly: none of them may hold up the daemon, another guest, or the end of the
//! runner, and none may leave a process behind.

use havm_hooks::{Ending, Limits, Outcome, Runner};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

type Seen = Arc<Mutex<Vec<Outcome>>>;

fn hook(dir: &TempDir, name: &str, script: &str) {
    let path = dir.path().join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
}

fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits {
        deadline: ms(5000),
        grace: ms(200),
        ..Limits::default()
    }
}

fn runner(dir: &TempDir, limits: Limits) -> (Runner, Seen) {
    let seen = Seen::default();
    let also = seen.clone();
    let r = Runner::with_observer(dir.path(), limits, move |o| {
        also.lock().unwrap().push(o.clone())
    });
    (r.expect("a runner"), seen)
}

fn alive(pid: &str) -> bool {
    Path::new("/proc").join(pid).join("stat").exists()
        && !fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") Z "))
}

/// A hook sees the event, its name and its guest; its exit code and output are known afterwards;
/// hooks run in the order of their names.
#[test]
fn a_hook_is_told_everything_and_its_end_is_known() {
    let dir = tempfile::tempdir().expect("a folder");
    hook(
        &dir,
        "10-first",
        r#"printf '%s %s ' "$HAVM_EVENT" "$HAVM_GUEST"; cat; pwd"#,
    );
    hook(&dir, "20-second", "echo oops >&2; exit 7");
    hook(&dir, "30-third", "kill -9 $$");
    let broken = dir.path().join("40-fourth");
    fs::write(&broken, "not a program").expect("written");
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).expect("mode");
    let (r, seen) = runner(&dir, limits());
    assert!(r.fire("failover", Some("web"), &json!({"term": 3})));
    assert!(r.finish(Duration::from_secs(10)));
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0].ending, Ending::Exit(0));
    assert_eq!(seen[0].output, "failover web {\"term\":3}/");
    assert_eq!(
        (&seen[1].ending, seen[1].output.as_str()),
        (&Ending::Exit(7), "oops")
    );
    assert_eq!(seen[2].ending, Ending::Signal(9));
    assert!(
        matches!(&seen[3].ending, Ending::NotStarted(_)),
        "{:?}",
        seen[3]
    );
    let c = r.counters();
    assert_eq!(
        (c.fired, c.run, c.failed, c.timed_out, c.dropped),
        (1, 4, 3, 0, 0)
    );
}

/// A hook that neither ends nor heeds TERM is killed with its children; the next hook runs.
#[test]
fn a_hanging_hook_and_its_children_are_killed() {
    let dir = tempfile::tempdir().expect("a folder");
    let pids = dir.path().join(".pids");
    let note = format!("echo $$ >> {}", pids.display());
    let body = format!(
        "trap '' TERM\n{note}\n(trap '' TERM; exec sleep 60) & echo $! >> {}\nwhile :; do sleep 60; done",
        pids.display()
    );
    hook(&dir, "10-hangs", &body);
    hook(&dir, "20-next", "echo fine");
    let limits = Limits {
        deadline: Duration::from_millis(400),
        ..limits()
    };
    let (r, seen) = runner(&dir, limits);
    let t = Instant::now();
    r.fire("protected", Some("a"), &Value::Null);
    assert!(t.elapsed() < Duration::from_millis(100), "fire blocked");
    assert!(r.finish(Duration::from_secs(10)));
    assert!(t.elapsed() < Duration::from_secs(3));
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0].ending, Ending::TimedOut);
    assert_eq!(
        (&seen[1].ending, seen[1].output.as_str()),
        (&Ending::Exit(0), "fine")
    );
    let pids = fs::read_to_string(pids).expect("it noted them");
    assert_eq!(pids.lines().count(), 2);
    assert!(!pids.lines().any(alive), "left behind: {pids}");
}

/// A hook that heeds TERM is not killed the hard way.
#[test]
fn term_comes_first() {
    let dir = tempfile::tempdir().expect("a folder");
    hook(&dir, "a", "trap 'echo tidy; exit 0' TERM\nsleep 60 & wait");
    let limits = Limits {
        deadline: Duration::from_millis(300),
        grace: Duration::from_secs(5),
        ..limits()
    };
    let (r, seen) = runner(&dir, limits);
    r.fire("protected", None, &Value::Null);
    assert!(r.finish(Duration::from_secs(4)));
    let seen = seen.lock().unwrap();
    assert_eq!(
        (&seen[0].ending, seen[0].output.as_str()),
        (&Ending::TimedOut, "tidy")
    );
}

/// A hook that forks without end and returns is swept away with all it forked, though they hold
/// its output open.
#[test]
fn what_a_hook_leaves_in_its_group_is_killed() {
    let dir = tempfile::tempdir().expect("a folder");
    let pids = dir.path().join(".pids");
    let p = pids.display();
    hook(
        &dir,
        "a",
        &format!(
            "breed() {{ for i in 1 2 3 4 5; do (echo $(exec sh -c 'echo $PPID') >> {p}; while :; do sleep 30 & wait; done) & done; }}\nbreed; breed; sleep 0.3; echo done"
        ),
    );
    let (r, seen) = runner(&dir, limits());
    let t = Instant::now();
    r.fire("solo", Some("a"), &Value::Null);
    assert!(r.finish(Duration::from_secs(4)));
    assert!(
        t.elapsed() < Duration::from_secs(4),
        "their hold on the pipe held us up"
    );
    assert_eq!(seen.lock().unwrap()[0].ending, Ending::Exit(0));
    let pids = fs::read_to_string(pids).expect("they noted themselves");
    assert!(pids.lines().count() >= 10, "{pids}");
    std::thread::sleep(Duration::from_millis(100));
    assert!(!pids.lines().any(alive), "left behind: {pids}");
}

/// Garbage without end is read, bounded, made printable, and does not outlast the deadline; a big
/// event that nobody reads holds nobody up.
#[test]
fn a_flood_of_garbage_is_bounded() {
    let dir = tempfile::tempdir().expect("a folder");
    hook(&dir, "a", "cat /dev/urandom");
    let limits = Limits {
        deadline: Duration::from_millis(300),
        output_bytes: 1000,
        ..limits()
    };
    let (r, seen) = runner(&dir, limits);
    assert!(r.fire("solo", None, &json!("x".repeat(200_000))));
    assert!(
        !r.fire("solo", None, &json!("x".repeat(300_000))),
        "an event above the bound"
    );
    assert!(r.finish(Duration::from_secs(5)));
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0].ending, Ending::TimedOut);
    assert!(seen[0].output.len() < 8000 && seen[0].output.contains("bytes more"));
    assert!(
        !seen[0]
            .output
            .chars()
            .any(|c| c.is_control() && c != '\n' && c != '\t')
    );
}

/// A guest's events come in order; another guest's do not wait for them; what does not fit the
/// queue is dropped and counted, and the caller is never held up.
#[test]
fn in_order_for_a_guest_side_by_side_for_others_and_bounded() {
    let dir = tempfile::tempdir().expect("a folder");
    hook(&dir, "a", r#"[ "$HAVM_GUEST" = slow ] && sleep 0.15; cat"#);
    let (r, seen) = runner(
        &dir,
        Limits {
            queued_events: 20,
            ..limits()
        },
    );
    let t = Instant::now();
    let slow = (0..100)
        .filter(|i| r.fire("solo", Some("slow"), &json!(i)))
        .count();
    assert!(t.elapsed() < Duration::from_millis(500), "fire blocked");
    assert!((20..=22).contains(&slow), "{slow}");
    assert_eq!(r.counters().dropped, 100 - slow as u64);
    std::thread::sleep(Duration::from_millis(400)); // some of the slow ones are through
    assert!(r.fire("solo", Some("quick"), &json!("now")));
    assert!(r.finish(Duration::from_secs(20)));
    let seen = seen.lock().unwrap();
    let of = |g: &str| -> Vec<String> {
        seen.iter()
            .filter(|o| o.guest.as_deref() == Some(g))
            .map(|o| o.output.clone())
            .collect()
    };
    assert_eq!(
        of("slow"),
        (0..slow).map(|i| i.to_string()).collect::<Vec<_>>()
    );
    let quick = seen
        .iter()
        .position(|o| o.guest.as_deref() == Some("quick"))
        .expect("it ran");
    assert!(
        quick < seen.len() - 5,
        "the quick guest waited for the slow one"
    );
}

/// Leaving ends a running hook at once and forgets the rest; hooks are found anew for each event.
#[test]
fn leaving_is_quick_and_hooks_come_and_go() {
    let dir = tempfile::tempdir().expect("a folder");
    let (r, seen) = runner(&dir, limits());
    r.fire("solo", None, &Value::Null);
    assert!(r.finish(Duration::from_secs(2)));
    assert!(seen.lock().unwrap().is_empty());
    hook(&dir, "a", "sleep 60");
    r.fire("solo", None, &Value::Null);
    r.fire("solo", None, &Value::Null);
    std::thread::sleep(Duration::from_millis(200));
    let t = Instant::now();
    drop(r);
    assert!(t.elapsed() < Duration::from_secs(2));
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].ending, Ending::Stopped);
}
