//! The control socket, `RUN_DIR/havmd.sock` (0600): how `havm` talks to `havmd`.
//!
//! One connection, one request: a JSON line; then answers, a JSON line each: any number of
//! [`Answer::Progress`] and [`Answer::Event`], at last one [`Answer::Done`] or [`Answer::Failed`].

use crate::events::Entry;
use havm_core::ids::GuestName;
use havm_core::status::Status;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// The longest request or answer.
pub const MAX_LINE_BYTES: u64 = 4 * 1024 * 1024;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a reader may leave an answer unread.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Request {
    /// Everything about this node: [`HostStatus`].
    Status,
    /// Protect a guest.
    Protect {
        /// Which.
        guest: GuestName,
        /// Only show what would be done.
        dry_run: bool,
        /// Its home; this node where none is named.
        home: Option<String>,
        /// A running guest may be shut down and started again for it.
        restart: bool,
    },
    /// End a guest's protection.
    Unprotect {
        /// Which.
        guest: GuestName,
        /// A running guest may be shut down and started again for it.
        restart: bool,
    },
    /// Something for a guest's engine.
    Operate {
        /// Which.
        guest: GuestName,
        /// What.
        op: Op,
    },
    /// Compare both sides.
    Verify {
        /// Which.
        guest: GuestName,
    },
    /// The last events, and those to come.
    Events {
        /// How many of the past.
        last: usize,
        /// Only this guest's.
        guest: Option<GuestName>,
        /// Go on as they come.
        follow: bool,
    },
}

/// What an operator may ask of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Move the guest to the other node.
    Switchover,
    /// Move it home.
    Failback,
    /// Run it.
    Start,
    /// Shut it down.
    Stop,
    /// Take over without an arbiter's word: the operator vouches that the peer is off.
    ForcePromote,
    /// Give this node's copy up after a conflict.
    DiscardMine,
}

/// One line of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// What goes on, for a person.
    Progress {
        /// Plain words.
        text: String,
    },
    /// An event.
    Event {
        /// It.
        entry: Entry,
    },
    /// The end: it was done (or begun, where the command says so).
    Done {
        /// What was asked for, by the request's kind.
        value: serde_json::Value,
    },
    /// The end: it was not done.
    Failed {
        /// Why, and what to do.
        text: String,
        /// It would have been wrong or dangerous now; nothing is broken.
        not_safe: bool,
    },
}

/// The answer to [`Request::Status`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// havm's version.
    pub version: String,
    /// When the daemon started, milliseconds since 1970; times in `status` count from there.
    pub started_at_ms: u64,
    /// Now.
    pub now_ms: u64,
    /// What is wrong with this node as a whole (not paired, config differs from the peer's …).
    pub faults: Vec<String>,
    /// Everything.
    pub status: Status,
}

/// The answer to [`Request::Verify`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// All of RAM was equal.
    pub memory_equal: bool,
    /// All of every disk was equal.
    pub disk_equal: bool,
    /// Pages that differ.
    pub ram_different: u64,
    /// Pages compared.
    pub ram_pages: u64,
    /// Disk blocks that differ.
    pub disk_different: u64,
    /// Disk blocks compared.
    pub disk_blocks: u64,
}

/// Where a handler puts its answers.
#[derive(Clone)]
pub struct Answers(mpsc::Sender<Answer>);

impl Answers {
    /// Says what goes on. A reader that went away is noticed by the others.
    pub async fn progress(&self, text: impl Into<String>) {
        let _ = self.0.send(Answer::Progress { text: text.into() }).await;
    }
    /// Passes an event on; false when nobody reads any more.
    pub async fn event(&self, entry: Entry) -> bool {
        self.0.send(Answer::Event { entry }).await.is_ok()
    }
    /// Ends well.
    pub async fn done<T: Serialize>(&self, value: &T) {
        let end = match serde_json::to_value(value) {
            Ok(value) => Answer::Done { value },
            Err(e) => Answer::Failed {
                text: e.to_string(),
                not_safe: false,
            },
        };
        let _ = self.0.send(end).await;
    }
    /// Ends badly.
    pub async fn failed(&self, text: impl Into<String>) {
        let _ = self
            .0
            .send(Answer::Failed {
                text: text.into(),
                not_safe: false,
            })
            .await;
    }
    /// Refuses for safety's sake.
    pub async fn not_safe(&self, text: impl Into<String>) {
        let _ = self
            .0
            .send(Answer::Failed {
                text: text.into(),
                not_safe: true,
            })
            .await;
    }
}

/// Takes requests; one at a time from each connection.
pub type Handler = Arc<dyn Fn(Request, Answers) + Send + Sync>;

/// Binds the socket. An old one is removed: the caller holds the daemon's lock.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves for ever.
pub async fn serve(listener: UnixListener, handler: Handler) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept().await {
            Ok((s, _)) => s,
            Err(e) => {
                // Out of descriptors, for example: wait instead of spinning.
                tracing::warn!(error = %e, "the control socket cannot accept");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        if open.load(Ordering::SeqCst) >= MAX_CONNECTIONS {
            tracing::warn!("over {MAX_CONNECTIONS} control connections; one was refused");
            continue;
        }
        open.fetch_add(1, Ordering::SeqCst);
        let (handler, open) = (handler.clone(), open.clone());
        tokio::spawn(async move {
            if let Err(e) = converse(stream, handler).await {
                tracing::debug!(error = %e, "control connection");
            }
            open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

async fn converse(stream: UnixStream, handler: Handler) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    let mut bounded = (&mut read).take(MAX_LINE_BYTES);
    tokio::time::timeout(REQUEST_TIMEOUT, bounded.read_until(b'\n', &mut line)).await??;
    let (tx, mut rx) = mpsc::channel(64);
    match serde_json::from_slice::<Request>(&line) {
        Ok(request) => handler(request, Answers(tx)),
        Err(e) => {
            let text =
                format!("not a request of this version: {e}; are havm and havmd of one version?");
            let _ = tx
                .send(Answer::Failed {
                    text,
                    not_safe: false,
                })
                .await;
            drop(tx);
        }
    }
    let mut byte = [0u8; 1];
    loop {
        let answer = tokio::select! {
            a = rx.recv() => match a {
                Some(a) => a,
                // The handler gave no end: its task failed.
                None => Answer::Failed { text: "havmd could not finish this; see its log".into(), not_safe: false },
            },
            // Closed by the reader: the handler notices when its channel is gone.
            _ = read.read(&mut byte) => return Ok(()),
        };
        let end = matches!(answer, Answer::Done { .. } | Answer::Failed { .. });
        let mut out = serde_json::to_vec(&answer)?;
        out.push(b'\n');
        tokio::time::timeout(ANSWER_TIMEOUT, write.write_all(&out)).await??;
        if end {
            return Ok(());
        }
    }
}

/// The other end, for `havm`: blocking, line by line.
pub struct Client {
    reader: std::io::BufReader<std::os::unix::net::UnixStream>,
}

impl Client {
    /// Connects and asks.
    pub fn ask(socket: &Path, request: &Request) -> io::Result<Client> {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        Ok(Client {
            reader: std::io::BufReader::new(stream),
        })
    }

    /// The next answer; an error where the daemon went away before the end.
    pub fn next_answer(&mut self) -> io::Result<Answer> {
        use std::io::{BufRead, Read};
        let mut line = Vec::new();
        (&mut self.reader)
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_slice(&line)?)
    }
}
