//! The lab itself, with a plain libvirt guest in it: what every end-to-end test builds on.
//! Needs root, libvirt and the guest kernel (scripts/deps.sh).

use havm_guest::client::ClientHandle;
use havm_guest::domain::Domain;
use havm_guest::image::GuestFiles;
use havm_guest::recorder::RecorderHandle;
use havm_lab::run::run;
use havm_lab::{Host, Lab, LinkState, Options, place, procs};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const GUEST: &str = "10.9.0.10";

/// One lab at a time: two cores carry one guest well, not four.
static ONE_LAB: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_LAB.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lab's name is the machine's: another checkout's tests must have others.
fn options(number: u32) -> Options {
    assert!(
        nix::unistd::geteuid().is_root(),
        "the lab's tests need root"
    );
    let files = GuestFiles::in_target(&place::target_dir().unwrap());
    files.build(&place::workspace_dir().unwrap()).unwrap();
    let checkout = place::workspace_dir().unwrap();
    let hash = checkout
        .to_string_lossy()
        .bytes()
        .fold(5381u32, |h, b| h.wrapping_mul(33) ^ u32::from(b));
    Options::named(&format!("smoke{number}-{hash:08x}")).unwrap()
}

/// What `down` must have removed: anything on the machine that carries the lab's name.
fn left_of(lab: &Lab) -> Vec<String> {
    let name = lab.name();
    let mut left = Vec::new();
    for dir in [
        "/run/netns",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup/freezer",
    ] {
        for entry in std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            let found = entry.file_name().to_string_lossy().into_owned();
            if found.contains(name) {
                left.push(format!("{dir}/{found}"));
            }
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = lab.dir().to_str().unwrap();
    left.extend(
        mounts
            .lines()
            .filter(|l| l.contains(dir))
            .map(str::to_owned),
    );
    for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(&format!("{dir}/")) || line.contains(&format!("--name {name} ")) {
            left.push(line);
        }
    }
    left
}

/// The whole way: a guest under plain libvirt, a perfect proof, and a power off that is seen.
#[test]
fn a_guest_testifies_and_a_power_off_is_seen() {
    let _alone = alone();
    let options = options(1);
    let start = Instant::now();
    let lab = Lab::up(&options).unwrap();
    eprintln!("up after {:?}", start.elapsed());
    lab.define_guest(Host::Alpha, &Domain::new("one", 10), 256 << 20)
        .unwrap();
    run(lab
        .command(Host::Alpha, "virsh")
        .unwrap()
        .args(["-q", "start", "one"]))
    .unwrap();
    let mut recorder =
        RecorderHandle::start(lab.testify(&["record", "lan-alpha", "lan-beta"]).unwrap()).unwrap();

    let client = || ClientHandle::start(lab.testify(&["run", GUEST]).unwrap()).unwrap();
    let mut first = client();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(first.stats().unwrap().connections, 5);
    let proof = first.stop().unwrap();
    assert!(proof.perfect(), "{proof:?}");
    assert!(proof.answers > 200, "a busy guest: {proof:?}");
    assert!(
        proof.memory_checked > 1000,
        "it checks its memory: {proof:?}"
    );
    // It may be a moment behind.
    procs::wait_until(Duration::from_secs(2), || {
        recorder
            .stats()
            .is_ok_and(|r| r.answers + r.missed >= proof.answers)
    });
    let recorded = recorder.stats().unwrap();
    assert_eq!(recorded.uncommitted_frames_seen(), 0, "{recorded:?}");
    assert_eq!(
        recorded.answers + recorded.missed,
        proof.answers,
        "{recorded:?}"
    );
    assert!(
        recorded.runs.iter().all(|r| r.interface == "lan-alpha"),
        "{recorded:?}"
    );

    let mut second = client();
    std::thread::sleep(Duration::from_millis(500));
    second.mark().unwrap();
    let cut = lab.power_off(Host::Alpha).unwrap();
    assert!(cut.took < Duration::from_secs(1), "{cut:?}");
    let frames = recorder.stats().unwrap().guest_frames;
    std::thread::sleep(Duration::from_millis(700));
    let stats = second.stats().unwrap();
    assert!(
        stats.max_gap.ms > 600.0 && stats.probe_max_gap.ms > 600.0,
        "{stats:?}"
    );
    // A pulled plug closes no connection.
    assert_eq!(
        (stats.connections, stats.failures.len()),
        (5, 0),
        "{stats:?}"
    );
    assert_eq!(
        recorder.stop().unwrap().guest_frames,
        frames,
        "heard after the power was cut"
    );
    drop(second);

    lab.power_on(Host::Alpha).unwrap();
    assert_eq!(lab.links().unwrap().state("lan-alpha"), LinkState::Up);
    lab.down().unwrap();
    assert_eq!(left_of(&lab), Vec::<String>::new());
}

/// Disks stay over a power off, /run and guest RAM do not; boot.d runs at every power on; the
/// links between the hosts can be cut and mended one by one.
#[test]
fn power_and_links() {
    let _alone = alone();
    let lab = Lab::up(&options(2)).unwrap();
    let on = |host, script: &str| {
        run(lab.command(host, "sh").unwrap().args(["-c", script])).map(|s| s.trim().to_owned())
    };
    let heard = |from, to: &str| on(from, &format!("ping -q -c2 -i0.1 -W1 {to}")).is_ok();
    assert!(heard(Host::Alpha, "beta-rep0") && heard(Host::Alpha, "gamma"));

    lab.files(Host::Beta)
        .add_boot(
            "10-count",
            "#!/bin/sh\necho x >>/var/lib/havm/boots; exec sleep 1000\n",
        )
        .unwrap();
    on(
        Host::Beta,
        "echo kept >/var/lib/libvirt/images/f; echo gone >/run/f",
    )
    .unwrap();
    on(Host::Beta, "echo gone >/var/lib/libvirt/qemu/ram/f").unwrap();
    for _ in 0..2 {
        lab.power_off(Host::Beta).unwrap();
        assert!(!heard(Host::Alpha, "beta-rep0"), "an off host answers");
        assert!(lab.power_off(Host::Beta).is_err(), "off twice");
        lab.power_on(Host::Beta).unwrap();
    }
    assert_eq!(
        on(Host::Beta, "cat /var/lib/libvirt/images/f").unwrap(),
        "kept"
    );
    assert!(on(Host::Beta, "cat /run/f").is_err(), "/run survived");
    assert!(
        on(Host::Beta, "cat /var/lib/libvirt/qemu/ram/f").is_err(),
        "guest RAM survived"
    );
    let booted = procs::wait_until(Duration::from_secs(5), || {
        on(Host::Beta, "cat /var/lib/havm/boots").is_ok_and(|b| b == "x\nx")
    });
    assert!(booted, "boot.d");

    lab.set_link("rep0", LinkState::Down).unwrap();
    assert_eq!(
        on(Host::Alpha, "cat /sys/class/net/rep0/carrier").unwrap(),
        "0"
    );
    assert!(!heard(Host::Alpha, "beta-rep0") && heard(Host::Alpha, "beta-rep1"));
    lab.set_link("rep1", LinkState::OneWay("alpha".into(), "beta".into()))
        .unwrap();
    assert!(!heard(Host::Alpha, "beta-rep1"));
    // A cut link stays cut over a power cycle.
    lab.power_off(Host::Beta).unwrap();
    lab.power_on(Host::Beta).unwrap();
    assert!(!heard(Host::Alpha, "beta-rep0"));
    lab.set_link("rep0", LinkState::Up).unwrap();
    lab.set_link("rep1", LinkState::Up).unwrap();
    assert!(heard(Host::Alpha, "beta-rep0") && heard(Host::Alpha, "beta-rep1"));

    let ticks = "i=0; while :; do i=$((i+1)); echo $i >/run/ticks; sleep 0.02; done";
    let mut ticker = lab
        .command(Host::Alpha, "sh")
        .unwrap()
        .args(["-c", ticks])
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    lab.freeze(Host::Alpha).unwrap();
    assert!(lab.is_frozen(Host::Alpha));
    let read = || std::fs::read_to_string(lab.files(Host::Alpha).path("run/ticks")).unwrap();
    let before = read();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(read(), before, "it ran while frozen");
    lab.thaw(Host::Alpha).unwrap();
    assert!(
        procs::wait_until(Duration::from_secs(5), || read() != before),
        "it does not go on"
    );

    // A frozen host can lose its power too, and takes all of its processes with it.
    lab.freeze(Host::Alpha).unwrap();
    lab.power_off(Host::Alpha).unwrap();
    ticker.wait().unwrap();
    lab.down().unwrap();
    assert_eq!(left_of(&lab), Vec::<String>::new());
}

/// A lab whose owner was killed is cleaned by `down`, and by the next `up`, whatever runs in it.
#[test]
fn a_forgotten_lab_is_cleaned_up() {
    let _alone = alone();
    let options = options(3);
    let mut lab = Lab::up(&options).unwrap();
    lab.keep();
    let mut stray = std::process::Command::new("ip")
        .args([
            "netns",
            "exec",
            &format!("{}-client", options.name),
            "sleep",
            "1000",
        ])
        .spawn()
        .unwrap();
    drop(lab);
    let again = Lab::up(&options).unwrap();
    assert!(!stray.wait().unwrap().success(), "it was killed");
    assert!(again.is_on(Host::Alpha) && again.is_on(Host::Beta) && again.is_on(Host::Gamma));
    drop(again);
    let lab = Lab::open(&options).unwrap();
    assert_eq!(left_of(&lab), Vec::<String>::new());
    lab.down().unwrap();
}

/// Shutdown by the admin reaches the guest, a reboot from inside comes back with its log, and the
/// questions that end it work: end-to-end tests tell these from a failure.
#[test]
fn a_guest_ends_as_it_is_told() {
    let _alone = alone();
    let lab = Lab::up(&options(4)).unwrap();
    lab.define_guest(Host::Alpha, &Domain::new("one", 10), 64 << 20)
        .unwrap();
    let virsh = |args: &[&str]| run(lab.command(Host::Alpha, "virsh").unwrap().args(args)).unwrap();
    let ask = |question: &str| {
        let text = run(&mut lab.testify(&["ask", GUEST, question]).unwrap());
        text.map(|t| serde_json::from_str::<serde_json::Value>(&t).unwrap())
    };
    let state_is = |wanted: &str| {
        procs::wait_until(Duration::from_secs(20), || {
            virsh(&["domstate", "one"]).contains(wanted)
        })
    };
    virsh(&["-q", "start", "one"]);
    let mut client = ClientHandle::start(lab.testify(&["run", GUEST]).unwrap()).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let answers = client.stats().unwrap().answers;
    ask(r#"{"op":"reboot"}"#).unwrap();
    let back = procs::wait_until(Duration::from_secs(30), || {
        ask(r#"{"op":"seen"}"#).is_ok_and(|s| s["boot"] == 2)
    });
    assert!(back, "it does not come back");
    let seen = ask(r#"{"op":"seen"}"#).unwrap();
    assert!(
        seen["disk"]["first_seq"].as_u64().unwrap() >= answers,
        "{seen}"
    );
    // The old connections are gone, and the client says so: it does not come back by itself.
    let broke = procs::wait_until(Duration::from_secs(20), || {
        client.stats().unwrap().connections == 0
    });
    assert!(broke, "{:?}", client.stats().unwrap());
    let proof = client.stop().unwrap();
    assert!(
        !proof.perfect() && proof.connections_kept == 0 && proof.taken_back > 0,
        "{proof:?}"
    );

    virsh(&["-q", "shutdown", "one"]);
    assert!(state_is("shut off"), "virsh shutdown is not obeyed");
    virsh(&["-q", "start", "one"]);
    procs::wait_until(Duration::from_secs(30), || ask(r#"{"op":"seen"}"#).is_ok());
    ask(r#"{"op":"poweroff"}"#).unwrap();
    assert!(state_is("shut off"), "poweroff");
}
