//! One link's connection: made, kept, noticed dead, made again.
//!
//! ```text
//!   lower node id:  dial ──TLS──> hello ──> live ──silent or broken──> wait a little ──> dial
//!   higher node id: listen ─────> hello ──> live; a newer connection replaces an older one
//! ```
//! A cut link leaves TCP waiting for minutes, so both sides ping and give a silent connection up.

use super::packet::{MAX_FRAME_BYTES, Packet};
use super::queue::Queue;
use super::shared::Shared;
use crate::frame;
use havm_links::tls;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Distance of two pings.
const PING: Duration = Duration::from_millis(250);
/// A connection on which nothing came for so long is given up.
const SILENT: Duration = Duration::from_millis(1500);
/// How long making one may take.
const CONNECT: Duration = Duration::from_secs(2);
/// The wait before the next attempt, growing from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Connections that are being greeted at once on a listener.
const MAX_GREETING: usize = 8;

/// An established connection.
#[derive(Debug)]
pub struct Live {
    /// What waits to be written.
    pub queue: Queue,
}

/// Keeps a link connected for ever. `dial`: this side connects.
pub async fn keep(shared: Arc<Shared>, link: usize, dial: bool) {
    if dial {
        dial_for_ever(&shared, link).await;
    } else {
        listen_for_ever(shared, link).await;
    }
}

async fn dial_for_ever(shared: &Arc<Shared>, link: usize) {
    let mut wait = BACKOFF.0;
    loop {
        match timeout(CONNECT, connect(shared, link)).await {
            Ok(Ok(stream)) => {
                wait = BACKOFF.0;
                let end = shared_run(shared, link, stream).await;
                tracing::debug!(link, "the peer connection ended: {end}");
            }
            Ok(Err(e)) => shared.connect_failed(link, &e.to_string()),
            Err(_) => shared.connect_failed(link, "no answer"),
        }
        sleep(wait).await;
        wait = (wait * 2).min(BACKOFF.1);
    }
}

async fn connect(
    shared: &Shared,
    link: usize,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let l = shared.link(link)?;
    let socket = if l.local.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // From this link's own address: the connection must not take another way.
    socket.bind(SocketAddr::new(l.local, 0))?;
    let tcp = socket.connect(SocketAddr::new(l.peer, shared.port)).await?;
    tcp.set_nodelay(true)?;
    let tls = TlsConnector::from(shared.client_tls.clone());
    tls.connect(tls::server_name(), tcp).await
}

async fn listen_for_ever(shared: Arc<Shared>, link: usize) {
    let mut told = false;
    let listener = loop {
        match listen(&shared, link) {
            Ok(l) => break l,
            Err(e) => {
                if !told {
                    tracing::warn!(
                        link,
                        "cannot listen for the peer on this link yet: {e}; is its card there, its address set and the port free? It is tried again"
                    );
                    told = true;
                }
                sleep(BACKOFF.1).await;
            }
        }
    };
    let greeting = Arc::new(tokio::sync::Semaphore::new(MAX_GREETING));
    // The newest greeted connection runs; the one before it is ended.
    let mut running = tokio::task::JoinSet::new();
    let (greeted, mut arrivals) = tokio::sync::mpsc::channel(MAX_GREETING);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, from)) => {
                    let Ok(place) = greeting.clone().try_acquire_owned() else {
                        // Strangers only: a peer needs one. Closing it is the answer.
                        continue;
                    };
                    let (shared, greeted) = (shared.clone(), greeted.clone());
                    tokio::spawn(async move {
                        match timeout(CONNECT, accept(&shared, tcp)).await {
                            Ok(Ok(stream)) => drop(greeted.send(stream).await),
                            Ok(Err(e)) => tracing::debug!(link, %from, "refused: {e}"),
                            Err(_) => tracing::debug!(link, %from, "refused: no greeting"),
                        }
                        drop(place);
                    });
                }
                Err(e) => {
                    tracing::warn!(link, "cannot accept a connection: {e}");
                    sleep(BACKOFF.0).await;
                }
            },
            Some(stream) = arrivals.recv() => {
                // Its place is free only when it is really gone.
                running.shutdown().await;
                let shared = shared.clone();
                running.spawn(async move {
                    let end = shared_run(&shared, link, stream).await;
                    tracing::debug!(link, "the peer connection ended: {end}");
                });
            }
        }
    }
}

fn listen(shared: &Shared, link: usize) -> io::Result<TcpListener> {
    let l = shared.link(link)?;
    let address = SocketAddr::new(l.local, shared.port);
    let socket = if l.local.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(16)
}

async fn accept(
    shared: &Shared,
    tcp: TcpStream,
) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    tcp.set_nodelay(true)?;
    TlsAcceptor::from(shared.server_tls.clone())
        .accept(tcp)
        .await
}

/// Ends the link's live state however its task ends, also when it is aborted.
struct Registered<'a> {
    shared: &'a Shared,
    link: usize,
    live: Arc<Live>,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.shared.link_down(self.link, &self.live);
    }
}

async fn shared_run<S>(shared: &Arc<Shared>, link: usize, stream: S) -> String
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match run(shared, link, stream).await {
        Ok(()) => "closed by the peer".into(),
        Err(e) => e.to_string(),
    }
}

async fn run<S>(shared: &Arc<Shared>, link: usize, stream: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut read, mut write) = tokio::io::split(stream);
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "silent");
    let hello = Packet::Hello {
        node: shared.node,
        session: shared.session,
    };
    timeout(SILENT, frame::write(&mut write, &hello, MAX_FRAME_BYTES))
        .await
        .map_err(late)??;
    let theirs = timeout(SILENT, frame::read::<Packet>(&mut read, MAX_FRAME_BYTES));
    let Some(Packet::Hello { node, session }) = theirs.await.map_err(late)?? else {
        return Err(io::Error::other("no greeting"));
    };
    if node != shared.peer {
        return Err(io::Error::other(format!(
            "the other end calls itself node {node}, the pairing says {}: pair again",
            shared.peer
        )));
    }
    let live = Arc::new(Live {
        queue: Queue::default(),
    });
    let registered = Registered {
        shared,
        link,
        live: live.clone(),
    };
    shared.link_up(link, live.clone());
    let reading = async {
        loop {
            let packet = timeout(SILENT, frame::read::<Packet>(&mut read, MAX_FRAME_BYTES));
            match packet.await.map_err(late)?? {
                Some(p) => shared.received(session, p),
                None => return Ok(()),
            }
        }
    };
    let ping = frame::encode(&Packet::Ping, MAX_FRAME_BYTES)?;
    let writing = async {
        loop {
            let next = timeout(PING, live.queue.next()).await;
            let bytes = next.as_ref().map_or(&ping, |f| f.as_ref());
            // A frame that cannot be written in this time is no sign of life either.
            timeout(SILENT.max(Duration::from_secs(5)), async {
                write.write_all(bytes).await?;
                write.flush().await
            })
            .await
            .map_err(late)??;
        }
    };
    let end = tokio::select! {
        r = reading => r,
        r = writing => r,
    };
    drop(registered);
    end
}
