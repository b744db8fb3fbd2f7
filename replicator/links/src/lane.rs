//! A link's second connection: signs of life only.
//!
//! The beat thread alone reads and writes it. So a sign of life waits neither behind data in a
//! socket, nor for a thread that holds the data connection and does not get the processor.

use crate::conn::{Conn, LinkError};
use crate::link::{lock, now_us, try_lock};
use havm_wire::hello::{LinkFrame, Position};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// Reads in a row: a peer that talks without pause does not hold the beat thread.
const READS: usize = 16;

/// The second connection, once it is there.
#[derive(Default)]
pub(crate) struct BeatLane {
    inner: Mutex<Option<Inner>>,
    heard_us: AtomicU64,
}

struct Inner {
    conn: Conn,
    sock: Arc<TcpStream>,
    spoke_us: u64,
}

impl BeatLane {
    /// The connection was made.
    pub fn attach(&self, conn: Conn) -> Result<(), LinkError> {
        let sock = Arc::new(conn.socket()?);
        self.heard_us.fetch_max(now_us(), SeqCst);
        *lock(&self.inner) = Some(Inner {
            conn,
            sock,
            spoke_us: 0,
        });
        Ok(())
    }

    /// When something was read from it last; 0 for never.
    pub fn heard_us(&self) -> u64 {
        self.heard_us.load(SeqCst)
    }

    /// The socket, to wait for what the peer says.
    pub fn socket(&self) -> Option<Arc<TcpStream>> {
        try_lock(&self.inner)?.as_ref().map(|i| i.sock.clone())
    }

    /// Reads what is there, and speaks if that is due. An error ends the link: who loses one
    /// connection to a host has most likely lost both.
    pub fn exchange(&self, position: Position, every_us: u64) -> Result<(), LinkError> {
        // Held elsewhere only for the moment in which it is attached.
        let Some(mut inner) = try_lock(&self.inner) else {
            return Ok(());
        };
        let Some(Inner { conn, spoke_us, .. }) = inner.as_mut() else {
            return Ok(());
        };
        let mut frames = Vec::new();
        for _ in 0..READS {
            if conn.read(&mut frames)? == 0 {
                break;
            }
            self.heard_us.store(now_us(), SeqCst);
        }
        if let Some(odd) = frames.iter().find(|f| !LinkFrame::is_kind(f.header.kind)) {
            let kind = odd.header.kind;
            return Err(LinkError::Closed(format!(
                "data ({kind:#04x}) on the lane for beats"
            )));
        }
        let now = now_us();
        if *spoke_us + every_us <= now {
            *spoke_us = now;
            if !conn.is_blocked() {
                conn.queue(&LinkFrame::Position(position).encode()?, 0)?;
            }
            conn.flush()?;
        }
        Ok(())
    }

    /// Ends it.
    pub fn close(&self) {
        if let Some(inner) = lock(&self.inner).take() {
            let _ = inner.sock.shutdown(Shutdown::Both);
        }
    }
}
