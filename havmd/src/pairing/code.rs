//! One-time codes: 120 random bits in six groups of four, `7K2M-...`, easy to read out.

use crate::durable;
use crate::random;
use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;

/// Digits and letters without I, L, O and U (Crockford's base 32).
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// 24 characters of five bits.
const CHARS: usize = 24;

/// How long a code may be used, seconds.
pub const VALID_S: u64 = 600;
/// How many wrong attempts end a code's use.
pub const MAX_ATTEMPTS: u32 = 5;

/// A one-time code. Whoever knows it while it is valid may pair.
#[derive(Clone, PartialEq, Eq)]
pub struct Code([u8; CHARS]);

/// A text that is not a code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not a pairing code: it has {CHARS} letters and digits in groups of four; copy it from the other machine, where `havm pair --accept` or `havm witness --enrol` printed it"
)]
pub struct CodeError;

impl Code {
    /// A new one.
    pub fn random() -> io::Result<Self> {
        let bytes = random::bytes::<CHARS>()?;
        Ok(Code(bytes.map(|b| ALPHABET[usize::from(b % 32)])))
    }

    /// Reads one from a file (`--code-file`), as [`Code::save`] or a person wrote it.
    pub fn load(path: &Path) -> io::Result<Self> {
        let bytes = durable::read_bounded(path, 1024)?.ok_or(io::ErrorKind::NotFound)?;
        String::from_utf8_lossy(&bytes)
            .parse()
            .map_err(|e: CodeError| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    /// Writes it to a file that only its owner can read.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        durable::replace(path, format!("{self}\n").as_bytes())
    }

    /// The key that the proofs are made with.
    pub(crate) fn key(&self) -> [u8; 32] {
        blake3::derive_key("havm 2026 pairing code v1", &self.0)
    }
}

impl FromStr for Code {
    type Err = CodeError;
    /// Case, hyphens and spaces don't matter; O is 0, I and L are 1.
    fn from_str(s: &str) -> Result<Self, CodeError> {
        let mut out = Vec::with_capacity(CHARS);
        for c in s.chars().filter(|c| *c != '-' && !c.is_whitespace()) {
            let c = match c.to_ascii_uppercase() {
                'O' => '0',
                'I' | 'L' => '1',
                c => c,
            };
            let b = u8::try_from(c).map_err(|_| CodeError)?;
            if !ALPHABET.contains(&b) || out.len() == CHARS {
                return Err(CodeError);
            }
            out.push(b);
        }
        out.try_into().map(Code).map_err(|_| CodeError)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, b) in self.0.iter().enumerate() {
            if i > 0 && i % 4 == 0 {
                f.write_str("-")?;
            }
            write!(f, "{}", char::from(*b))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Logs are kept longer than codes should be.
        f.write_str("Code(...)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_back_however_it_was_typed() {
        let code = Code::random().unwrap();
        assert_eq!(code.to_string().len(), 29);
        assert_eq!(code.to_string().parse(), Ok(code.clone()));
        let typed = code
            .to_string()
            .to_lowercase()
            .replace('-', " ")
            .replace('0', "o");
        assert_eq!(typed.replace('1', "l").parse(), Ok(code));
        for bad in [
            "",
            "ABCD",
            "U234-2345-2345-2345-2345-2345",
            "ü".repeat(24).as_str(),
            "1".repeat(25).as_str(),
        ] {
            assert_eq!(bad.parse::<Code>(), Err(CodeError));
        }
        assert_ne!(Code::random().unwrap(), Code::random().unwrap());
    }
}
