//! Who a node is: a key and a self-signed certificate, known to the peer by its fingerprint.
//!
//! One file holds both, so that a crash can never leave a key beside another key's certificate.
//! It is written aside with mode 0600, synced, renamed, and the folder synced.

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Largest identity file that is read, bytes. A real one has about 1 KiB.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The key or certificate could not be made.
    #[error("cannot make a key and certificate: {0}")]
    Generate(String),
    /// A file operation failed.
    #[error("cannot {what} the identity file {}: {source}", path.display())]
    File {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not what this module writes.
    #[error(
        "the identity file {} is damaged ({why}): restore it, or remove it and pair again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Others may read the key.
    #[error(
        "the identity file {} has mode {mode:04o}: others may read the key; set it to 0600 (and pair again if that matters)",
        path.display()
    )]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

/// SHA-256 of a certificate's DER form: the name by which a peer is known and pinned.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(cert: &CertificateDer<'_>) -> Self {
        Fingerprint(Sha256::digest(cert.as_ref()).into())
    }
}
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// A text that is not a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a fingerprint has 64 hexadecimal digits (colons allowed), got {0:?}; `havm pair` shows the right one"
)]
pub struct FingerprintError(String);

impl FromStr for Fingerprint {
    type Err = FingerprintError;
    fn from_str(s: &str) -> Result<Self, FingerprintError> {
        let bad = || FingerprintError(s.chars().take(100).collect());
        let digits: Vec<u8> = s
            .chars()
            .filter(|c| *c != ':')
            .take(65)
            .map(|c| c.to_digit(16).map(|d| d as u8).ok_or_else(bad))
            .collect::<Result<_, _>>()?;
        if digits.len() != 64 {
            return Err(bad());
        }
        let mut out = [0u8; 32];
        for (o, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
            *o = pair[0] << 4 | pair[1];
        }
        Ok(Fingerprint(out))
    }
}
impl TryFrom<String> for Fingerprint {
    type Error = FingerprintError;
    fn try_from(s: String) -> Result<Self, FingerprintError> {
        s.parse()
    }
}
impl From<Fingerprint> for String {
    fn from(f: Fingerprint) -> String {
        f.to_string()
    }
}

/// A node's key and certificate.
#[derive(Clone)]
pub struct Identity {
    cert: CertificateDer<'static>,
    key_pkcs8: Vec<u8>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        write!(f, "Identity({})", self.fingerprint())
    }
}

impl Identity {
    /// A new ECDSA P-256 key with a self-signed certificate. The certificate's dates mean nothing
    /// to this product: pinning, not time, decides.
    pub fn generate() -> Result<Self, IdentityError> {
        let fail = |e: rcgen::Error| IdentityError::Generate(e.to_string());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(fail)?;
        let mut params = CertificateParams::new(Vec::<String>::new()).map_err(fail)?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "havm node");
        let cert = params.self_signed(&key).map_err(fail)?;
        Ok(Identity {
            cert: cert.der().clone(),
            key_pkcs8: key.serialize_der(),
        })
    }

    /// The certificate's fingerprint, to be pinned by the peer.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.cert)
    }

    /// The certificate.
    pub fn cert(&self) -> &CertificateDer<'static> {
        &self.cert
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key_pkcs8.clone()))
    }

    /// Writes it durably to `path`, readable by its owner only.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let err = |what| {
            move |source| IdentityError::File {
                what,
                path: path.into(),
                source,
            }
        };
        let pem =
            pem_section("PRIVATE KEY", &self.key_pkcs8) + &pem_section("CERTIFICATE", &self.cert);
        let mut aside = path.as_os_str().to_owned();
        aside.push(".new");
        let aside = PathBuf::from(aside);
        match fs::remove_file(&aside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(err("replace")(e)),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside)
            .map_err(err("create"))?;
        file.write_all(pem.as_bytes()).map_err(err("write"))?;
        file.sync_all().map_err(err("sync"))?;
        fs::rename(&aside, path).map_err(err("rename"))?;
        let folder = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|d| d.sync_all())
            .map_err(err("sync the folder of"))
    }

    /// Reads what [`Identity::save`] wrote.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let err = |what| {
            move |source| IdentityError::File {
                what,
                path: path.into(),
                source,
            }
        };
        let damaged = |why: String| IdentityError::Damaged {
            path: path.into(),
            why,
        };
        let file = File::open(path).map_err(err("open"))?;
        let mode = file.metadata().map_err(err("look at"))?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::TooOpen {
                path: path.into(),
                mode,
            });
        }
        let mut pem = Vec::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut pem)
            .map_err(err("read"))?;
        if pem.len() as u64 > MAX_FILE_BYTES {
            return Err(damaged(format!("larger than {MAX_FILE_BYTES} bytes")));
        }
        let cert = CertificateDer::from_pem_slice(&pem)
            .map_err(|e| damaged(format!("no certificate: {e}")))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(&pem)
            .map_err(|e| damaged(format!("no private key: {e}")))?;
        let identity = Identity {
            cert,
            key_pkcs8: key.secret_pkcs8_der().to_vec(),
        };
        identity.check().map_err(damaged)?;
        Ok(identity)
    }

    /// Reads the identity of `path`, or makes and saves one where there is no file.
    pub fn load_or_generate(path: &Path) -> Result<Self, IdentityError> {
        match Self::load(path) {
            Err(IdentityError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let identity = Self::generate()?;
                identity.save(path)?;
                Ok(identity)
            }
            other => other,
        }
    }

    /// The key is usable and belongs to the certificate.
    fn check(&self) -> Result<(), String> {
        let provider = rustls::crypto::ring::default_provider();
        rustls::sign::CertifiedKey::from_der(vec![self.cert.clone()], self.key(), &provider)
            .map(drop)
            .map_err(|e| format!("key and certificate do not fit: {e}"))
    }
}

/// PEM text of one section: 64 columns of base64 between its two lines.
fn pem_section(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in der.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let index = (word >> (18 - 6 * i)) & 63;
            text.push(if i <= chunk.len() {
                char::from(ALPHABET[index as usize])
            } else {
                '='
            });
        }
    }
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .map(|l| std::str::from_utf8(l).unwrap_or_default())
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_was_saved_is_loaded_and_only_the_owner_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.pem");
        let made = Identity::load_or_generate(&path).unwrap();
        let loaded = Identity::load_or_generate(&path).unwrap();
        assert_eq!(made.fingerprint(), loaded.fingerprint());
        assert_eq!(made.key_pkcs8, loaded.key_pkcs8);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::TooOpen { .. })
        ));
    }

    #[test]
    fn a_key_beside_another_certificate_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.pem");
        let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        Identity {
            cert: a.cert,
            key_pkcs8: b.key_pkcs8,
        }
        .save(&path)
        .unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::Damaged { .. })
        ));
    }

    #[test]
    fn fingerprints_are_read_with_and_without_colons() {
        let f = Identity::generate().unwrap().fingerprint();
        assert_eq!(f.to_string().parse(), Ok(f));
        let with: Vec<String> = f.0.iter().map(|b| format!("{b:02X}")).collect();
        assert_eq!(with.join(":").parse(), Ok(f));
        assert!("abc".parse::<Fingerprint>().is_err());
        assert!("ü".repeat(64).parse::<Fingerprint>().is_err());
    }
}
