//! The daemon's dealings with replicator processes: start, orders, adoption, loss, stop. Against a
//! fake that keeps to the real one's outside.

use havm_core::event::Event;
use havm_core::ids::Term;
use havm_core::order::{Order, Report};
use havm_core::spec::{SPEC_VERSION, Settings, Spec};
use havm_daemon::replicators::{Place, Post, Replicator};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

fn fake() -> PathBuf {
    // target/debug/deps/TEST -> target/debug/examples/fake-replicator; cargo builds it with tests.
    let me = std::env::current_exe().expect("this program");
    me.parent()
        .and_then(Path::parent)
        .expect("target folder")
        .join("examples/fake-replicator")
}

fn place(dir: &Path) -> Place {
    let spec = Spec {
        version: SPEC_VERSION,
        guest: "web".parse().expect("name"),
        run_dir: dir.to_owned(),
        state_dir: dir.to_owned(),
        identity_dir: dir.to_owned(),
        peer_fingerprint: "00".repeat(32),
        links: vec![],
        port_range: (1, 2),
        disks: vec![],
        nics: vec![],
        qmp_socket: dir.join("qmp.sock"),
        qemu_uid: 0,
        qemu_gid: 0,
        machine: "pc-q35-10.0".into(),
        settings: Settings::default(),
    };
    std::fs::write(Spec::path(dir), serde_json::to_vec(&spec).expect("json")).expect("spec");
    Place {
        program: fake(),
        run_dir: dir.to_owned(),
        unit: "havm-test".into(),
    }
}

fn posting() -> (Post, mpsc::UnboundedReceiver<Event>) {
    let (tx, rx) = mpsc::unbounded_channel();
    (Arc::new(move |e| drop(tx.send(e))), rx)
}

async fn next(rx: &mut mpsc::UnboundedReceiver<Event>) -> Event {
    tokio::time::timeout(Duration::from_secs(20), rx.recv())
        .await
        .expect("an event in time")
        .expect("the channel lives")
}

fn term_of(e: &Event) -> Term {
    match e {
        Event::ReplicatorUp(s) => s.term,
        e => panic!("expected ReplicatorUp, got {e:?}"),
    }
}

/// A replicator outlives its daemon, keeps what it was told, and serves the next one.
#[tokio::test]
async fn a_living_replicator_is_adopted_not_started_again() {
    let dir = tempfile::tempdir().expect("dir");
    let (post, mut events) = posting();
    let first = Replicator::new(place(dir.path()));
    assert!(
        !first.order(&Order::Detach),
        "an order without a replicator is dropped"
    );
    assert!(first.adopt(&post).await.is_none(), "nothing to adopt yet");
    first.start(post.clone());
    assert_eq!(term_of(&next(&mut events).await), Term(0));
    let pid = first.pid().expect("it runs");
    assert!(first.order(&Order::OpenGate { term: Term(7) }));
    assert!(matches!(
        next(&mut events).await,
        Event::Report(Report::Attached { .. })
    ));

    // The next daemon: another handle, nothing shared but the folder.
    let (post2, mut events2) = posting();
    let second = Replicator::new(place(dir.path()));
    // The fake serves one connection at a time: the first daemon's must end, as it does at its death.
    first.hang_up();
    let state = second.adopt(&post2).await.expect("adopted");
    assert_eq!(state.term, Term(7));
    assert_eq!(second.pid(), Some(pid));
    // Starting connects to the living one too.
    assert!(second.order(&Order::Quit));
    assert_eq!(next(&mut events2).await, Event::ReplicatorLost);
}

/// The last words of a dying replicator are heard before its loss, and nothing after it.
#[tokio::test]
async fn a_crash_is_seen_and_a_new_one_starts() {
    let dir = tempfile::tempdir().expect("dir");
    let (post, mut events) = posting();
    let r = Replicator::new(place(dir.path()));
    r.start(post.clone());
    next(&mut events).await;
    let pid = r.pid().expect("it runs");
    assert!(r.order(&Order::Detach));
    assert_eq!(next(&mut events).await, Event::Report(Report::Detached));
    assert_eq!(next(&mut events).await, Event::ReplicatorLost);
    assert!(!r.order(&Order::Status), "no order reaches a dead one");
    r.start(post.clone());
    term_of(&next(&mut events).await);
    assert_ne!(r.pid().expect("a new one"), pid);
    r.stop(&post);
    assert_eq!(next(&mut events).await, Event::ReplicatorLost);
}

/// A program that is not there, or dies at once, is a loss and not a hang.
#[tokio::test]
async fn a_replicator_that_cannot_start_is_lost() {
    let dir = tempfile::tempdir().expect("dir");
    let (post, mut events) = posting();
    for program in ["/nonexistent/havm-replicator", "/bin/false"] {
        let r = Replicator::new(Place {
            program: program.into(),
            ..place(dir.path())
        });
        r.start(post.clone());
        assert_eq!(next(&mut events).await, Event::ReplicatorLost, "{program}");
    }
}
