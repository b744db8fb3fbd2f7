//! "I know the code, and I see you with this certificate": the proof that replaces a pin before
//! there is one.
//!
//! A keyed BLAKE3 over both certificates' fingerprints *as each side sees them*, both nonces and
//! the side. Someone in the middle shows other certificates and cannot make either proof; the
//! code has 120 bits, so a proof does not help to guess it.

use super::code::Code;
use havm_links::identity::Fingerprint;
use serde::{Deserialize, Serialize};

/// What both proofs are about.
#[derive(Debug, Clone, Copy)]
pub struct Binding {
    /// What is being set up, so that a proof for one thing is none for another.
    pub purpose: &'static str,
    /// The certificate of the side that printed the code.
    pub accepting: Fingerprint,
    /// The certificate of the side where it is typed in.
    pub joining: Fingerprint,
    /// Random, chosen by the accepting side.
    pub accepting_nonce: [u8; 32],
    /// Random, chosen by the joining side.
    pub joining_nonce: [u8; 32],
}

/// Who proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prover {
    /// The side that printed the code.
    Accepting,
    /// The side where it is typed in.
    Joining,
}

/// A proof.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Proof([u8; 32]);

/// Makes a side's proof.
pub fn prove(code: &Code, who: Prover, b: &Binding) -> Proof {
    let mut h = blake3::Hasher::new_keyed(&code.key());
    h.update(match who {
        Prover::Accepting => b"accepting",
        Prover::Joining => b"joining..",
    });
    h.update(&b.accepting.0).update(&b.joining.0);
    h.update(&b.accepting_nonce).update(&b.joining_nonce);
    h.update(b.purpose.as_bytes());
    Proof(h.finalize().into())
}

/// Whether a proof is the other side's.
pub fn check(code: &Code, who: Prover, b: &Binding, proof: &Proof) -> bool {
    // blake3::Hash compares in constant time.
    blake3::Hash::from(prove(code, who, b).0) == blake3::Hash::from(proof.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_code_side_certificates_nonces_and_purpose_only() {
        let code = Code::random().unwrap();
        let b = Binding {
            purpose: "test",
            accepting: Fingerprint([1; 32]),
            joining: Fingerprint([2; 32]),
            accepting_nonce: [3; 32],
            joining_nonce: [4; 32],
        };
        let p = prove(&code, Prover::Joining, &b);
        assert!(check(&code, Prover::Joining, &b, &p));
        assert!(!check(&code, Prover::Accepting, &b, &p));
        assert!(!check(&Code::random().unwrap(), Prover::Joining, &b, &p));
        let others = [
            Binding {
                purpose: "else",
                ..b
            },
            Binding {
                accepting: Fingerprint([9; 32]),
                ..b
            },
            Binding {
                joining: Fingerprint([9; 32]),
                ..b
            },
            Binding {
                accepting_nonce: [9; 32],
                ..b
            },
            Binding {
                joining_nonce: [9; 32],
                ..b
            },
        ];
        for other in others {
            assert!(!check(&code, Prover::Joining, &other, &p), "{other:?}");
        }
    }
}
