//! The listening socket and its connections.

use super::conn::Conn;
use super::handshake::{Export, negotiate};
use crate::disk::Disk;
use crate::error::{DiskError, Result};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How a disk is served.
#[derive(Debug, Clone)]
pub struct NbdConfig {
    /// The socket's path. An old socket there is replaced.
    pub socket: PathBuf,
    /// The export's name; other names are refused.
    pub export: String,
    /// Who may connect besides root (QEMU's user and group); the mode is 0600.
    pub owner: Option<(u32, u32)>,
    /// Worker threads a connection.
    pub workers: usize,
}

impl NbdConfig {
    /// Four workers, owned by this process's user.
    pub fn new(socket: PathBuf, export: impl Into<String>) -> Self {
        NbdConfig {
            socket,
            export: export.into(),
            owner: None,
            workers: 4,
        }
    }
}

const MAX_CONNECTIONS: usize = 64;
const NEGOTIATION: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Shared {
    disk: Arc<Disk>,
    export: String,
    workers: usize,
    stopping: AtomicBool,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    streams: BTreeMap<u64, UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct NbdServer {
    shared: Arc<Shared>,
    listener: UnixListener,
    accepting: Option<JoinHandle<()>>,
    socket: PathBuf,
}

impl NbdServer {
    /// Starts serving.
    pub fn start(disk: Arc<Disk>, cfg: &NbdConfig) -> Result<NbdServer> {
        let listener = listen(&cfg.socket, cfg.owner)?;
        let shared = Arc::new(Shared {
            disk,
            export: cfg.export.clone(),
            workers: cfg.workers.clamp(1, 16),
            stopping: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let io = DiskError::io("starting the disk server");
        let (l, s) = match listener.try_clone() {
            Ok(l) => (l, shared.clone()),
            Err(e) => return Err(io(e)),
        };
        let accepting = std::thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || accept(&l, &s))
            .map_err(io)?;
        Ok(NbdServer {
            shared,
            listener,
            accepting: Some(accepting),
            socket: cfg.socket.clone(),
        })
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.shared.open().streams.len()
    }

    /// Ends all connections and waits for their requests in progress.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, SeqCst);
        // On Linux this wakes a thread in accept(2).
        let _ = nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.listener),
            nix::sys::socket::Shutdown::Both,
        );
        if let Some(t) = self.accepting.take()
            && t.join().is_err()
        {
            tracing::error!("the disk server's listener panicked");
        }
        let threads = {
            let mut open = self.shared.open();
            for s in open.streams.values() {
                // Already closed by the other side is as good.
                let _ = s.shutdown(Shutdown::Both);
            }
            std::mem::take(&mut open.threads)
        };
        for t in threads {
            if t.join().is_err() {
                tracing::error!("a disk connection panicked");
            }
        }
        // A successor may have put its own socket there; then this one's name is gone already.
        if self.socket.exists() && UnixStream::connect(&self.socket).is_err() {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Binds beside the path and renames, so that nobody meets the socket with wrong rights.
fn listen(path: &Path, owner: Option<(u32, u32)>) -> Result<UnixListener> {
    let io = |e| DiskError::Io {
        what: format!("listening at {}", path.display()),
        source: e,
    };
    let mut tmp = path.to_owned().into_os_string();
    tmp.push(".new");
    let tmp = PathBuf::from(tmp);
    match std::fs::remove_file(&tmp) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
        _ => (),
    }
    let l = UnixListener::bind(&tmp).map_err(io)?;
    std::fs::set_permissions(&tmp, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::chown(&tmp, Some(uid), Some(gid)).map_err(io)?;
    }
    std::fs::rename(&tmp, path).map_err(io)?;
    Ok(l)
}

fn accept(l: &UnixListener, shared: &Arc<Shared>) {
    while !shared.stopping.load(SeqCst) {
        let stream = match l.accept() {
            Ok((s, _)) => s,
            Err(_) if shared.stopping.load(SeqCst) => return,
            Err(e) => {
                tracing::warn!(error = %e, "accepting a disk client");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let mut open = shared.open();
        open.threads.retain(|t| !t.is_finished());
        if open.streams.len() >= MAX_CONNECTIONS {
            tracing::warn!("a disk client too many was turned away");
            continue;
        }
        let id = open.next;
        open.next += 1;
        let Ok(watch) = stream.try_clone() else {
            continue;
        };
        open.streams.insert(id, watch);
        let s = shared.clone();
        let run = move || {
            if let Err(e) = serve(&s, stream) {
                tracing::info!(error = %e, "a disk client left during negotiation");
            }
            s.open().streams.remove(&id);
        };
        match std::thread::Builder::new().name("nbd".into()).spawn(run) {
            Ok(t) => open.threads.push(t),
            Err(e) => {
                tracing::warn!(error = %e, "starting a disk connection");
                open.streams.remove(&id);
            }
        }
    }
}

fn serve(shared: &Shared, mut stream: UnixStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(NEGOTIATION))?;
    let export = Export {
        name: &shared.export,
        size: shared.disk.size(),
    };
    let Some(agreed) = negotiate(&mut stream, export)? else {
        return Ok(());
    };
    stream.set_read_timeout(None)?;
    let conn = Conn::new(shared.disk.clone(), stream, agreed);
    std::thread::scope(|scope| {
        for _ in 1..shared.workers {
            let r = std::thread::Builder::new()
                .name("nbd-worker".into())
                .spawn_scoped(scope, || conn.work());
            if let Err(e) = r {
                tracing::warn!(error = %e, "fewer disk workers than wanted");
                break;
            }
        }
        conn.work();
    });
    Ok(())
}
