//! Who this node is, and whom it has met: what `STATE_DIR` keeps beside the guests' records.
//!
//! ```text
//!   identity/identity.pem   this node's key and certificate (the replicator reads it too)
//!   identity/node_id        this node's random id
//!   pair.json               the peer: id, name, certificate, and the key of the heartbeats
//!   witness.json            the witness: certificate and incarnation
//! ```
//! All are 0600 in a 0700 folder, and replaced atomically.

use crate::durable;
use crate::random::RandomId;
use havm_core::ids::{Incarnation, NodeId};
use havm_links::identity::{Fingerprint, Identity, IdentityError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

const MAX_FILE_BYTES: usize = 64 * 1024;

/// What cannot be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not what havm writes there.
    #[error("{} is damaged ({why}): remove it and {remedy}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
        /// What makes a new one.
        remedy: &'static str,
    },
    /// The key or certificate.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// This node.
#[derive(Debug, Clone)]
pub struct Myself {
    /// Its random id; a replaced machine has another one.
    pub node: NodeId,
    /// Its key and certificate.
    pub identity: Identity,
}

impl Myself {
    /// The folder of the key, for the replicator's spec.
    pub fn identity_dir(state_dir: &Path) -> PathBuf {
        state_dir.join("identity")
    }

    /// Loads what is there, or makes it at the first start.
    pub fn load_or_create(state_dir: &Path) -> Result<Self, StoreError> {
        let dir = Self::identity_dir(state_dir);
        durable::make_folder(&dir).map_err(file_error("make", &dir))?;
        let identity = Identity::load_or_generate(&dir.join("identity.pem"))?;
        let path = dir.join("node_id");
        let node = match Self::node_id(state_dir)? {
            Some(node) => node,
            None => {
                let node = NodeId::random().map_err(file_error("make", &path))?;
                durable::replace(&path, format!("{node}\n").as_bytes())
                    .map_err(file_error("write", &path))?;
                node
            }
        };
        Ok(Myself { node, identity })
    }

    fn node_id(state_dir: &Path) -> Result<Option<NodeId>, StoreError> {
        let path = Self::identity_dir(state_dir).join("node_id");
        let read = durable::read_bounded(&path, 64).map_err(file_error("read", &path))?;
        let Some(bytes) = read else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes);
        text.trim()
            .parse()
            .map(Some)
            .map_err(|e: havm_core::ids::IdError| StoreError::Damaged {
                path,
                why: e.to_string(),
                remedy: "pair again: this machine then counts as a new one",
            })
    }
}

/// The peer, as pairing left it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairFile {
    /// Format, 1.
    pub version: u32,
    /// This node's id when it paired: a copied file is noticed.
    pub node: NodeId,
    /// The peer's id.
    pub peer: NodeId,
    /// The peer's name when it paired.
    pub peer_name: String,
    /// The peer's certificate, pinned.
    pub peer_fingerprint: Fingerprint,
    /// The key that only both nodes have, 64 hexadecimal digits: authenticates the heartbeats.
    pub pair_key: PairKey,
}

impl std::fmt::Debug for PairFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PairFile(with {} {:?})", self.peer_name, self.peer)
    }
}

/// 32 random bytes that only both nodes have. Never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PairKey(pub [u8; 32]);

impl TryFrom<String> for PairKey {
    type Error = &'static str;
    fn try_from(s: String) -> Result<Self, Self::Error> {
        let f: Fingerprint = s
            .parse()
            .map_err(|_| "a pair key has 64 hexadecimal digits")?;
        Ok(PairKey(f.0))
    }
}
impl From<PairKey> for String {
    fn from(k: PairKey) -> String {
        Fingerprint(k.0).to_string()
    }
}
impl std::fmt::Debug for PairKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PairKey(...)")
    }
}

impl PairFile {
    /// Where it is.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("pair.json")
    }
    /// What pairing left; none before. One that another node made is not obeyed.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, StoreError> {
        const REMEDY: &str = "pair again (`havm pair` on both nodes)";
        let path = Self::path(state_dir);
        let Some(pair) = load::<Self>(&path, REMEDY)? else {
            return Ok(None);
        };
        match Myself::node_id(state_dir)? {
            Some(me) if me != pair.node => Err(StoreError::Damaged {
                path,
                why: format!("node {} made it, this is node {me}", pair.node),
                remedy: REMEDY,
            }),
            _ => Ok(Some(pair)),
        }
    }
    /// Keeps it, durably.
    pub fn save(&self, state_dir: &Path) -> Result<(), StoreError> {
        save(&Self::path(state_dir), self)
    }
    /// Removes it, durably.
    pub fn remove(state_dir: &Path) -> Result<(), StoreError> {
        let path = Self::path(state_dir);
        durable::remove(&path).map_err(file_error("remove", &path))
    }
}

/// The witness, as enrolment left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessPin {
    /// Its certificate, pinned.
    pub fingerprint: Fingerprint,
    /// Its incarnation at enrolment.
    pub incarnation: Incarnation,
}

impl WitnessPin {
    /// Where it is.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("witness.json")
    }
    /// What enrolment left; none before.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, StoreError> {
        load(
            &Self::path(state_dir),
            "enrol again (`havm pair --witness`)",
        )
    }
    /// Keeps it, durably.
    pub fn save(&self, state_dir: &Path) -> Result<(), StoreError> {
        save(&Self::path(state_dir), self)
    }
}

/// Reads a small JSON file; none where there is none.
pub(crate) fn load<T: DeserializeOwned>(
    path: &Path,
    remedy: &'static str,
) -> Result<Option<T>, StoreError> {
    let bytes = durable::read_bounded(path, MAX_FILE_BYTES).map_err(file_error("read", path))?;
    let Some(bytes) = bytes else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| StoreError::Damaged {
            path: path.into(),
            why: e.to_string(),
            remedy,
        })
}

/// Replaces a small JSON file, durably.
pub(crate) fn save(path: &Path, value: &impl Serialize) -> Result<(), StoreError> {
    let err = file_error("write", path);
    if let Some(folder) = path.parent() {
        durable::make_folder(folder).map_err(file_error("make", folder))?;
    }
    let bytes = match serde_json::to_vec_pretty(value) {
        Ok(b) => b,
        Err(e) => return Err(err(e.into())),
    };
    durable::replace(path, &bytes).map_err(err)
}

pub(crate) fn file_error(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_path_buf();
    move |source| StoreError::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_stays_itself_and_a_new_state_folder_is_a_new_node() {
        let dir = tempfile::tempdir().unwrap();
        let a = Myself::load_or_create(&dir.path().join("x/y")).unwrap();
        let b = Myself::load_or_create(&dir.path().join("x/y")).unwrap();
        assert_eq!(a.node, b.node);
        assert_eq!(a.identity.fingerprint(), b.identity.fingerprint());
        let c = Myself::load_or_create(&dir.path().join("z")).unwrap();
        assert_ne!(a.node, c.node);
        std::fs::write(dir.path().join("z/identity/node_id"), "nonsense").unwrap();
        let e = Myself::load_or_create(&dir.path().join("z")).unwrap_err();
        assert!(e.to_string().contains("pair again"), "{e}");
    }

    #[test]
    fn the_pair_is_kept_and_its_key_is_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(PairFile::load(dir.path()).unwrap(), None);
        let p = PairFile {
            version: 1,
            node: NodeId([1; 16]),
            peer: NodeId([2; 16]),
            peer_name: "beta".into(),
            peer_fingerprint: Fingerprint([3; 32]),
            pair_key: PairKey([0xcd; 32]),
        };
        p.save(dir.path()).unwrap();
        assert_eq!(PairFile::load(dir.path()).unwrap(), Some(p.clone()));
        assert!(!format!("{p:?} {:?}", p.pair_key).contains("cdcd"));
        // A pair file that another node made (a folder put together from two) is not obeyed.
        Myself::load_or_create(dir.path()).unwrap();
        let e = PairFile::load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("pair again"), "{e}");
        std::fs::write(PairFile::path(dir.path()), "{}").unwrap();
        assert!(PairFile::load(dir.path()).is_err());
    }
}
