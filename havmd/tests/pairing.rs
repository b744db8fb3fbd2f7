//! Pairing over loopback, with everything that may go wrong on the way.

use havm_daemon::identity_store::{Myself, PairFile};
use havm_daemon::pairing::{Code, PairAs, PairError, accept, join};
use havm_daemon::witness::{Probe, Witness, WitnessClient, enrol, enrol_pair};
use std::net::SocketAddr;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

fn node(name: &str, peer: &str) -> (TempDir, PairAs) {
    let dir = tempfile::tempdir().expect("a folder");
    let me = PairAs {
        state_dir: dir.path().to_path_buf(),
        name: name.into(),
        expect_peer: Some(peer.into()),
        replace: false,
    };
    (dir, me)
}

async fn accepting(
    me: &PairAs,
    code: &Code,
) -> (SocketAddr, JoinHandle<Result<PairFile, PairError>>) {
    let (tx, rx) = oneshot::channel();
    let (me, code) = (me.clone(), code.clone());
    let task = tokio::spawn(async move {
        accept(loopback(), &code, &me, move |at| {
            tx.send(at).expect("somebody waits")
        })
        .await
    });
    (
        timeout(SOON, rx)
            .await
            .expect("in time")
            .expect("it listens"),
        task,
    )
}

async fn result(task: JoinHandle<Result<PairFile, PairError>>) -> Result<PairFile, PairError> {
    timeout(SOON, task)
        .await
        .expect("in time")
        .expect("no panic")
}

fn file(me: &PairAs) -> Option<PairFile> {
    PairFile::load(&me.state_dir).expect("readable")
}

#[tokio::test]
async fn two_strangers_become_a_pair() {
    let ((_a, a), (_b, b)) = (node("alpha", "beta"), node("beta", "alpha"));
    let code = Code::random().expect("a code");
    let (at, task) = accepting(&a, &code).await;
    let at_b = join(at, &code, &b).await.expect("paired");
    let at_a = result(task).await.expect("paired");
    assert_eq!(at_a.pair_key, at_b.pair_key);
    assert_eq!((at_a.node, at_a.peer), (at_b.peer, at_b.node));
    assert_eq!(
        (at_a.peer_name.as_str(), at_b.peer_name.as_str()),
        ("beta", "alpha")
    );
    let id = |p: &PairAs| Myself::load_or_create(&p.state_dir).expect("an identity");
    assert_eq!(at_a.peer_fingerprint, id(&b).identity.fingerprint());
    assert_eq!(at_b.peer_fingerprint, id(&a).identity.fingerprint());
    assert_eq!((file(&a), file(&b)), (Some(at_a), Some(at_b)));
    // Once is enough.
    let again = join(at, &code, &b).await.expect_err("paired already");
    assert!(
        matches!(&again, PairError::Paired(p) if p == "alpha"),
        "{again}"
    );
    let mut b = b;
    b.replace = true;
    assert!(matches!(
        join(at, &code, &b).await,
        Err(PairError::Unreachable { .. })
    ));
}

#[tokio::test]
async fn a_wrong_code_is_told_and_five_end_it() {
    let ((_a, a), (_b, b)) = (node("alpha", "beta"), node("beta", "alpha"));
    let code = Code::random().expect("a code");
    let wrong = Code::random().expect("a code");
    let (at, task) = accepting(&a, &code).await;
    for n in 0..5 {
        let e = join(at, &wrong, &b).await.expect_err("a wrong code");
        assert!(
            matches!(&e, PairError::Refused(why) if why == "wrong code"),
            "{n}: {e}"
        );
    }
    assert!(matches!(
        result(task).await,
        Err(PairError::TooManyAttempts)
    ));
    assert_eq!((file(&a), file(&b)), (None, None));
}

#[tokio::test]
async fn noise_and_silence_do_not_end_the_wait() {
    let ((_a, a), (_b, b)) = (node("alpha", "beta"), node("beta", "alpha"));
    let code = Code::random().expect("a code");
    let (at, task) = accepting(&a, &code).await;
    for n in 0..20u8 {
        let mut tcp = TcpStream::connect(at).await.expect("a connection");
        // It may be cut at any byte.
        let _ = tcp
            .write_all(&vec![n.wrapping_mul(37); usize::from(n) * 11])
            .await;
    }
    join(at, &code, &b).await.expect("paired");
    result(task).await.expect("paired");
}

#[tokio::test]
async fn another_name_than_the_config_says_is_refused_on_both_sides() {
    let ((_a, a), (_b, b)) = (node("alpha", "beta"), node("gamma", "alpha"));
    let code = Code::random().expect("a code");
    let (at, task) = accepting(&a, &code).await;
    let e = join(at, &code, &b)
        .await
        .expect_err("the wrong name")
        .to_string();
    assert!(e.contains("\"gamma\"") && e.contains("\"beta\""), "{e}");
    assert!(matches!(
        result(task).await,
        Err(PairError::OtherName { .. })
    ));
    assert_eq!((file(&a), file(&b)), (None, None));
    // And a copy of a node's own folder is no peer.
    let (_c, c) = node("alpha", "alpha");
    let (at, _task) = accepting(&c, &code).await;
    let e = join(at, &code, &c).await.expect_err("itself").to_string();
    assert!(e.contains("copy of its state folder"), "{e}");
}

/// Whoever stands between shows another certificate, so neither proof holds.
#[tokio::test]
async fn someone_in_the_middle_gets_nothing() {
    let ((_a, a), (_b, b), (_m, m)) = (
        node("alpha", "beta"),
        node("beta", "alpha"),
        node("beta", "alpha"),
    );
    let code = Code::random().expect("a code");
    let (at, _task) = accepting(&a, &code).await;
    // The middle accepts b with a code of its own making: b must not believe it.
    let guess = Code::random().expect("a code");
    let (false_at, false_task) = accepting(&m, &guess).await;
    assert!(join(false_at, &code, &b).await.is_err());
    assert_eq!(file(&b), None);
    false_task.abort();
    assert!(join(at, &guess, &m).await.is_err());
    assert_eq!((file(&a), file(&m)), (None, None));
}

/// The last word is lost: the joining side must not believe in a pair that may not exist.
#[tokio::test]
async fn a_half_pairing_is_taken_back() {
    let ((_a, a), (_b, b)) = (node("alpha", "beta"), node("beta", "alpha"));
    let code = Code::random().expect("a code");
    let (at, _task) = accepting(&a, &code).await;
    let middle = TcpListener::bind(loopback()).await.expect("a listener");
    let middle_at = middle.local_addr().expect("an address");
    tokio::spawn(async move {
        let (b, _) = middle.accept().await.expect("a connection");
        let a = TcpStream::connect(at).await.expect("a connection");
        let (mut ar, mut aw) = a.into_split();
        let (mut br, mut bw) = b.into_split();
        // Everything to A; from A the handshake, the challenge and the welcome, then nothing.
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut br, &mut aw).await;
        });
        let mut buffer = vec![0; 65536];
        let mut flights = 0;
        while let Ok(n) = ar.read(&mut buffer).await {
            if n == 0 || flights == 3 {
                break;
            }
            let _ = bw.write_all(&buffer[..n]).await;
            flights += 1;
        }
    });
    let r = timeout(SOON, join(middle_at, &code, &b))
        .await
        .expect("in time");
    assert!(matches!(r, Err(PairError::Broken(_))), "{r:?}");
    assert_eq!(file(&b), None);
}

#[tokio::test]
async fn a_pair_enrols_at_a_witness_with_one_code() {
    let ((_a, a), (_b, b)) = (node("alpha", "beta"), node("beta", "alpha"));
    let dir = tempfile::tempdir().expect("a folder");
    let w = Witness::bind(loopback(), dir.path())
        .await
        .expect("a witness");
    let at = w.local_addr().expect("an address");
    tokio::spawn(w.run());
    let code = enrol::new_code(dir.path()).expect("a code");
    let e = enrol_pair(at, &code, "alpha", &a.state_dir)
        .await
        .expect_err("not paired");
    assert!(e.to_string().contains("not paired"), "{e}");
    let pairing = Code::random().expect("a code");
    let (pair_at, task) = accepting(&a, &pairing).await;
    join(pair_at, &pairing, &b).await.expect("paired");
    result(task).await.expect("paired");
    for p in [&a, &b] {
        let pin = enrol_pair(at, &code, &p.name, &p.state_dir)
            .await
            .expect("enrolled");
        let me = Myself::load_or_create(&p.state_dir).expect("an identity");
        let client = WitnessClient::new(vec![at], &me, &pin, &p.state_dir).expect("a client");
        assert_eq!(client.probe(SOON).await, Probe::Here(pin.incarnation));
    }
}
