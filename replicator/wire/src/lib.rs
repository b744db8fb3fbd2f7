//! The protocol of the data plane between two replicators, without sockets, clocks or tasks.
//!
//! ```text
//!  primary                                                          standby
//!  page::PageEncoder ─┐
//!  disk writes ───────┼> epoch::OpenEpoch ─> sender::StripeSender ═links═> receiver::Reorder ─> assemble::EpochAssembler ─> CompleteEpoch
//!  device state ──────┘                                                                                    │ committed
//!  acked::AckLedger ─> AckedEpoch ─> gate       <─ receiver::Reorder <═links═ sender::Repeater <── back::Back::Ack
//! ```
//!
//! Both directions are reliable, in order, and survive the loss of any link: [`sender`] keeps what
//! the other side has not received, [`receiver`] puts in order and drops repeats.
#![forbid(unsafe_code)]

pub mod acked;
pub mod assemble;
pub mod back;
mod codec;
mod decode;
mod delta;
mod encode;
pub mod epoch;
pub mod frame;
pub mod hello;
pub mod packed;
pub mod page;
pub mod raw;
pub mod receiver;
pub mod sender;
pub mod version;

pub use codec::DecodeError;
