//! The outside client: keeps connections busy, and proves at the end that nothing was lost.
//!
//! ```text
//!   worker (one a connection) ─┐
//!   probe  (UDP echo)         ─┴─> ledger ──stop──> proof: questions the guest, compares
//!   control lines (stdin or a unix socket): stats, mark, stop
//! ```
//!
//! A connection that breaks stays broken and is reported: nothing is ever reconnected silently.

pub mod cli;
pub mod control;
pub mod handle;
pub mod ledger;
pub mod probe;
pub mod proof;
pub mod question;
pub mod run;
pub mod worker;

pub use handle::ClientHandle;
pub use proof::Proof;
pub use question::Question;
