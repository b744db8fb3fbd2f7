//! The control socket: orders in, reports out, one JSON value a line.
//!
//! One daemon at a time: the newest connection gets the reports. A daemon that went away is not waited
//! for; what it must not miss is repeated after [`havm_core::order::Order::Status`]
//! (see [`crate::standing`]).

use crate::input::Input;
use havm_core::order::{MAX_LINE_BYTES, Order, Report};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A daemon that does not read for this long is dropped: reports never wait for it longer.
const WRITE_PATIENCE: Duration = Duration::from_millis(500);

/// Where reports go. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reports {
    to: Arc<Mutex<Option<UnixStream>>>,
}

impl Reports {
    /// Sends a report to the daemon that is connected, if one is.
    pub fn send(&self, report: &Report) {
        let mut line = match serde_json::to_vec(report) {
            Ok(l) => l,
            Err(e) => {
                tracing::error!(error = %e, "a report could not be written as JSON");
                return;
            }
        };
        line.push(b'\n');
        let mut to = self.lock();
        if let Some(conn) = to.as_mut()
            && let Err(e) = conn.write_all(&line)
        {
            tracing::warn!(error = %e, "the daemon does not read; waiting for the next one");
            *to = None;
        }
    }

    fn attach(&self, conn: UnixStream) {
        *self.lock() = Some(conn);
    }

    fn lock(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens at `path` (0600; an old socket file is replaced) and passes orders to `inputs`.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(path: &Path, reports: Reports, inputs: Sender<Input>) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            for conn in listener.incoming() {
                let (reports, inputs) = (reports.clone(), inputs.clone());
                let one = move |conn: UnixStream| -> io::Result<()> {
                    conn.set_write_timeout(Some(WRITE_PATIENCE))?;
                    let writer = conn.try_clone()?;
                    read_orders(conn, writer, &reports, &inputs)
                };
                let started = conn.and_then(|c| {
                    std::thread::Builder::new()
                        .name("orders".into())
                        .spawn(move || {
                            if let Err(e) = one(c) {
                                tracing::warn!(error = %e, "control connection ended");
                            }
                        })
                });
                if let Err(e) = started {
                    tracing::warn!(error = %e, "control connection not accepted");
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        })?;
    Ok(())
}

fn read_orders(
    conn: UnixStream,
    writer: UnixStream,
    reports: &Reports,
    inputs: &Sender<Input>,
) -> io::Result<()> {
    let mut conn = BufReader::new(conn);
    let mut writer = Some(writer);
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = (&mut conn)
            .take(MAX_LINE_BYTES as u64)
            .read_until(b'\n', &mut line)?;
        if n == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            return Err(io::Error::other(format!(
                "an order of over {MAX_LINE_BYTES} bytes"
            )));
        }
        match serde_json::from_slice::<Order>(&line) {
            Ok(order) => {
                if order == Order::Status
                    && let Some(w) = writer.take()
                {
                    reports.attach(w);
                }
                if inputs.send(Input::Order(order)).is_err() {
                    return Ok(());
                }
            }
            Err(e) => reports.send(&Report::Refused {
                order: "?".into(),
                why: format!("not an order of control version 1: {e}"),
            }),
        }
    }
}
