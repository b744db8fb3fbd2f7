//! A node's way to its witness: one connection, kept open, questions side by side on it.
//!
//! What happened to a question is told apart, because the engine acts on it: it was certainly not
//! delivered, or it may have been and no answer came.

use super::register::{Answer, Ask, Register, Seen};
use super::{ALPN_ASK, MAX_FRAME_BYTES, Question, Reply};
use crate::frame;
use crate::identity_store::{self, Myself, WitnessPin};
use havm_core::command::WitnessRequest;
use havm_core::event::WitnessReply;
use havm_core::ids::{GuestName, Incarnation, NodeId, Term};
use havm_links::tls::{self, Trust};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::WriteHalf;
use tokio::net::TcpStream;
use tokio::sync::{Mutex as AsyncMutex, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// An address that does not answer for so long does not hold up the next one.
const STAGGER: Duration = Duration::from_millis(60);

/// What a probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// It answers and may arbitrate.
    Here(Incarnation),
    /// It answers, and refuses everything: its book was rolled back, or it does not know this node.
    Unusable,
    /// No answer in time.
    Silent,
}

impl Probe {
    /// For [`havm_core::event::Event::WitnessSeen`].
    pub fn incarnation(self) -> Option<Incarnation> {
        match self {
            Probe::Here(i) => Some(i),
            _ => None,
        }
    }
}

/// Why a key was not made or removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No answer.
    #[error(
        "the witness does not answer; check that `havm witness` runs and can be reached, then try again"
    )]
    NoAnswer,
    /// It has one.
    #[error("the witness keeps a register of this guest already (term {}, held by node {}): is it protected? If it is not, `havm unprotect` removes the register", .0.term, .0.holder)]
    Exists(Register),
    /// Another witness.
    #[error(
        "the witness was made anew since this node enrolled: enrol both nodes again (`havm pair --witness`)"
    )]
    OtherIncarnation,
    /// Rolled back.
    #[error(
        "the witness's book is an old copy and refuses everything: `havm witness --reset` there, then enrol both nodes again (`havm pair --witness`)"
    )]
    Behind,
    /// Something else.
    #[error("the witness refuses: {0}")]
    Refused(String),
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Reply>>>>;
type Stream = TlsStream<TcpStream>;

struct Connection {
    write: AsyncMutex<WriteHalf<Stream>>,
    pending: Pending,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A node's client; clones share the connection.
#[derive(Clone)]
pub struct WitnessClient(Arc<Inner>);

struct Inner {
    addresses: Vec<SocketAddr>,
    tls: Arc<rustls::ClientConfig>,
    pinned: Incarnation,
    seen_path: PathBuf,
    seen: Mutex<Option<Seen>>,
    saving: Mutex<()>,
    connection: AsyncMutex<Option<Arc<Connection>>>,
    next_id: AtomicU64,
}

enum Failed {
    NotDelivered,
    NoAnswer,
}

impl WitnessClient {
    /// For the witness that `pin` names, at any of the addresses. `state_dir` keeps the highest
    /// version seen (`witness-seen.json`), by which a rolled-back witness is noticed.
    pub fn new(
        addresses: Vec<SocketAddr>,
        me: &Myself,
        pin: &WitnessPin,
        state_dir: &Path,
    ) -> Result<Self, tls::TlsSetupError> {
        let trust = Trust::Pinned(vec![pin.fingerprint]);
        let seen_path = state_dir.join("witness-seen.json");
        // It only adds a check: where it is lost or damaged, the check starts anew.
        let seen = identity_store::load(&seen_path, "").unwrap_or_else(|e| {
            tracing::warn!("{e}");
            None
        });
        Ok(WitnessClient(Arc::new(Inner {
            addresses,
            tls: tls::client_config(&me.identity, &trust, ALPN_ASK)?,
            pinned: pin.incarnation,
            seen_path,
            seen: Mutex::new(seen),
            saving: Mutex::new(()),
            connection: AsyncMutex::new(None),
            next_id: AtomicU64::new(1),
        })))
    }

    /// The incarnation that this node enrolled at.
    pub fn pinned(&self) -> Incarnation {
        self.0.pinned
    }

    /// Asks for a term (rule 6). Always answers, at the deadline at the latest.
    pub async fn request(
        &self,
        guest: &GuestName,
        request: WitnessRequest,
        deadline: Duration,
    ) -> WitnessReply {
        let ask = Ask::Request {
            guest: guest.clone(),
            incarnation: request.incarnation,
            basis: request.basis,
            term: request.term,
        };
        let reply = match self.call(ask, deadline).await {
            Ok(r) => r,
            Err(Failed::NotDelivered) => return WitnessReply::NotDelivered,
            Err(Failed::NoAnswer) => return WitnessReply::NoAnswer,
        };
        let incarnation = reply.incarnation;
        match reply.answer {
            Some(Answer::Granted { register }) => WitnessReply::Granted {
                term: register.term,
                holder: register.holder,
                incarnation,
            },
            Some(Answer::Refused { register }) => WitnessReply::Refused {
                asked: request.term,
                term: register.term,
                holder: Some(register.holder),
            },
            Some(Answer::KeyAbsent) => WitnessReply::KeyAbsent,
            Some(Answer::OtherIncarnation | Answer::Behind) => {
                WitnessReply::WrongIncarnation { incarnation }
            }
            other => {
                tracing::warn!(
                    ?other,
                    "the witness gave an answer that is none to a request"
                );
                WitnessReply::NoAnswer
            }
        }
    }

    /// Is it there, and who is it? Also keeps the connection open. Call it every second or so.
    pub async fn probe(&self, deadline: Duration) -> Probe {
        match self.call(Ask::Probe, deadline).await {
            Ok(Reply {
                answer: Some(Answer::Here),
                incarnation,
                ..
            }) => Probe::Here(incarnation),
            Ok(Reply {
                answer: Some(_), ..
            }) => Probe::Unusable,
            _ => Probe::Silent,
        }
    }

    /// Makes a guest's register, when it is protected for the first time.
    pub async fn create_key(
        &self,
        guest: &GuestName,
        term: Term,
        holder: NodeId,
        deadline: Duration,
    ) -> Result<(), KeyError> {
        let (guest, incarnation) = (guest.clone(), self.0.pinned);
        self.key(
            Ask::Create {
                guest,
                incarnation,
                term,
                holder,
            },
            deadline,
        )
        .await
    }

    /// Removes a guest's register, when it is protected no more. Only when neither node has a
    /// record of the guest: whoever still had a claim could be granted a term again.
    pub async fn remove_key(&self, guest: &GuestName, deadline: Duration) -> Result<(), KeyError> {
        let (guest, incarnation) = (guest.clone(), self.0.pinned);
        self.key(Ask::Remove { guest, incarnation }, deadline).await
    }

    async fn key(&self, ask: Ask, deadline: Duration) -> Result<(), KeyError> {
        match self.call(ask, deadline).await.map(|r| r.answer) {
            Ok(Some(Answer::Done)) => Ok(()),
            Ok(Some(Answer::Exists { register })) => Err(KeyError::Exists(register)),
            Ok(Some(Answer::OtherIncarnation)) => Err(KeyError::OtherIncarnation),
            Ok(Some(Answer::Behind)) => Err(KeyError::Behind),
            Ok(Some(Answer::Wrong { why })) => {
                Err(KeyError::Refused(why.chars().take(500).collect()))
            }
            Ok(Some(other)) => Err(KeyError::Refused(format!("unexpected answer {other:?}"))),
            Ok(None) | Err(_) => Err(KeyError::NoAnswer),
        }
    }

    async fn call(&self, ask: Ask, deadline: Duration) -> Result<Reply, Failed> {
        let until = Instant::now() + deadline;
        let connection = match timeout_at(until, self.connection()).await {
            Ok(Ok(c)) => c,
            Ok(Err(e)) => {
                tracing::debug!("no connection to the witness: {e}");
                return Err(Failed::NotDelivered);
            }
            Err(_) => return Err(Failed::NotDelivered),
        };
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let seen = *lock(&self.0.seen);
        let question = Question { id, seen, ask };
        let Ok(bytes) = frame::encode(&question, MAX_FRAME_BYTES) else {
            return Err(Failed::NotDelivered);
        };
        let (send, receive) = oneshot::channel();
        lock(&connection.pending).insert(id, send);
        let sent = async {
            use tokio::io::AsyncWriteExt;
            let mut write = connection.write.lock().await;
            write.write_all(&bytes).await?;
            write.flush().await
        };
        let answered = async {
            sent.await.ok()?;
            receive.await.ok()
        };
        let reply = timeout_at(until, answered).await.ok().flatten();
        lock(&connection.pending).remove(&id);
        match reply {
            Some(reply) => {
                self.note(&reply);
                Ok(reply)
            }
            None => {
                self.forget(&connection).await;
                Err(Failed::NoAnswer)
            }
        }
    }

    /// Remembers the highest version seen. After the answer, not before it: it is a second line
    /// of defence, and a failover does not wait for it.
    fn note(&self, reply: &Reply) {
        let now = Seen {
            incarnation: reply.incarnation,
            version: reply.version,
        };
        {
            let mut seen = lock(&self.0.seen);
            // A witness that is behind keeps its incarnation: never step back within one.
            if seen.is_some_and(|s| s.incarnation == now.incarnation && s.version >= now.version) {
                return;
            }
            *seen = Some(now);
        }
        let inner = self.0.clone();
        tokio::task::spawn_blocking(move || {
            // One at a time, each with what is newest by then; nobody else waits for the disk.
            let _turn = lock(&inner.saving);
            let seen = *lock(&inner.seen);
            if let Err(e) = identity_store::save(&inner.seen_path, &seen) {
                tracing::warn!("{e}");
            }
        });
    }

    async fn forget(&self, dead: &Arc<Connection>) {
        let mut current = self.0.connection.lock().await;
        if current.as_ref().is_some_and(|c| Arc::ptr_eq(c, dead)) {
            *current = None;
        }
    }

    async fn connection(&self) -> io::Result<Arc<Connection>> {
        let mut current = self.0.connection.lock().await;
        if let Some(c) = &*current
            && !c.reader.is_finished()
        {
            return Ok(c.clone());
        }
        let stream = self.connect().await?;
        let (read, write) = tokio::io::split(stream);
        let pending = Pending::default();
        let reader = tokio::spawn(read_replies(read, pending.clone()));
        let connection = Arc::new(Connection {
            write: AsyncMutex::new(write),
            pending,
            reader,
        });
        *current = Some(connection.clone());
        Ok(connection)
    }

    /// All addresses, each a little later than the one before; the first that answers.
    async fn connect(&self) -> io::Result<Stream> {
        let mut tries = JoinSet::new();
        for (i, address) in self.0.addresses.iter().copied().enumerate() {
            let tls = TlsConnector::from(self.0.tls.clone());
            tries.spawn(async move {
                tokio::time::sleep(STAGGER * i as u32).await;
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                tls.connect(tls::server_name(), tcp).await
            });
        }
        let mut last = io::Error::other("the config names no address of the witness");
        while let Some(done) = tries.join_next().await {
            match done {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(e)) => last = e,
                Err(e) => last = io::Error::other(e),
            }
        }
        Err(last)
    }
}

async fn read_replies(mut from: tokio::io::ReadHalf<Stream>, pending: Pending) {
    loop {
        match frame::read::<Reply>(&mut from, MAX_FRAME_BYTES).await {
            Ok(Some(reply)) => {
                if let Some(waits) = lock(&pending).remove(&reply.id) {
                    // Whoever asked may have given up.
                    let _ = waits.send(reply);
                }
            }
            Ok(None) => break,
            Err(e) => {
                tracing::debug!("the connection to the witness broke: {e}");
                break;
            }
        }
    }
    // Dropped senders tell everyone who waits.
    lock(&pending).clear();
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
