//! The built-in witness: a third box that says who may take a guest's next term, and nothing
//! else. No guest data passes it, and while both nodes see each other nobody asks it.
//!
//! ```text
//!   node ──TLS, pinned both ways──> server ──> Book::ask ──> durable ──> answer
//!   operator: `havm witness --enrol` prints a code; `havm pair --witness ADDR CODE` on the nodes
//! ```
//! [`register`] is the rules, pure; [`store`] keeps the book; [`server`] and [`client`] talk;
//! [`enrol`] makes a pair known.

pub mod client;
pub mod enrol;
pub mod register;
pub mod server;
pub mod store;

pub use client::{Probe, WitnessClient};
pub use enrol::{enrol, enrol_pair};
pub use server::{Witness, serve};

use havm_core::ids::Incarnation;
use register::{Answer, Ask, Seen};
use serde::{Deserialize, Serialize};

/// Protocol name (ALPN) of questions to a witness.
pub(crate) const ALPN_ASK: &[u8] = b"havm-witness/1";
/// Protocol name (ALPN) of enrolment.
pub(crate) const ALPN_ENROL: &[u8] = b"havm-enrol/1";
/// The largest frame.
pub(crate) const MAX_FRAME_BYTES: usize = 64 * 1024;

/// A question.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Question {
    /// Names the answer on this connection.
    pub id: u64,
    /// The book that the asker knows.
    pub seen: Option<Seen>,
    /// What.
    pub ask: Ask,
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    /// The question's.
    pub id: u64,
    /// The witness's.
    pub incarnation: Incarnation,
    /// The book's version after it.
    pub version: u64,
    /// What; none where the witness could not keep it (then nothing was granted).
    pub answer: Option<Answer>,
}
