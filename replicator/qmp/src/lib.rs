//! A blocking client for QEMU's monitor (QMP) over a unix socket, made for low latency.
//!
//! One [`Qmp`] is one monitor connection and one owner: no threads, no locks. Commands carry ids,
//! so a reply that comes after its deadline is recognised and dropped and the connection stays
//! usable. Two commands may be in flight ([`Qmp::submit`], [`Qmp::wait`]): a checkpoint sends `stop`
//! and the device state's save in one go and works while QEMU does.
//!
//! ```text
//!   connect: greeting ─> qmp_capabilities ─> ready ──submit──> in flight ──reply──> ready
//!                                              │  events are queued in the order they came
//!                                              └──EOF: Closed │ garbage: Protocol──> broken (for good)
//! ```
//!
//! Everything from the socket is bounded: a line by [`MAX_LINE_BYTES`], the event queue by
//! [`MAX_EVENTS`] (the oldest go first, and are counted).

mod client;
mod error;
mod event;
mod socket;

pub use client::{MAX_EVENTS, Qmp, Ticket, Version};
pub use error::QmpError;
pub use event::{Event, EventKind};
pub use socket::MAX_LINE_BYTES;
