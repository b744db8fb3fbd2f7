//! Both sides of `havm pair`.
//!
//! ```text
//!   A: havm pair --accept -> CODE                B: havm pair ADDRESS CODE
//!                  <── TLS 1.3, both show a certificate, nobody is pinned ──
//!   Challenge{nonce}              ──>
//!                                 <── Join{nonce, proof, who}
//!   Welcome{proof, who, pair key} ──>            keeps pair.json
//!                                 <── Kept
//!   keeps pair.json, Kept         ──>            done
//! ```
//! Each proof binds the code to both certificates as its maker sees them (`proof.rs`). The key of
//! the heartbeats is random and goes only to a side that has proven the code. When the last word
//! does not come, B takes its file back: a half pair would look like a whole one.

use super::code::{Code, MAX_ATTEMPTS, VALID_S};
use super::proof::{Binding, Proof, Prover, check, prove};
use crate::frame;
use crate::identity_store::{Myself, PairFile, PairKey, StoreError};
use crate::random;
use havm_core::ids::NodeId;
use havm_links::identity::Fingerprint;
use havm_links::tls::{self, Trust};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const PURPOSE: &str = "havm pair v1";
/// Protocol name (ALPN) of pairing.
const ALPN_PAIR: &[u8] = b"havm-pair/1";
const MAX_FRAME_BYTES: usize = 16 * 1024;
/// How long one conversation may take.
const EXCHANGE: Duration = Duration::from_secs(15);
/// The wait after a wrong code: guesses are few anyway, and slow.
const AFTER_WRONG: Duration = Duration::from_millis(500);

/// This side.
#[derive(Debug, Clone)]
pub struct PairAs {
    /// Where identity and result are kept.
    pub state_dir: PathBuf,
    /// This node's name, as in the config.
    pub name: String,
    /// The peer's name as in the config, where it must be that one.
    pub expect_peer: Option<String>,
    /// Pair again although this node is paired already.
    pub replace: bool,
}

/// Why there is no pair.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// There is one already.
    #[error(
        "this node is paired already, with {0}; `havm pair --replace` on both nodes pairs anew"
    )]
    Paired(String),
    /// The address cannot be listened at.
    #[error(
        "cannot listen at {address}: {source}; is the address this machine's, and the port free (is havmd running and using it)?"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// No connection.
    #[error("cannot reach {address}: {source}; does `havm pair --accept` wait there?")]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// Nobody came in time.
    #[error("nobody came with the code within {VALID_S} seconds: start again")]
    Expired,
    /// Too many guesses.
    #[error(
        "{MAX_ATTEMPTS} wrong codes were tried: the code is void, start again (and look who tries)"
    )]
    TooManyAttempts,
    /// The accepting side said no.
    #[error("the other node refuses: {0}")]
    Refused(String),
    /// The accepting side does not know the code.
    #[error(
        "the other end does not know the code: somebody stands between the two nodes, or the address is wrong"
    )]
    NotTheOne,
    /// Another name than the config says.
    #[error(
        "the other node calls itself {found:?}, this node's config names its peer {expected:?}: correct one of both configs"
    )]
    OtherName {
        /// What it says.
        found: String,
        /// What the config says.
        expected: String,
    },
    /// Both ends are one node.
    #[error(
        "that is this node itself, or a copy of its state folder: give the other machine a state folder of its own"
    )]
    Myself,
    /// The conversation broke.
    #[error(
        "the pairing broke off ({0}); nothing is kept on this node, start again on both (with --replace where a node says that it is paired already)"
    )]
    Broken(String),
    /// A file.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Debug, Serialize, Deserialize)]
struct Challenge {
    nonce: [u8; 32],
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Who {
    node: NodeId,
    name: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Join {
    nonce: [u8; 32],
    proof: Proof,
    who: Who,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Welcome {
        proof: Proof,
        who: Who,
        pair_key: PairKey,
    },
    Refused {
        why: String,
    },
    Kept,
}

/// Waits for the other node to come with the code; ten minutes at most. `listening` is told the
/// address once it is listened at.
pub async fn accept(
    listen: SocketAddr,
    code: &Code,
    me: &PairAs,
    listening: impl FnOnce(SocketAddr),
) -> Result<PairFile, PairError> {
    let until = Instant::now() + Duration::from_secs(VALID_S);
    let myself = prepare(me)?;
    let bad = |source| PairError::Listen {
        address: listen,
        source,
    };
    let listener = TcpListener::bind(listen).await.map_err(bad)?;
    listening(listener.local_addr().map_err(bad)?);
    let tls = tls::server_config(&myself.identity, &Trust::AnyoneWhilePairing, ALPN_PAIR)
        .map_err(|e| PairError::Broken(e.to_string()))?;
    let tls = TlsAcceptor::from(tls);
    let mut wrong = 0;
    while wrong < MAX_ATTEMPTS {
        let accepted = timeout_at(until, listener.accept()).await;
        let Ok(accepted) = accepted else {
            return Err(PairError::Expired);
        };
        let talk = async {
            let (tcp, _) = accepted.map_err(broken)?;
            let stream = tls.accept(tcp).await.map_err(broken)?;
            let theirs = tls::peer_fingerprint(stream.get_ref().1.peer_certificates())
                .ok_or_else(|| PairError::Broken("no certificate".into()))?;
            welcome(stream, code, me, &myself, theirs).await
        };
        match timeout_at(until, timeout(EXCHANGE, talk)).await {
            Err(_) => return Err(PairError::Expired),
            Ok(Err(_)) => tracing::debug!("a connection that said nothing in time"),
            Ok(Ok(Ok(Some(pair)))) => return Ok(pair),
            Ok(Ok(Ok(None))) => {
                wrong += 1;
                tracing::warn!("somebody came with a wrong code");
                sleep(AFTER_WRONG).await;
            }
            // Port scanners and the like; whoever knows the code may try again.
            Ok(Ok(Err(PairError::Broken(why)))) => tracing::debug!("a connection broke off: {why}"),
            Ok(Ok(Err(e))) => return Err(e),
        }
    }
    Err(PairError::TooManyAttempts)
}

/// The accepting side of one conversation; `None`: it was a wrong code.
async fn welcome<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    code: &Code,
    me: &PairAs,
    myself: &Myself,
    theirs: Fingerprint,
) -> Result<Option<PairFile>, PairError> {
    let nonce = random::bytes().map_err(broken)?;
    send(&mut stream, &Challenge { nonce }).await?;
    let join: Join = receive(&mut stream).await?;
    let binding = Binding {
        purpose: PURPOSE,
        accepting: myself.identity.fingerprint(),
        joining: theirs,
        accepting_nonce: nonce,
        joining_nonce: join.nonce,
    };
    if !check(code, Prover::Joining, &binding, &join.proof) {
        // It may be gone already.
        let why = "wrong code".into();
        let _ = send(&mut stream, &Word::Refused { why }).await;
        return Ok(None);
    }
    // From here on the other side is the right one, and gets our reasons in full.
    let pair_key = PairKey(random::bytes().map_err(broken)?);
    let pair = match make_pair(me, myself, &join.who, theirs, pair_key.clone()) {
        Ok(p) => p,
        Err(e) => {
            let why = e.to_string();
            let _ = send(&mut stream, &Word::Refused { why }).await;
            return Err(e);
        }
    };
    let word = Word::Welcome {
        proof: prove(code, Prover::Accepting, &binding),
        who: Who {
            node: myself.node,
            name: me.name.clone(),
        },
        pair_key,
    };
    send(&mut stream, &word).await?;
    match receive::<Word>(&mut stream).await? {
        Word::Kept => {}
        Word::Refused { why } => return Err(PairError::Refused(short(&why))),
        Word::Welcome { .. } => return Err(PairError::Broken("an unexpected answer".into())),
    }
    if let Err(e) = pair.save(&me.state_dir) {
        let why = e.to_string();
        let _ = send(&mut stream, &Word::Refused { why }).await;
        return Err(e.into());
    }
    // If this is lost, the other side takes its file back and says so; then only `--replace` here
    // gets this node out of its half of a pair.
    if let Err(e) = send(&mut stream, &Word::Kept).await {
        PairFile::remove(&me.state_dir)?;
        return Err(e);
    }
    Ok(Some(pair))
}

/// Goes to the other node with the code that it printed.
pub async fn join(address: SocketAddr, code: &Code, me: &PairAs) -> Result<PairFile, PairError> {
    let myself = prepare(me)?;
    timeout(EXCHANGE, async {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|source| PairError::Unreachable { address, source })?;
        let config = tls::client_config(&myself.identity, &Trust::AnyoneWhilePairing, ALPN_PAIR)
            .map_err(|e| PairError::Broken(e.to_string()))?;
        let stream = TlsConnector::from(config)
            .connect(tls::server_name(), tcp)
            .await
            .map_err(broken)?;
        let theirs = tls::peer_fingerprint(stream.get_ref().1.peer_certificates())
            .ok_or_else(|| PairError::Broken("no certificate".into()))?;
        introduce(stream, code, me, &myself, theirs).await
    })
    .await
    .map_err(|_| PairError::Broken("the other node did not answer in time".into()))?
}

async fn introduce<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    code: &Code,
    me: &PairAs,
    myself: &Myself,
    theirs: Fingerprint,
) -> Result<PairFile, PairError> {
    let challenge: Challenge = receive(&mut stream).await?;
    let nonce = random::bytes().map_err(broken)?;
    let binding = Binding {
        purpose: PURPOSE,
        accepting: theirs,
        joining: myself.identity.fingerprint(),
        accepting_nonce: challenge.nonce,
        joining_nonce: nonce,
    };
    let join = Join {
        nonce,
        proof: prove(code, Prover::Joining, &binding),
        who: Who {
            node: myself.node,
            name: me.name.clone(),
        },
    };
    send(&mut stream, &join).await?;
    let (proof, who, pair_key) = match receive::<Word>(&mut stream).await? {
        Word::Welcome {
            proof,
            who,
            pair_key,
        } => (proof, who, pair_key),
        Word::Refused { why } => return Err(PairError::Refused(short(&why))),
        Word::Kept => return Err(PairError::Broken("an unexpected answer".into())),
    };
    if !check(code, Prover::Accepting, &binding, &proof) {
        return Err(PairError::NotTheOne);
    }
    let pair = match make_pair(me, myself, &who, theirs, pair_key) {
        Ok(p) => p,
        Err(e) => {
            let why = e.to_string();
            let _ = send(&mut stream, &Word::Refused { why }).await;
            return Err(e);
        }
    };
    let before = PairFile::load(&me.state_dir).ok().flatten();
    let mut undo = TakeBack {
        me,
        before,
        armed: true,
    };
    pair.save(&me.state_dir)?;
    send(&mut stream, &Word::Kept).await?;
    match receive::<Word>(&mut stream).await? {
        Word::Kept => {
            undo.armed = false;
            Ok(pair)
        }
        Word::Refused { why } => Err(PairError::Refused(short(&why))),
        Word::Welcome { .. } => Err(PairError::Broken("an unexpected answer".into())),
    }
}

/// Puts back what was there before, unless the other side has kept the pair too. Also when the
/// conversation is cut by its time limit.
struct TakeBack<'a> {
    me: &'a PairAs,
    before: Option<PairFile>,
    armed: bool,
}

impl Drop for TakeBack<'_> {
    fn drop(&mut self) {
        if self.armed {
            let undone = match &self.before {
                Some(old) => old.save(&self.me.state_dir),
                None => PairFile::remove(&self.me.state_dir),
            };
            if let Err(e) = undone {
                tracing::error!(
                    "the half pairing could not be taken back: {e}; pair again with --replace"
                );
            }
        }
    }
}

fn prepare(me: &PairAs) -> Result<Myself, PairError> {
    if !me.replace
        && let Some(p) = PairFile::load(&me.state_dir)?
    {
        return Err(PairError::Paired(p.peer_name));
    }
    Ok(Myself::load_or_create(&me.state_dir)?)
}

fn make_pair(
    me: &PairAs,
    myself: &Myself,
    who: &Who,
    fingerprint: Fingerprint,
    pair_key: PairKey,
) -> Result<PairFile, PairError> {
    if who.node == myself.node || fingerprint == myself.identity.fingerprint() {
        return Err(PairError::Myself);
    }
    let found = short(&who.name);
    if let Some(expected) = &me.expect_peer
        && *expected != found
    {
        let expected = expected.clone();
        return Err(PairError::OtherName { found, expected });
    }
    Ok(PairFile {
        version: 1,
        node: myself.node,
        peer: who.node,
        peer_name: found,
        peer_fingerprint: fingerprint,
        pair_key,
    })
}

/// What another machine says, fit to be shown.
fn short(s: &str) -> String {
    let shown = s.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.take(300).collect()
}

fn broken(e: impl std::fmt::Display) -> PairError {
    PairError::Broken(e.to_string())
}

async fn send<S: AsyncWrite + Unpin>(s: &mut S, v: &impl Serialize) -> Result<(), PairError> {
    frame::write(s, v, MAX_FRAME_BYTES).await.map_err(broken)
}

async fn receive<T: serde::de::DeserializeOwned>(
    s: &mut (impl AsyncRead + Unpin),
) -> Result<T, PairError> {
    frame::read(s, MAX_FRAME_BYTES)
        .await
        .map_err(broken)?
        .ok_or_else(|| PairError::Broken("the other end closed the connection".into()))
}
