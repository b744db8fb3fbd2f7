//! How two machines that know nothing of each other come to know each other for ever: a one-time
//! code, carried by a person, stands in for the pins that are not there yet.
//!
//! Library use: [`accept`] on one node prints nothing itself, [`join`] on the other; the CLI makes
//! the [`Code`] and shows it. `--code-file` is [`Code::load`] and [`Code::save`].

pub mod code;
mod exchange;
pub mod proof;

pub use code::{Code, CodeError};
pub use exchange::{PairAs, PairError, accept, join};
