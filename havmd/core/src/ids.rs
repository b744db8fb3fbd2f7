//! Newtypes for everything that has a name or a number, so that none can stand in for another.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not 32 hexadecimal digits.
    #[error("expected 32 hexadecimal digits, got {0:?}")]
    NotHex(String),
    /// Not a usable guest name.
    #[error(
        "guest name {0:?} is not usable: 1 to 50 of a-z A-Z 0-9 _ . + -, starting with a letter or digit"
    )]
    GuestName(String),
}

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Eight digits tell ids apart in a log line.
                write!(f, concat!(stringify!($name), "("))?;
                self.0[..4].iter().try_for_each(|b| write!(f, "{b:02x}"))?;
                write!(f, ")")
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                let bad = || IdError::NotHex(s.chars().take(40).collect());
                if s.len() != 32 || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(bad());
                }
                let mut out = [0u8; 16];
                for (i, o) in out.iter_mut().enumerate() {
                    *o = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
                }
                Ok($name(out))
            }
        }
        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(s: String) -> Result<Self, IdError> { s.parse() }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String { id.to_string() }
        }
    };
}

id128!(
    /// A server, by a random number made at its first start: never by its name.
    NodeId
);
id128!(
    /// One life of a guest's copy on one node: new whenever host boot, guest process or committed
    /// RAM image is lost (rule 1).
    LifeId
);
id128!(
    /// One capture session of a primary: a new one starts with an empty gate map (rule 1).
    StreamId
);
id128!(
    /// The generation of a guest's data: new at every take (rule 7).
    GenId
);
id128!(
    /// One initialisation of a witness (rule 13).
    Incarnation
);

/// A guest's name, the libvirt domain's.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestName(String);

impl GuestName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl TryFrom<String> for GuestName {
    type Error = IdError;
    fn try_from(s: String) -> Result<Self, IdError> {
        let ok = (1..=50).contains(&s.len())
            && s.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.+-".contains(&b))
            && s.as_bytes()[0].is_ascii_alphanumeric();
        if ok {
            Ok(GuestName(s))
        } else {
            Err(IdError::GuestName(s.chars().take(60).collect()))
        }
    }
}
impl FromStr for GuestName {
    type Err = IdError;
    fn from_str(s: &str) -> Result<Self, IdError> {
        s.to_owned().try_into()
    }
}
impl From<GuestName> for String {
    fn from(g: GuestName) -> String {
        g.0
    }
}
impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Which of several claims to a guest is the newer: see `docs/safety.md`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default,
)]
pub struct Term(pub u64);

impl Term {
    /// The term after this one.
    pub fn next(self) -> Term {
        Term(self.0 + 1)
    }
}
impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The number of an epoch within one stream, from 1.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default,
)]
pub struct EpochNo(pub u64);

impl EpochNo {
    /// The epoch after this one.
    pub fn next(self) -> EpochNo {
        EpochNo(self.0 + 1)
    }
}
impl fmt::Display for EpochNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An epoch, everywhere and for ever (rule 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EpochId {
    /// The term in which it was made.
    pub term: Term,
    /// The capture session that made it.
    pub stream: StreamId,
    /// Its number in that session.
    pub n: EpochNo,
}

/// Both lives that may act in a basis while it is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lives {
    /// The life of the copy on this node.
    pub mine: LifeId,
    /// The life of the copy on the peer.
    pub peer: LifeId,
}
