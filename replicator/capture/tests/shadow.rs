//! The promise of this crate: a shadow built from collected pages alone equals the guest's memory, byte
//! for byte, at every checkpoint; also when the capturing process was killed and another went on.
//! Needs root and QEMU (see common).
//!
//! `HAVM_CAPTURE_EPOCHS` sets how many epochs are run (default 150).

mod common;

use common::{Guest, Spec, read_memory};
use havm_capture::{Capture, CaptureError, Options, PAGE_BYTES, PageSet, RamBlock};
use havm_qmp::Qmp;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Rewrites files, frees and takes memory anew, and runs programs.
const WORK: &str =
    "dd if=/dev/urandom of=/m/a bs=64k count=$((RANDOM % 40 + 1)) conv=notrunc 2>/dev/null
dd if=/dev/urandom of=/m/b bs=4k count=1 seek=$((RANDOM % 4000)) conv=notrunc 2>/dev/null
cat /m/a /m/b > /m/c 2>/dev/null; rm -f /m/c";

fn spec<'a>() -> Spec<'a> {
    Spec {
        ram_mib: 192,
        first: "",
        work: WORK,
        extra: &["-device", "VGA"],
        user: None,
    }
}

struct Shadow {
    blocks: Vec<RamBlock>,
    memory: Vec<Vec<u8>>,
}

impl Shadow {
    /// A fresh standby: zeroes everywhere.
    fn new(blocks: &[RamBlock]) -> Shadow {
        let memory = blocks.iter().map(|b| vec![0; b.len as usize]).collect();
        Shadow {
            blocks: blocks.to_vec(),
            memory,
        }
    }

    fn apply(&mut self, pages: &PageSet) {
        for range in pages.absent() {
            let at = range.first as usize * PAGE_BYTES;
            let len = range.count as usize * PAGE_BYTES;
            let part = &self.memory[range.block as usize][at..at + len];
            assert!(
                part.iter().all(|b| *b == 0),
                "absent pages had contents before"
            );
        }
        for (block, page, bytes) in pages.iter() {
            let at = page as usize * PAGE_BYTES;
            self.memory[block as usize][at..at + PAGE_BYTES].copy_from_slice(bytes);
        }
    }

    /// Compares with the memory of a guest that stands still.
    fn check(&self, pid: u32, when: &str) {
        for (block, mine) in self.blocks.iter().zip(&self.memory) {
            let real = read_memory(pid, block.hva, block.len);
            let pages = mine.chunks(PAGE_BYTES).zip(real.chunks(PAGE_BYTES));
            let wrong: Vec<usize> = pages
                .enumerate()
                .filter(|(_, (a, b))| a != b)
                .map(|(i, _)| i)
                .collect();
            assert!(
                wrong.is_empty(),
                "{when}: {} pages of {} differ, the first is {}",
                wrong.len(),
                block.name,
                wrong[0]
            );
        }
    }
}

fn epochs() -> usize {
    std::env::var("HAVM_CAPTURE_EPOCHS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(150)
}

/// Runs a first full round in limited steps.
fn first_round(capture: &mut Capture, set: &mut PageSet, shadow: &mut Shadow) {
    loop {
        let done = capture.collect(set, 1000).expect("collect");
        assert!(done.pages <= 1000);
        shadow.apply(set);
        set.clear();
        if !done.more {
            return;
        }
    }
}

#[test]
fn the_shadow_equals_the_guest_after_every_kind_of_epoch() {
    every_kind_of_epoch(Options::default());
}

/// The way of scanning that is used with KVM, here under TCG.
#[test]
fn the_shadow_equals_the_guest_when_the_scan_looks_first() {
    every_kind_of_epoch(Options {
        look_first: Some(true),
        workers: Some(3),
    });
}

fn every_kind_of_epoch(options: Options) {
    let guest = Guest::start(&spec());
    let mut qmp = guest.connect();
    let mut capture = Capture::attach_with(&mut qmp, options).expect("attach");
    assert!(!capture.taken_again());
    let mut shadow = Shadow::new(capture.blocks());
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    first_round(&mut capture, &mut set, &mut shadow);
    for n in 0..epochs() {
        // Epochs with no round before the checkpoint, with one, with several, and with one thrown away.
        for _ in 0..n % 4 {
            let limit = if n % 3 == 0 { 200 } else { usize::MAX };
            capture.collect(&mut set, limit).expect("collect");
            std::thread::sleep(Duration::from_millis(n as u64 % 7));
        }
        if n % 10 == 9 {
            capture.put_back(&set);
            set.clear();
        }
        let check = n % 25 == 24 || n < 3;
        let mut called = 0;
        let pause = capture
            .checkpoint(&mut qmp, &mut set, &mut state, &mut || called += 1, !check)
            .expect("checkpoint");
        assert!(pause.was_running && called == 1 && state.len() > 1000);
        shadow.apply(&set);
        set.clear();
        if check {
            shadow.check(guest.pid(), &format!("epoch {n}"));
            qmp.cont().expect("cont");
        }
        qmp.take_events().for_each(drop);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Protects memory that is touched for the first time long after attaching: it was a hole of the RAM file,
/// which scans skip.
#[test]
fn memory_touched_late_is_seen() {
    let work = "dd if=/dev/urandom of=/m/a bs=64k count=16 2>/dev/null\n\
                for i in 1 2 3 4 5 6 7 8; do cat /m/a >> /m/grow; done; usleep 20000";
    let guest = Guest::start(&Spec {
        ram_mib: 512,
        work,
        ..spec()
    });
    let mut qmp = guest.connect();
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    let mut shadow = Shadow::new(capture.blocks());
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    first_round(&mut capture, &mut set, &mut shadow);
    let held = || {
        std::fs::metadata(guest.dir.path().join("ram"))
            .expect("RAM file")
            .blocks()
            / 2048
    };
    let at_first = held();
    for n in 0..60 {
        std::thread::sleep(Duration::from_millis(60));
        capture
            .collect(&mut set, if n % 2 == 0 { 500 } else { usize::MAX })
            .expect("collect");
        let check = n % 10 == 9;
        capture
            .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, !check)
            .expect("checkpoint");
        shadow.apply(&set);
        set.clear();
        if check {
            shadow.check(guest.pid(), &format!("epoch {n}"));
            qmp.cont().expect("cont");
        }
    }
    assert!(
        held() > at_first + 64,
        "the guest touched too little: {at_first} -> {} MiB",
        held()
    );
}

/// As libvirt runs QEMU: an unprivileged user, under the seccomp sandbox.
#[test]
fn a_sandboxed_qemu_of_another_user_is_captured() {
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let guest = Guest::start(&Spec {
        extra: &["-sandbox", sandbox],
        user: Some(65534),
        ..spec()
    });
    let mut qmp = guest.connect();
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    let mut shadow = Shadow::new(capture.blocks());
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    first_round(&mut capture, &mut set, &mut shadow);
    capture
        .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, false)
        .expect("checkpoint");
    shadow.apply(&set);
    shadow.check(guest.pid(), "sandboxed");
}

/// Tracing must not disturb what the traced thread was doing, however often it happens.
#[test]
fn attaching_again_and_again_does_not_disturb_qemu() {
    let guest = Guest::start(&spec());
    let count = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", guest.pid())).expect("needs root");
        fds.flatten()
            .filter(|e| {
                std::fs::read_link(e.path())
                    .is_ok_and(|t| t.as_os_str() == "anon_inode:[userfaultfd]")
            })
            .count()
    };
    for n in 0..20 {
        let mut qmp = guest.connect();
        let mut capture = Capture::attach(&mut qmp).expect("attach");
        assert_eq!(capture.taken_again(), n > 0);
        capture.refresh(&mut qmp).expect("the blocks are the same");
        let state =
            std::fs::read_to_string(format!("/proc/{}/status", guest.pid())).expect("status");
        assert!(state.contains("TracerPid:\t0"), "still traced");
        let status = qmp.run_state().expect("status");
        assert_eq!(status, (true, "running".into()));
    }
    assert_eq!(count(), 1, "descriptors pile up in QEMU");
}

/// What the killed process does: captures until it is killed, which may be at any instruction.
#[test]
#[ignore = "run by a_killed_capture_is_followed_by_another as a child"]
fn capture_until_killed() {
    let path = std::env::var("HAVM_CAPTURE_QMP").expect("set by the parent");
    let mut qmp = Qmp::connect(path.as_ref(), Duration::from_secs(10)).expect("monitor");
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    loop {
        capture.collect(&mut set, usize::MAX).expect("collect");
        capture
            .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
            .expect("checkpoint");
        set.clear();
        qmp.take_events().for_each(drop);
    }
}

#[test]
fn a_killed_capture_is_followed_by_another() {
    let guest = Guest::start(&spec());
    for kill_after_ms in [2, 30, 150, 400, 700] {
        let mut child = Command::new(std::env::current_exe().expect("exe"))
            .args(["--ignored", "--exact", "capture_until_killed"])
            .env("HAVM_CAPTURE_QMP", &guest.qmp)
            .stdout(Stdio::null())
            .spawn()
            .expect("child");
        std::thread::sleep(Duration::from_millis(kill_after_ms));
        child.kill().expect("kill -9");
        child.wait().expect("wait");

        let mut qmp = guest.connect();
        // Killed in a pause it leaves the guest stopped: its successor has to know and to resume.
        if !qmp.run_state().expect("status").0 {
            qmp.cont().expect("cont");
        }
        let mut capture = Capture::attach(&mut qmp).expect("attach again");
        assert!(
            kill_after_ms < 400 || capture.taken_again(),
            "one descriptor is enough"
        );
        let mut shadow = Shadow::new(capture.blocks());
        let (mut set, mut state) = (PageSet::new(), Vec::new());
        first_round(&mut capture, &mut set, &mut shadow);
        for _ in 0..epochs() / 15 {
            capture
                .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
                .expect("checkpoint");
            shadow.apply(&set);
            set.clear();
            std::thread::sleep(Duration::from_millis(10));
        }
        capture
            .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, false)
            .expect("checkpoint");
        shadow.apply(&set);
        shadow.check(guest.pid(), &format!("killed after {kill_after_ms} ms"));
        qmp.cont().expect("cont");
    }
}

#[test]
fn forget_all_starts_from_equal_images() {
    let guest = Guest::start(&spec());
    let mut qmp = guest.connect();
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    qmp.stop().expect("stop");
    let mut shadow = Shadow::new(capture.blocks());
    for (block, memory) in shadow.blocks.iter().zip(&mut shadow.memory) {
        *memory = read_memory(guest.pid(), block.hva, block.len);
    }
    capture.forget_all().expect("forget");
    let mut set = PageSet::new();
    let nothing = capture.collect(&mut set, usize::MAX).expect("collect");
    assert_eq!(
        (nothing.pages, set.absent().len()),
        (0, 0),
        "nothing was written since"
    );
    qmp.cont().expect("cont");
    let mut state = Vec::new();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(20));
        capture
            .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
            .expect("checkpoint");
    }
    let total: u64 = capture.total_bytes() / PAGE_BYTES as u64;
    assert!(
        (set.len() as u64) < total / 2,
        "only what was written: {} of {total}",
        set.len()
    );
    capture
        .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, false)
        .expect("checkpoint");
    shadow.apply(&set);
    shadow.check(guest.pid(), "after ten epochs from equal images");
}

#[test]
fn an_error_in_a_checkpoint_leaves_the_guest_running_and_loses_no_page() {
    let guest = Guest::start(&spec());
    let mut qmp = guest.connect();
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    let mut shadow = Shadow::new(capture.blocks());
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    first_round(&mut capture, &mut set, &mut shadow);

    // QEMU loses our descriptor set: the save fails after the stop.
    let sets = qmp
        .execute("query-fdsets", serde_json::Value::Null)
        .expect("fdsets");
    let id = sets[0]["fdset-id"].as_u64().expect("one set");
    qmp.remove_fd(id).expect("remove");
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(20));
        let e = capture
            .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
            .expect_err("the save fails");
        assert!(matches!(e, CaptureError::Qmp(_)), "{e}");
        assert!(set.is_empty() && state.is_empty());
        assert!(qmp.run_state().expect("status").0, "the guest runs again");
    }
    // A new capture would mark everything dirty; the old one must know by itself what it took.
    qmp.stop().expect("stop");
    capture.collect(&mut set, usize::MAX).expect("collect");
    shadow.apply(&set);
    shadow.check(guest.pid(), "after failed checkpoints");
}

#[test]
fn somebody_else_resuming_the_guest_voids_the_epoch() {
    let guest = Guest::start(&spec());
    let mut qmp = guest.connect();
    let mut admin = guest.connect_second();
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    let mut shadow = Shadow::new(capture.blocks());
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    first_round(&mut capture, &mut set, &mut shadow);
    let e = capture
        .checkpoint(
            &mut qmp,
            &mut set,
            &mut state,
            &mut || {
                admin.cont().expect("an admin resumes it");
                std::thread::sleep(Duration::from_millis(20));
            },
            true,
        )
        .expect_err("memory and devices are of different moments");
    assert!(matches!(e, CaptureError::NotStopped(_)), "{e}");
    assert!(set.is_empty() && qmp.run_state().expect("status").0);
    qmp.take_events().for_each(drop);
    capture
        .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, false)
        .expect("the next is good");
    shadow.apply(&set);
    shadow.check(guest.pid(), "after a void epoch");
}

#[test]
fn an_admins_pause_is_kept() {
    let guest = Guest::start(&spec());
    let mut qmp = guest.connect();
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    qmp.stop().expect("stop");
    let pause = capture
        .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
        .expect("checkpoint");
    assert!(!pause.was_running);
    assert!(
        !qmp.run_state().expect("status").0,
        "the guest still stands"
    );
}

#[test]
fn the_end_of_qemu_is_an_error_that_says_so() {
    let mut guest = Guest::start(&spec());
    let mut qmp = guest.connect();
    let mut capture = Capture::attach(&mut qmp).expect("attach");
    let (mut set, mut state) = (PageSet::new(), Vec::new());
    capture
        .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
        .expect("checkpoint");
    guest.kill();
    let e = capture
        .checkpoint(&mut qmp, &mut set, &mut state, &mut || {}, true)
        .expect_err("QEMU is gone");
    assert!(e.is_qemu_gone(), "{e}");
    assert!(
        Capture::attach(&mut qmp)
            .err()
            .expect("gone")
            .is_qemu_gone()
    );
}
