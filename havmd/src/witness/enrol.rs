//! Making a pair known to a witness, by a one-time code that the operator carries.
//!
//! ```text
//!   witness                                         node (knows its peer already)
//!   havm witness --enrol  -> CODE, enrol.json
//!                          <── TLS, nobody pinned ──
//!   Challenge{nonce}      ──>
//!                          <── Join{nonce, proof, both members}
//!   Welcome{proof, incarnation} ──>                 pins the witness's certificate
//! ```
//! The other node of the pair does the same with the same code (or is told the pin by its peer).

use super::register::Member;
use super::{ALPN_ENROL, MAX_FRAME_BYTES};
use crate::durable;
use crate::frame;
use crate::identity_store::{self, Myself, PairFile, StoreError, WitnessPin, file_error};
use crate::pairing::code::{Code, MAX_ATTEMPTS, VALID_S};
use crate::pairing::proof::{Binding, Proof, Prover, check, prove};
use crate::random;
use havm_core::ids::{Incarnation, NodeId};
use havm_links::identity::Fingerprint;
use havm_links::tls;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

const PURPOSE: &str = "havm enrolment at a witness v1";
/// How long the whole exchange may take.
const EXCHANGE: Duration = Duration::from_secs(15);

/// Why a pair is not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolFailure {
    /// No connection.
    #[error(
        "cannot reach the witness at {address}: {source}; does `havm witness` run there, and may this machine connect to it?"
    )]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// It said no.
    #[error("the witness refuses: {0}")]
    Refused(String),
    /// It does not know the code.
    #[error(
        "the other end does not know the code: it is not the witness that printed it (is the address right?)"
    )]
    NotTheWitness,
    /// Nobody to enrol with.
    #[error("this node is not paired yet: `havm pair` first, a witness serves pairs")]
    NotPaired,
    /// The conversation broke.
    #[error(
        "the enrolment broke off: {0}; make a new code with `havm witness --enrol` and try again"
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

#[derive(Debug, Serialize, Deserialize)]
struct Join {
    nonce: [u8; 32],
    proof: Proof,
    members: [Member; 2],
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Welcome {
        proof: Proof,
        incarnation: Incarnation,
    },
    Refused {
        why: String,
    },
}

/// What waits in the witness's folder for a node to come.
#[derive(Debug, Serialize, Deserialize)]
struct Waiting {
    code: String,
    expires_unix_s: u64,
    wrong_attempts: u32,
    /// The pair that used it once: its other node may use it too.
    used_by: Option<[NodeId; 2]>,
}

fn waiting_path(dir: &Path) -> PathBuf {
    dir.join("enrol.json")
}

fn now_unix_s() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// Makes a code for one pair, valid ten minutes, replacing an earlier one. A running witness with
/// this state folder accepts it.
pub fn new_code(dir: &Path) -> Result<Code, StoreError> {
    let code = Code::random().map_err(file_error("make a code for", &waiting_path(dir)))?;
    put_code(dir, &code)?;
    Ok(code)
}

/// The same with a code that both sides have already (`--code-file`).
pub fn put_code(dir: &Path, code: &Code) -> Result<(), StoreError> {
    let waiting = Waiting {
        code: code.to_string(),
        expires_unix_s: now_unix_s() + VALID_S,
        wrong_attempts: 0,
        used_by: None,
    };
    identity_store::save(&waiting_path(dir), &waiting)
}

/// The witness's side; `keep` makes the roster durable.
pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    dir: &Path,
    mine: Fingerprint,
    theirs: Fingerprint,
    keep: impl AsyncFnOnce([Member; 2]) -> Result<Incarnation, String>,
) -> io::Result<()> {
    let nonce = random::bytes()?;
    frame::write(stream, &Challenge { nonce }, MAX_FRAME_BYTES).await?;
    let Some(join) = frame::read::<Join>(stream, MAX_FRAME_BYTES).await? else {
        return Ok(());
    };
    let binding = Binding {
        purpose: PURPOSE,
        accepting: mine,
        joining: theirs,
        accepting_nonce: nonce,
        joining_nonce: join.nonce,
    };
    let verdict = match judge(dir, &join, &binding) {
        Err(why) => Verdict::Refused { why },
        Ok(code) => match keep(join.members).await {
            Err(why) => Verdict::Refused { why },
            Ok(incarnation) => Verdict::Welcome {
                proof: prove(&code, Prover::Accepting, &binding),
                incarnation,
            },
        },
    };
    frame::write(stream, &verdict, MAX_FRAME_BYTES).await
}

/// Whether the code that waits here was proven; uses it up.
fn judge(dir: &Path, join: &Join, binding: &Binding) -> Result<Code, String> {
    let path = waiting_path(dir);
    let internal = |e: StoreError| e.to_string();
    let none = "no code waits here (wrong, used or older than ten minutes): make one with `havm witness --enrol`";
    let waiting: Option<Waiting> =
        identity_store::load(&path, "make a new code").map_err(internal)?;
    let Some(mut waiting) = waiting else {
        return Err(none.into());
    };
    let forget = || durable::remove(&path).map_err(|e| file_error("remove", &path)(e).to_string());
    let code: Code = waiting.code.parse().map_err(|_| none.to_owned())?;
    if now_unix_s() >= waiting.expires_unix_s {
        forget()?;
        return Err(none.into());
    }
    if !check(&code, Prover::Joining, binding, &join.proof) {
        waiting.wrong_attempts += 1;
        if waiting.wrong_attempts >= MAX_ATTEMPTS {
            forget()?;
        } else {
            identity_store::save(&path, &waiting).map_err(internal)?;
        }
        return Err("wrong code".into());
    }
    if !join
        .members
        .iter()
        .any(|m| m.fingerprint == binding.joining)
        || join.members.iter().any(|m| m.name.len() > 100)
    {
        return Err("a node can enrol only the pair that it is in".into());
    }
    let mut pair = join.members.each_ref().map(|m| m.node);
    pair.sort_unstable();
    match waiting.used_by {
        None => {
            waiting.used_by = Some(pair);
            identity_store::save(&path, &waiting).map_err(internal)?;
        }
        Some(first) if first == pair => forget()?,
        Some(_) => return Err("this code was used by another pair".into()),
    }
    Ok(code)
}

/// `havm pair --witness ADDRESS CODE`: enrols this node, called `name`, and the peer that it is
/// paired with. Run it on both nodes, with the same code.
pub async fn enrol_pair(
    address: SocketAddr,
    code: &Code,
    name: &str,
    state_dir: &Path,
) -> Result<WitnessPin, EnrolFailure> {
    let me = Myself::load_or_create(state_dir)?;
    let pair = PairFile::load(state_dir)?.ok_or(EnrolFailure::NotPaired)?;
    let mine = Member {
        node: me.node,
        name: name.to_owned(),
        fingerprint: me.identity.fingerprint(),
    };
    let peer = Member {
        node: pair.peer,
        name: pair.peer_name,
        fingerprint: pair.peer_fingerprint,
    };
    enrol(address, code, &me, [mine, peer], state_dir).await
}

/// The node's side: enrols this node and its peer, and keeps the witness's pin in `state_dir`.
pub async fn enrol(
    address: SocketAddr,
    code: &Code,
    me: &Myself,
    members: [Member; 2],
    state_dir: &Path,
) -> Result<WitnessPin, EnrolFailure> {
    let broken = |e: &dyn std::fmt::Display| EnrolFailure::Broken(e.to_string());
    let exchange = async {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|source| EnrolFailure::Unreachable { address, source })?;
        let config = tls::client_config(&me.identity, &tls::Trust::AnyoneWhilePairing, ALPN_ENROL)
            .map_err(|e| broken(&e))?;
        let mut stream = tokio_rustls::TlsConnector::from(config)
            .connect(tls::server_name(), tcp)
            .await
            .map_err(|e| broken(&e))?;
        let theirs = tls::peer_fingerprint(stream.get_ref().1.peer_certificates())
            .ok_or_else(|| broken(&"the witness showed no certificate"))?;
        let closed = || broken(&"the witness closed the connection");
        let challenge: Challenge = frame::read(&mut stream, MAX_FRAME_BYTES)
            .await
            .map_err(|e| broken(&e))?
            .ok_or_else(closed)?;
        let nonce = random::bytes().map_err(|e| broken(&e))?;
        let binding = Binding {
            purpose: PURPOSE,
            accepting: theirs,
            joining: me.identity.fingerprint(),
            accepting_nonce: challenge.nonce,
            joining_nonce: nonce,
        };
        let join = Join {
            nonce,
            proof: prove(code, Prover::Joining, &binding),
            members,
        };
        frame::write(&mut stream, &join, MAX_FRAME_BYTES)
            .await
            .map_err(|e| broken(&e))?;
        let verdict: Verdict = frame::read(&mut stream, MAX_FRAME_BYTES)
            .await
            .map_err(|e| broken(&e))?
            .ok_or_else(closed)?;
        match verdict {
            Verdict::Refused { why } => Err(EnrolFailure::Refused(why.chars().take(500).collect())),
            Verdict::Welcome { proof, incarnation } => {
                if !check(code, Prover::Accepting, &binding, &proof) {
                    return Err(EnrolFailure::NotTheWitness);
                }
                Ok(WitnessPin {
                    fingerprint: theirs,
                    incarnation,
                })
            }
        }
    };
    let pin = timeout(EXCHANGE, exchange)
        .await
        .map_err(|_| broken(&"it took too long"))??;
    pin.save(state_dir)?;
    Ok(pin)
}
