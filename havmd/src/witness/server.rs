//! The witness's listener. Every question is answered from a book that is durable.

use super::register::{Answer, Member};
use super::store::{self, BookStore};
use super::{ALPN_ASK, ALPN_ENROL, MAX_FRAME_BYTES, Question, Reply, enrol};
use crate::frame;
use crate::identity_store::StoreError;
use havm_core::ids::Incarnation;
use havm_links::identity::{Fingerprint, Identity};
use havm_links::tls::{self, Trust};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;

/// Connections at once; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 128;
/// A handshake or an enrolment that takes longer is cut.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The same for an enrolment.
const ENROLMENT: Duration = Duration::from_secs(15);
/// A connection without a question for so long is closed; nodes probe every few seconds.
const IDLE: Duration = Duration::from_secs(120);

/// Why there is no witness.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// A file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The address.
    #[error(
        "cannot listen at {address}: {source}; is the address this machine's, and the port free?"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
}

struct Shared {
    dir: PathBuf,
    identity: Identity,
    store: Mutex<BookStore>,
}

/// A witness that listens.
pub struct Witness {
    listener: TcpListener,
    shared: Arc<Shared>,
}

/// Runs a witness until it is killed. Safe to kill at any point.
pub async fn serve(listen: SocketAddr, dir: &Path) -> Result<(), WitnessError> {
    Witness::bind(listen, dir).await?.run().await;
    Ok(())
}

impl Witness {
    /// Opens the book (or makes one) and listens.
    pub async fn bind(listen: SocketAddr, dir: &Path) -> Result<Self, WitnessError> {
        let identity = store::identity(dir)?.identity;
        let store = BookStore::open(dir)?;
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|source| WitnessError::Listen {
                address: listen,
                source,
            })?;
        let shared = Arc::new(Shared {
            dir: dir.to_path_buf(),
            identity,
            store: Mutex::new(store),
        });
        Ok(Witness { listener, shared })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Its incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.shared.lock().book().incarnation
    }

    /// Answers for ever.
    pub async fn run(self) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        tracing::info!(incarnation = %self.incarnation(), "the witness is ready");
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((tcp, from)) => {
                    let shared = self.shared.clone();
                    tokio::spawn(async move {
                        if let Err(e) = shared.connection(tcp).await {
                            tracing::debug!(%from, "a connection to the witness ended: {e}");
                        }
                        drop(place);
                    });
                }
                Err(e) => {
                    // Out of descriptors, mostly: it gets better by waiting, not by trying.
                    tracing::warn!("the witness cannot accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, BookStore> {
        // The store changes only after its file did, so a panic elsewhere leaves it whole.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(self: Arc<Self>, tcp: TcpStream) -> io::Result<()> {
        tcp.set_nodelay(true)?;
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp);
        let hello = timeout(HANDSHAKE, hello).await.map_err(late)??;
        let enrols = hello
            .client_hello()
            .alpn()
            .is_some_and(|mut names| names.any(|n| n == ALPN_ENROL));
        let (trust, alpn) = if enrols {
            (Trust::AnyoneWhilePairing, ALPN_ENROL)
        } else {
            (Trust::Pinned(self.lock().book().fingerprints()), ALPN_ASK)
        };
        let config = tls::server_config(&self.identity, &trust, alpn).map_err(io::Error::other)?;
        let stream = timeout(HANDSHAKE, hello.into_stream(config))
            .await
            .map_err(late)??;
        let theirs = tls::peer_fingerprint(stream.get_ref().1.peer_certificates())
            .ok_or_else(|| io::Error::other("no certificate"))?;
        if enrols {
            timeout(ENROLMENT, self.enrol(stream, theirs))
                .await
                .map_err(late)?
        } else {
            self.answer(stream, theirs).await
        }
    }

    async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
        self: Arc<Self>,
        mut stream: S,
        theirs: Fingerprint,
    ) -> io::Result<()> {
        loop {
            let next = timeout(IDLE, frame::read::<Question>(&mut stream, MAX_FRAME_BYTES)).await;
            let Some(q) = next.unwrap_or(Ok(None))? else {
                return Ok(());
            };
            let shared = self.clone();
            // The sync of a disk must not hold up the other connections' tasks.
            let reply = tokio::task::spawn_blocking(move || shared.reply(theirs, &q))
                .await
                .map_err(io::Error::other)?;
            frame::write(&mut stream, &reply, MAX_FRAME_BYTES).await?;
        }
    }

    fn reply(&self, theirs: Fingerprint, q: &Question) -> Reply {
        let mut store = self.lock();
        let was_behind = store.book().behind;
        let answer = store.update(|book| book.ask(theirs, q.seen, &q.ask));
        let answer = match answer {
            Ok(a) => Some(a),
            Err(e) => {
                tracing::error!("the witness cannot keep its book and answers nothing: {e}");
                None
            }
        };
        if answer == Some(Answer::Behind) && !was_behind {
            tracing::error!(
                "a node has seen a newer version of this witness's book: it was restored from a backup. It refuses everything; `havm witness --reset`, then enrol both nodes again"
            );
        }
        if let Some(a @ (Answer::Granted { .. } | Answer::Refused { .. })) = &answer {
            tracing::info!(ask = ?q.ask, answer = ?a, "asked for a term");
        }
        Reply {
            id: q.id,
            incarnation: store.book().incarnation,
            version: store.book().version,
            answer,
        }
    }

    async fn enrol<S: AsyncRead + AsyncWrite + Unpin>(
        self: Arc<Self>,
        mut stream: S,
        theirs: Fingerprint,
    ) -> io::Result<()> {
        let shared = self.clone();
        let keep = async move |members: [Member; 2]| {
            let names = members.each_ref().map(|m| m.name.clone());
            let kept = tokio::task::spawn_blocking(move || {
                let mut store = shared.lock();
                let done = store.update(|book| book.enrol(members));
                done.map(|r| r.map(|()| store.book().incarnation))
            });
            match kept.await {
                Ok(Ok(Ok(incarnation))) => {
                    tracing::info!(?names, "a pair is enrolled");
                    Ok(incarnation)
                }
                Ok(Ok(Err(e))) => Err(e.to_string()),
                Ok(Err(e)) => Err(format!("the witness cannot keep its book: {e}")),
                Err(e) => Err(e.to_string()),
            }
        };
        enrol::accept(
            &mut stream,
            &self.dir,
            self.identity.fingerprint(),
            theirs,
            keep,
        )
        .await
    }
}
