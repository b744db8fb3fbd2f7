//! The witness as a whole: over TLS on loopback, with its files, killed at any point.

use havm_core::command::WitnessRequest;
use havm_core::event::WitnessReply;
use havm_core::ids::{GuestName, Incarnation, NodeId, Term};
use havm_daemon::identity_store::{Myself, WitnessPin};
use havm_daemon::pairing::code::Code;
use havm_daemon::witness::client::KeyError;
use havm_daemon::witness::register::Member;
use havm_daemon::witness::{self, Probe, Witness, WitnessClient, enrol, store::BookStore};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(5);

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

fn web() -> GuestName {
    "web".parse().expect("a name")
}

/// Two nodes, each with its state folder.
struct Nodes {
    dirs: [TempDir; 2],
    me: [Myself; 2],
}

impl Nodes {
    fn new() -> Self {
        let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        let me = dirs
            .each_ref()
            .map(|d| Myself::load_or_create(d.path()).expect("an identity"));
        Nodes { dirs, me }
    }
    fn members(&self) -> [Member; 2] {
        self.me.each_ref().map(|m| Member {
            node: m.node,
            name: "node".into(),
            fingerprint: m.identity.fingerprint(),
        })
    }
    fn id(&self, i: usize) -> NodeId {
        self.me[i].node
    }
    async fn enrol(&self, i: usize, at: SocketAddr, code: &Code) -> Result<WitnessPin, String> {
        enrol(at, code, &self.me[i], self.members(), self.dirs[i].path())
            .await
            .map_err(|e| e.to_string())
    }
    fn client(&self, i: usize, at: SocketAddr) -> WitnessClient {
        let pin = WitnessPin::load(self.dirs[i].path())
            .expect("readable")
            .expect("enrolled");
        WitnessClient::new(vec![at], &self.me[i], &pin, self.dirs[i].path()).expect("a client")
    }
}

async fn start(dir: &Path) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let w = Witness::bind(loopback(), dir).await.expect("a witness");
    let at = w.local_addr().expect("an address");
    (at, tokio::spawn(w.run()))
}

async fn enrolled(dir: &Path, nodes: &Nodes, at: SocketAddr) -> Incarnation {
    let code = enrol::new_code(dir).expect("a code");
    let a = nodes.enrol(0, at, &code).await.expect("enrolled");
    let b = nodes.enrol(1, at, &code).await.expect("enrolled");
    assert_eq!(a, b);
    a.incarnation
}

async fn ask(c: &WitnessClient, incarnation: Incarnation, basis: u64, term: u64) -> WitnessReply {
    let request = WitnessRequest {
        basis: Term(basis),
        term: Term(term),
        incarnation,
    };
    c.request(&web(), request, SOON).await
}

#[tokio::test]
async fn a_pair_enrols_and_one_of_both_gets_the_next_term() {
    let dir = tempfile::tempdir().expect("a folder");
    let nodes = Nodes::new();
    let (at, _) = start(dir.path()).await;
    let incarnation = enrolled(dir.path(), &nodes, at).await;
    let (a, b) = (nodes.client(0, at), nodes.client(1, at));
    assert_eq!(a.probe(SOON).await, Probe::Here(incarnation));
    assert_eq!(ask(&a, incarnation, 1, 2).await, WitnessReply::KeyAbsent);
    a.create_key(&web(), Term(1), nodes.id(0), SOON)
        .await
        .expect("made");
    b.create_key(&web(), Term(1), nodes.id(0), SOON)
        .await
        .expect("the same");
    let e = b.create_key(&web(), Term(1), nodes.id(1), SOON).await;
    assert!(matches!(e, Err(KeyError::Exists(_))), "{e:?}");

    let (x, y) = tokio::join!(ask(&a, incarnation, 1, 2), ask(&b, incarnation, 1, 2));
    let granted = |r: &WitnessReply, holder| {
        *r == WitnessReply::Granted {
            term: Term(2),
            holder,
            incarnation,
        }
    };
    assert!(
        granted(&x, nodes.id(0)) != granted(&y, nodes.id(1)),
        "{x:?} {y:?}"
    );
    let other = Incarnation([9; 16]);
    assert_eq!(
        ask(&a, other, 2, 3).await,
        WitnessReply::WrongIncarnation { incarnation }
    );
    b.remove_key(&web(), SOON).await.expect("removed");
    assert_eq!(ask(&a, incarnation, 2, 3).await, WitnessReply::KeyAbsent);
}

#[tokio::test]
async fn a_code_serves_one_pair_and_wrong_ones_end_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let nodes = Nodes::new();
    let (at, _) = start(dir.path()).await;
    let code = enrol::new_code(dir.path()).expect("a code");
    let wrong = Code::random().expect("a code");
    for _ in 0..4 {
        let e = nodes.enrol(0, at, &wrong).await.expect_err("a wrong code");
        assert!(e.contains("wrong code"), "{e}");
    }
    nodes.enrol(0, at, &code).await.expect("enrolled");
    let e = Nodes::new()
        .enrol(0, at, &code)
        .await
        .expect_err("another pair");
    assert!(e.contains("another pair"), "{e}");
    nodes.enrol(1, at, &code).await.expect("enrolled");
    let e = nodes.enrol(1, at, &code).await.expect_err("used up");
    assert!(e.contains("havm witness --enrol"), "{e}");

    let code = enrol::new_code(dir.path()).expect("a code");
    for _ in 0..5 {
        nodes.enrol(0, at, &wrong).await.expect_err("a wrong code");
    }
    nodes
        .enrol(0, at, &code)
        .await
        .expect_err("too many wrong attempts");
    // A node cannot enrol a pair that it is not in.
    let code = enrol::new_code(dir.path()).expect("a code");
    let stranger = Nodes::new();
    let e = enrol(
        at,
        &code,
        &stranger.me[0],
        nodes.members(),
        stranger.dirs[0].path(),
    )
    .await;
    assert!(
        e.expect_err("not its pair")
            .to_string()
            .contains("the pair that it is in")
    );
}

#[tokio::test]
async fn strangers_and_noise_get_nothing_and_the_witness_lives() {
    let dir = tempfile::tempdir().expect("a folder");
    let nodes = Nodes::new();
    let (at, _) = start(dir.path()).await;
    let incarnation = enrolled(dir.path(), &nodes, at).await;
    let a = nodes.client(0, at);
    a.create_key(&web(), Term(1), nodes.id(0), SOON)
        .await
        .expect("made");
    let mut seed = 1u32;
    for n in 0..40usize {
        let noise: Vec<u8> = (0..n * 37)
            .map(|_| {
                seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                (seed >> 24) as u8
            })
            .collect();
        let mut tcp = TcpStream::connect(at).await.expect("a connection");
        // It may be cut at any byte.
        let _ = tcp.write_all(&noise).await;
        let _ = tcp.shutdown().await;
    }
    let stranger = Nodes::new();
    let pin = WitnessPin::load(nodes.dirs[0].path())
        .expect("readable")
        .expect("enrolled");
    let s = WitnessClient::new(vec![at], &stranger.me[0], &pin, stranger.dirs[0].path());
    let s = s.expect("a client");
    let r = ask(&s, incarnation, 1, 2).await;
    assert!(
        matches!(r, WitnessReply::NotDelivered | WitnessReply::NoAnswer),
        "{r:?}"
    );
    // And a false witness is not believed by a node.
    let other = tempfile::tempdir().expect("a folder");
    let (false_at, _) = start(other.path()).await;
    assert_eq!(nodes.client(1, false_at).probe(SOON).await, Probe::Silent);
    assert!(matches!(
        ask(&a, incarnation, 1, 2).await,
        WitnessReply::Granted { .. }
    ));
}

#[tokio::test]
async fn silence_is_told_apart_and_the_client_comes_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let nodes = Nodes::new();
    let (at, task) = start(dir.path()).await;
    let incarnation = enrolled(dir.path(), &nodes, at).await;
    let a = nodes.client(0, at);
    a.create_key(&web(), Term(1), nodes.id(0), SOON)
        .await
        .expect("made");
    task.abort();
    let _ = task.await;
    // Nobody listens any more: a new connection is refused, so nothing was delivered.
    let fresh = nodes.client(1, at);
    assert_eq!(
        ask(&fresh, incarnation, 1, 2).await,
        WitnessReply::NotDelivered
    );
    // A listener that never speaks: the deadline holds.
    let mute = tokio::net::TcpListener::bind(loopback())
        .await
        .expect("a listener");
    let m = nodes.client(1, mute.local_addr().expect("an address"));
    let t = Instant::now();
    let request = WitnessRequest {
        basis: Term(1),
        term: Term(2),
        incarnation,
    };
    let r = m.request(&web(), request, Duration::from_millis(200)).await;
    assert_eq!(r, WitnessReply::NotDelivered);
    assert!(
        t.elapsed() < Duration::from_millis(600),
        "{:?}",
        t.elapsed()
    );
}

/// Rule 13: a witness restored from a backup is noticed by whoever saw the newer one.
#[tokio::test]
async fn a_witness_restored_from_a_backup_refuses_everything() {
    let dir = tempfile::tempdir().expect("a folder");
    let nodes = Nodes::new();
    let (at, task) = start(dir.path()).await;
    let incarnation = enrolled(dir.path(), &nodes, at).await;
    let a = nodes.client(0, at);
    a.create_key(&web(), Term(1), nodes.id(0), SOON)
        .await
        .expect("made");
    let backup = std::fs::read(dir.path().join("book")).expect("the book");
    assert!(matches!(
        ask(&a, incarnation, 1, 2).await,
        WitnessReply::Granted { .. }
    ));
    task.abort();
    let _ = task.await;
    // Its connections hold the folder's lock until they end.
    drop(a);
    let store = wait_for(|| BookStore::open(dir.path()).ok()).await;
    drop(store);
    std::fs::write(dir.path().join("book"), backup).expect("restored");
    let (at, _) = start(dir.path()).await;
    let a = nodes.client(0, at);
    assert_eq!(a.probe(SOON).await, Probe::Unusable);
    let b = nodes.client(1, at);
    assert_eq!(
        ask(&b, incarnation, 1, 2).await,
        WitnessReply::WrongIncarnation { incarnation }
    );
    assert_eq!(
        b.create_key(&"x".parse().expect("a name"), Term(1), nodes.id(0), SOON)
            .await,
        Err(KeyError::Behind)
    );
}

async fn wait_for<T>(mut f: impl FnMut() -> Option<T>) -> T {
    for _ in 0..250 {
        if let Some(t) = f() {
            return t;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it did not happen in 5 s");
}

/// The child of the test below: a witness in a process of its own.
#[tokio::test]
async fn child_witness() {
    let (Ok(dir), Ok(at)) = (
        std::env::var("HAVM_TEST_WITNESS_DIR"),
        std::env::var("HAVM_TEST_WITNESS_AT"),
    ) else {
        return;
    };
    witness::serve(at.parse().expect("an address"), Path::new(&dir))
        .await
        .expect("a witness");
}

struct KillOnDrop(Child);
impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What was granted is remembered, wherever the kill -9 hit: a term never has two holders.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_point_it_never_grants_a_term_twice() {
    let dir = tempfile::tempdir().expect("a folder");
    let nodes = Nodes::new();
    let (at, task) = start(dir.path()).await;
    let incarnation = enrolled(dir.path(), &nodes, at).await;
    nodes
        .client(0, at)
        .create_key(&web(), Term(1), nodes.id(0), SOON)
        .await
        .expect("made");
    task.abort();
    let _ = task.await;
    wait_for(|| BookStore::open(dir.path()).ok()).await;

    let spawn = || {
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child_witness", "--nocapture"])
            .env("HAVM_TEST_WITNESS_DIR", dir.path())
            .env("HAVM_TEST_WITNESS_AT", at.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        KillOnDrop(child.expect("a child"))
    };
    let clients = [nodes.client(0, at), nodes.client(1, at)];
    let mut holders = std::collections::BTreeMap::from([(1, nodes.id(0))]);
    let mut term = 1;
    let mut grants = 0;
    for round in 0..12u64 {
        let child = spawn();
        wait_until_here(&clients[0]).await;
        let killer = tokio::task::spawn_blocking(move || {
            std::thread::sleep(Duration::from_millis(5 + round * 7));
            drop(child);
        });
        // Both ask for the same terms until the witness is gone.
        'round: loop {
            let (x, y) = tokio::join!(
                ask(&clients[0], incarnation, term, term + 1),
                ask(&clients[1], incarnation, term, term + 1)
            );
            let mut silent = 0;
            for (who, r) in [x, y].into_iter().enumerate() {
                match r {
                    WitnessReply::Granted {
                        term: t, holder, ..
                    } => {
                        assert_eq!(holder, nodes.id(who));
                        let was = *holders.entry(t.0).or_insert(holder);
                        assert_eq!(was, holder, "term {t} was granted twice");
                        grants += 1;
                        term = term.max(t.0);
                    }
                    WitnessReply::Refused {
                        term: t, holder, ..
                    } => {
                        let holder = holder.expect("a holder");
                        let was = *holders.entry(t.0).or_insert(holder);
                        assert_eq!(was, holder, "the register forgot who holds term {t}");
                        term = term.max(t.0);
                    }
                    WitnessReply::NoAnswer | WitnessReply::NotDelivered => silent += 1,
                    other => panic!("{other:?}"),
                }
            }
            if silent == 2 {
                break 'round;
            }
        }
        killer.await.expect("the killer");
    }
    assert!(grants > 12, "only {grants} grants: the test tested little");
}

async fn wait_until_here(c: &WitnessClient) {
    for _ in 0..500 {
        if matches!(c.probe(Duration::from_secs(1)).await, Probe::Here(_)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the witness did not come up in time");
}

/// How long a grant takes, its sync included; prints it:
/// `cargo test -p havm-daemon --test witness -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn how_long_a_grant_takes() {
    let dir = tempfile::tempdir().expect("a folder");
    let nodes = Nodes::new();
    let (at, _) = start(dir.path()).await;
    let incarnation = enrolled(dir.path(), &nodes, at).await;
    let a = nodes.client(0, at);
    a.create_key(&web(), Term(1), nodes.id(0), SOON)
        .await
        .expect("made");
    let mut took = Vec::new();
    for t in 1..201 {
        let start = Instant::now();
        let r = ask(&a, incarnation, t, t + 1).await;
        assert!(matches!(r, WitnessReply::Granted { .. }), "{r:?}");
        took.push(start.elapsed());
    }
    took.sort();
    println!("a grant, p50 {:?}, p99 {:?}", took[100], took[198]);
}
