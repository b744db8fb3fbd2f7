//! What comes to the port that is not the peer, or not what the peer should say.

use havm_core::ids::{LifeId, StreamId, Term};
use havm_links::beat::Timers;
use havm_links::identity::Identity;
use havm_links::incoming::{Expect, In, Incoming, IncomingSpec};
use havm_links::outgoing::{OutEvent, Outgoing, OutgoingSpec};
use havm_links::tls::{ALPN_DATA, Trust, client_config, server_config, server_name};
use havm_wire::frame::Frame;
use havm_wire::hello::{Lane, LinkFrame, Position, StreamHello};
use havm_wire::raw::{Encoded, RawFrame, Splitter};
use havm_wire::version::WIRE_VERSION;
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(20);

fn hello() -> StreamHello {
    StreamHello {
        guest: "g".parse().unwrap(),
        term: Term(4),
        stream: StreamId([1; 16]),
        my_life: LifeId([2; 16]),
        peer_life: LifeId([3; 16]),
    }
}

fn listen(me: &Identity, peer: &Identity) -> Incoming {
    Incoming::listen(IncomingSpec {
        identity: me.clone(),
        peer: peer.fingerprint(),
        bind: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
        ports: 0..=0,
        expect: Expect {
            guest: "g".parse().unwrap(),
            term: None,
            my_life: None,
            peer_life: None,
        },
        window_bytes: 1 << 20,
        timers: Timers::default(),
    })
    .unwrap()
}

fn outgoing(me: &Identity, peer: &Identity, to: std::net::SocketAddr) -> Outgoing {
    Outgoing::connect(OutgoingSpec {
        identity: me.clone(),
        peer: peer.fingerprint(),
        links: vec![(None, to)],
        hello: hello(),
        window_bytes: 1 << 20,
        timers: Timers::default(),
    })
    .unwrap()
}

type Raw = StreamOwned<ClientConnection, TcpStream>;

/// The paired peer's key, but a mind of its own.
fn raw_peer(incoming: &Incoming, me: &Identity, peer: &Identity) -> Raw {
    let trust = Trust::Pinned(vec![peer.fingerprint()]);
    let tls = client_config(me, &trust, ALPN_DATA).unwrap();
    let sock = TcpStream::connect(incoming.ports()[0]).unwrap();
    sock.set_read_timeout(Some(LONG)).unwrap();
    StreamOwned::new(ClientConnection::new(tls, server_name()).unwrap(), sock)
}

fn put(s: &mut impl Write, e: &Encoded, seq: u64) {
    s.write_all(&e.header(seq)).unwrap();
    s.write_all(e.payload()).unwrap();
    s.flush().unwrap();
}

/// The next frame, or none when the other end closed.
fn get(s: &mut impl Read) -> Option<RawFrame> {
    let (mut splitter, mut frame) = (Splitter::default(), None);
    let mut byte = [0];
    while frame.is_none() {
        match s.read(&mut byte) {
            Ok(1..) => splitter.push(&byte, |f| frame = Some(f)).unwrap(),
            _ => return None,
        }
    }
    frame
}

fn ids() -> (Identity, Identity) {
    (Identity::generate().unwrap(), Identity::generate().unwrap())
}

/// After whatever happened, the real peer gets through.
fn still_works(incoming: &Incoming, a: &Identity, b: &Identity) {
    let out = outgoing(a, b, incoming.ports()[0]);
    out.send(Frame::VerifyEnd { id: 77 }.encode().unwrap(), LONG)
        .unwrap();
    loop {
        match incoming.recv(LONG).expect("the peer gets through") {
            In::NewStream(h) => assert!(incoming.accept(h.stream)),
            In::Frame(raw) => {
                assert_eq!(Frame::decode(&raw), Ok(Frame::VerifyEnd { id: 77 }));
                return;
            }
            _ => {}
        }
    }
}

#[test]
fn a_strangers_key_gets_nowhere_and_both_sides_say_why() {
    let (a, b) = ids();
    let x = Identity::generate().unwrap();
    let incoming = listen(&b, &a);
    let out = outgoing(&x, &b, incoming.ports()[0]);
    match out.event(LONG) {
        Some(OutEvent::LinkDown(0, why)) => {
            assert!(why.contains("does not know this node"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    assert!(incoming.recv(Duration::from_millis(100)).is_none());
    // And the other way round: the listener is not the pinned one.
    let out = outgoing(&a, &x, incoming.ports()[0]);
    match out.event(LONG) {
        Some(OutEvent::LinkDown(0, why)) => assert!(why.contains("stranger"), "{why}"),
        other => panic!("{other:?}"),
    }
    drop(out);
    still_works(&incoming, &a, &b);
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let (a, b) = ids();
    let incoming = listen(&b, &a);
    for bytes in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[0; 5000],
        &[0x16, 3, 1, 0xff, 0xff],
        b"",
    ] {
        let mut s = TcpStream::connect(incoming.ports()[0]).unwrap();
        s.write_all(bytes).unwrap();
    }
    // More silent ones than are let wait at a time.
    let silent: Vec<TcpStream> = (0..40)
        .map(|_| TcpStream::connect(incoming.ports()[0]).unwrap())
        .collect();
    drop(silent);
    still_works(&incoming, &a, &b);
}

#[test]
fn another_version_is_told_both_versions() {
    let (a, b) = ids();
    let incoming = listen(&b, &a);
    let mut s = raw_peer(&incoming, &a, &b);
    let h = LinkFrame::Hello {
        hello: hello(),
        position: Position::default(),
        lane: Lane::Data,
    };
    put(&mut s, &h.encode_as_version(WIRE_VERSION + 7).unwrap(), 0);
    let answer = LinkFrame::decode(&get(&mut s).unwrap()).unwrap();
    let LinkFrame::Refused {
        version,
        forever: true,
        why,
    } = answer
    else {
        panic!("{answer:?}")
    };
    assert_eq!(version, WIRE_VERSION);
    assert!(why.contains(&format!("{}", WIRE_VERSION + 7)), "{why}");
    still_works(&incoming, &a, &b);
}

/// A standby of another version refuses: the stream ends with a text that names both.
#[test]
fn a_standby_of_another_version_ends_the_stream() {
    let (a, b) = ids();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let out = outgoing(&a, &b, listener.local_addr().unwrap());
    let tls = server_config(&b, &Trust::Pinned(vec![a.fingerprint()]), ALPN_DATA).unwrap();
    let (sock, _) = listener.accept().unwrap();
    let mut s = StreamOwned::new(ServerConnection::new(tls).unwrap(), sock);
    get(&mut s).unwrap();
    let no = LinkFrame::Refused {
        version: 99,
        forever: false,
        why: "?".into(),
    };
    put(&mut s, &no.encode().unwrap(), 0);
    let why = loop {
        match out.event(LONG).expect("it breaks") {
            OutEvent::Broken(why) => break why,
            _ => continue,
        }
    };
    assert!(
        why.contains("99") && why.contains(&WIRE_VERSION.to_string()),
        "{why}"
    );
}

/// The paired peer itself goes mad: its connection ends, the next sane one works.
#[test]
fn malformed_and_oversize_frames_end_the_connection_only() {
    let (a, b) = ids();
    let incoming = listen(&b, &a);
    let good = Frame::VerifyEnd { id: 1 }.encode().unwrap();
    let mut oversize = good.header(1);
    oversize[4..8].copy_from_slice(&(5u32 << 20).to_le_bytes());
    let crc = crc32fast::hash(&oversize[..20]);
    oversize[20..].copy_from_slice(&crc.to_le_bytes());
    let mut damaged = good.header(1).to_vec();
    damaged.extend_from_slice(&[9; 8]);
    for bytes in [oversize.to_vec(), damaged, vec![0xff; 100]] {
        let mut s = raw_peer(&incoming, &a, &b);
        let h = LinkFrame::Hello {
            hello: hello(),
            position: Position::default(),
            lane: Lane::Data,
        };
        put(&mut s, &h.encode().unwrap(), 0);
        if let Some(In::NewStream(h)) = incoming.recv(Duration::from_millis(300)) {
            incoming.accept(h.stream);
        }
        assert!(matches!(
            LinkFrame::decode(&get(&mut s).unwrap()),
            Ok(LinkFrame::Welcome { .. })
        ));
        s.write_all(&bytes).unwrap();
        while get(&mut s).is_some() {}
        let why = loop {
            match incoming.recv(LONG).expect("the link goes down") {
                In::LinkDown(0, why) => break why,
                In::Frame(f) => panic!("{f:?}"),
                _ => {}
            }
        };
        assert!(why.contains("malformed"), "{why}");
    }
    still_works(&incoming, &a, &b);
}
