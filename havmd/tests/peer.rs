//! The daemons' connection over loopback: two links, each through a cable that can be cut.

use havm_core::ids::{NodeId, Term};
use havm_core::message::{Body, Envelope};
use havm_core::spec::LinkSpec;
use havm_daemon::peer::{PeerClient, PeerError, PeerSettings, Served, start_with};
use havm_links::identity::Identity;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

const SOON: Duration = Duration::from_secs(10);
const A: NodeId = NodeId([1; 16]);
const B: NodeId = NodeId([2; 16]);

/// Addresses 127.45.TEST.x: node a 1 and 11, node b 2 and 12, the cables' ends at a 3 and 13.
fn ip(test: u8, last: u8) -> IpAddr {
    Ipv4Addr::new(127, 45, test, last).into()
}

fn link(name: &str, local: IpAddr, peer: IpAddr) -> LinkSpec {
    LinkSpec {
        name: name.into(),
        local,
        peer,
    }
}

async fn free_port(test: u8) -> u16 {
    let l = TcpListener::bind(SocketAddr::new(ip(test, 200), 0))
        .await
        .expect("a port");
    l.local_addr().expect("an address").port()
}

/// A cable: forwards, or (cut) swallows, like a link that is down: no reset, nothing.
struct Cable(Arc<AtomicBool>);

impl Cable {
    async fn lay(test: u8, i: u8, port: u16) -> Cable {
        let cut = Arc::new(AtomicBool::new(false));
        let listener = TcpListener::bind(SocketAddr::new(ip(test, 10 * i + 3), port))
            .await
            .expect("a listener");
        let to = SocketAddr::new(ip(test, 10 * i + 2), port);
        let is_cut = cut.clone();
        tokio::spawn(async move {
            while let Ok((a, _)) = listener.accept().await {
                let is_cut = is_cut.clone();
                tokio::spawn(async move {
                    if is_cut.load(Ordering::Relaxed) {
                        sleep(Duration::from_secs(60)).await;
                    }
                    if let Ok(b) = TcpStream::connect(to).await {
                        let (ar, aw) = a.into_split();
                        let (br, bw) = b.into_split();
                        tokio::join!(pump(ar, bw, &is_cut), pump(br, aw, &is_cut));
                    }
                });
            }
        });
        Cable(cut)
    }
    fn cut(&self, cut: bool) {
        self.0.store(cut, Ordering::Relaxed);
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    cut: &AtomicBool,
) {
    let mut buffer = vec![0; 65536];
    while let Ok(n) = from.read(&mut buffer).await {
        if n == 0 {
            return;
        }
        if !cut.load(Ordering::Relaxed) && to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

struct Pair {
    a: PeerClient,
    a_served: Served,
    b: PeerClient,
    b_served: Served,
    cables: [Cable; 2],
    port: u16,
    identities: [Identity; 2],
}

async fn pair(test: u8) -> Pair {
    let port = free_port(test).await;
    let identities = [(); 2].map(|()| Identity::generate().expect("an identity"));
    let cables = [
        Cable::lay(test, 0, port).await,
        Cable::lay(test, 1, port).await,
    ];
    let settings = |me: usize| PeerSettings {
        node: [A, B][me],
        identity: identities[me].clone(),
        peer: [B, A][me],
        peer_fingerprint: identities[1 - me].fingerprint(),
        links: (0..2)
            .map(|i| match me {
                0 => link(
                    &format!("rep{i}"),
                    ip(test, 10 * i + 1),
                    ip(test, 10 * i + 3),
                ),
                _ => link(
                    &format!("rep{i}"),
                    ip(test, 10 * i + 2),
                    ip(test, 10 * i + 1),
                ),
            })
            .collect(),
        port,
    };
    let (a, a_served) = start_with(settings(0)).await.expect("started");
    let (b, b_served) = start_with(settings(1)).await.expect("started");
    Pair {
        a,
        a_served,
        b,
        b_served,
        cables,
        port,
        identities,
    }
}

fn note(from: NodeId, term: u64) -> Envelope {
    Envelope {
        guest: "web".parse().expect("a name"),
        term: Term(term),
        from,
        from_life: None,
        to_life: None,
        body: Body::Conf,
    }
}

async fn links_are(served: &mut Served, want: [bool; 2]) {
    timeout(SOON, served.links.wait_for(|l| l[..] == want))
        .await
        .expect("in time")
        .expect("alive");
}

/// Answers every question with itself and how many came.
fn echo(mut served: Served) {
    tokio::spawn(async move {
        let mut n = 0;
        while let Some((body, reply)) = served.requests.recv().await {
            n += 1;
            let _ = reply.send(json!({ "n": n, "body": body }));
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_once_and_in_order_whichever_link_lives() {
    let mut p = pair(1).await;
    links_are(&mut p.a_served, [true, true]).await;
    links_are(&mut p.b_served, [true, true]).await;
    for t in 0..200 {
        assert!(p.a.send(note(A, t)));
    }
    for t in 0..200 {
        let got = timeout(SOON, p.b_served.messages.recv())
            .await
            .expect("in time")
            .expect("a message");
        assert_eq!(got, note(A, t));
    }
    // A cut cable delays nothing, and is noticed.
    p.cables[0].cut(true);
    let t = Instant::now();
    assert!(p.a.send(note(A, 1000)));
    let got = timeout(SOON, p.b_served.messages.recv())
        .await
        .expect("in time")
        .expect("a message");
    assert_eq!(got, note(A, 1000));
    assert!(
        t.elapsed() < Duration::from_millis(500),
        "{:?}",
        t.elapsed()
    );
    links_are(&mut p.a_served, [false, true]).await;
    links_are(&mut p.b_served, [false, true]).await;
    // Mended, it comes back; then the other one goes.
    p.cables[0].cut(false);
    links_are(&mut p.a_served, [true, true]).await;
    p.cables[1].cut(true);
    links_are(&mut p.a_served, [true, false]).await;
    assert!(p.b.send(note(B, 7)));
    assert_eq!(
        timeout(SOON, p.a_served.messages.recv())
            .await
            .expect("in time"),
        Some(note(B, 7))
    );
    assert!(
        p.b_served.messages.try_recv().is_err(),
        "a message came twice"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_is_answered_once_also_when_its_link_dies() {
    let Pair {
        a,
        mut a_served,
        b: _b,
        b_served,
        cables,
        ..
    } = pair(2).await;
    links_are(&mut a_served, [true, true]).await;
    echo(b_served);
    let first = a.request(json!("hello"), SOON).await.expect("an answer");
    assert_eq!(first, json!({ "n": 1, "body": "hello" }));
    let large = Value::String("x".repeat(8 << 20));
    let answer = a.request(large.clone(), SOON).await.expect("an answer");
    assert_eq!(answer["body"], large);
    let long = Value::String("x".repeat(17 << 20));
    assert!(matches!(
        a.request(long, SOON).await,
        Err(PeerError::TooLong(_))
    ));
    // Asked over a cable that swallows it: asked again over the other one.
    cables[0].cut(true);
    let again = a.request(json!("again"), SOON).await.expect("an answer");
    assert_eq!(again, json!({ "n": 3, "body": "again" }));
    cables[1].cut(true);
    links_are(&mut a_served, [false, false]).await;
    let e = a.request(json!("nobody"), Duration::from_millis(300)).await;
    assert_eq!(e, Err(PeerError::NoLink));
    // A question that finds no link waits for one.
    let waiting = tokio::spawn({
        let a = a.clone();
        async move { a.request(json!("late"), SOON).await }
    });
    sleep(Duration::from_millis(100)).await;
    cables[1].cut(false);
    let late = waiting.await.expect("no panic").expect("an answer");
    assert_eq!(late["body"], json!("late"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_daemon_is_connected_again() {
    let Pair {
        a,
        mut a_served,
        b,
        mut b_served,
        port,
        identities,
        ..
    } = pair(3).await;
    links_are(&mut a_served, [true, true]).await;
    links_are(&mut b_served, [true, true]).await;
    drop((b, b_served));
    links_are(&mut a_served, [false, false]).await;
    let settings = PeerSettings {
        node: B,
        identity: identities[1].clone(),
        peer: A,
        peer_fingerprint: identities[0].fingerprint(),
        links: vec![
            link("rep0", ip(3, 2), ip(3, 1)),
            link("rep1", ip(3, 12), ip(3, 11)),
        ],
        port,
    };
    let (_b, mut b_served) = start_with(settings).await.expect("started");
    links_are(&mut a_served, [true, true]).await;
    // Its messages are new, though a's numbers went on and the new session's begin again.
    links_are(&mut b_served, [true, true]).await;
    assert!(a.send(note(A, 5)));
    assert_eq!(
        timeout(SOON, b_served.messages.recv())
            .await
            .expect("in time"),
        Some(note(A, 5))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn noise_and_strangers_disturb_nothing() {
    let mut p = pair(4).await;
    links_are(&mut p.a_served, [true, true]).await;
    let at = SocketAddr::new(ip(4, 2), p.port);
    let mut seed = 7u32;
    for n in 0..60usize {
        let noise: Vec<u8> = (0..n * 31)
            .map(|_| {
                seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                (seed >> 24) as u8
            })
            .collect();
        let socket = TcpSocket::new_v4().expect("a socket");
        let mut tcp = socket.connect(at).await.expect("a connection");
        // It may be cut at any byte.
        let _ = tcp.write_all(&noise).await;
    }
    // Someone with another key, and someone with the right key who is another node.
    let stranger = PeerSettings {
        node: NodeId([0; 16]),
        identity: Identity::generate().expect("an identity"),
        peer: B,
        peer_fingerprint: p.identities[1].fingerprint(),
        links: vec![link("x", ip(4, 50), ip(4, 2))],
        port: p.port,
    };
    let other_node = PeerSettings {
        identity: p.identities[0].clone(),
        ..stranger.clone()
    };
    for settings in [stranger, other_node] {
        let (client, _served) = start_with(settings).await.expect("started");
        let e = client
            .request(json!("let me in"), Duration::from_millis(700))
            .await;
        assert!(e.is_err(), "{e:?}");
    }
    links_are(&mut p.a_served, [true, true]).await;
    // A message in another's name is not believed, even from the peer.
    assert!(p.a.send(note(B, 9)));
    assert!(p.a.send(note(A, 1)));
    assert_eq!(
        timeout(SOON, p.b_served.messages.recv())
            .await
            .expect("in time"),
        Some(note(A, 1))
    );
    assert!(p.b_served.requests.try_recv().is_err());
}

/// How long a message takes; prints it: `cargo test -p havm-daemon --test peer -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn how_long_a_message_takes() {
    let mut p = pair(5).await;
    links_are(&mut p.a_served, [true, true]).await;
    links_are(&mut p.b_served, [true, true]).await;
    let mut took = Vec::new();
    for t in 0..500 {
        let start = Instant::now();
        assert!(p.a.send(note(A, t)));
        p.b_served.messages.recv().await.expect("a message");
        took.push(start.elapsed());
        sleep(Duration::from_millis(1)).await;
    }
    took.sort();
    println!("one way, p50 {:?}, p99 {:?}", took[250], took[495]);
}
