//! The NBD server that QEMU has its disk from: fixed newstyle on a unix socket, threads and
//! blocking IO. After the specification in NetworkBlockDevice/nbd, `doc/proto.md`.
//!
//! A connection has several workers. One of them at a time receives a request (with the data of a
//! write), lets the next one receive, does the work, and sends the reply. So many requests are in
//! flight, and one slow read or flush holds up no other. Data is copied once between the socket
//! and the page cache; in an epoch the received buffer itself is kept.
//!
//! What comes from the socket is bounded: 32 MiB a request, 4 KiB an option. Nonsense in a request
//! is answered with an error where the stream is still in step, and by hanging up where not.

mod conn;
mod handshake;
mod proto;
mod server;

pub use server::{NbdConfig, NbdServer};
