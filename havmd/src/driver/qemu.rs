//! A guest's QEMU, through libvirt: started paused, killed and seen dead, its end understood.
//!
//! One task a guest works its orders off in turn, so that a kill waits for a start that is under
//! way. The end of a process is seen by its pidfd; whether somebody meant it is asked of libvirt.

use crate::guests::{LifeFile, Paths, domain_xml, make_run_folders};
use crate::libvirt::conn::{DomState, Libvirt};
use crate::libvirt::transform::{relocate, standby};
use crate::libvirt::tree::Element;
use crate::process::Process;
use crate::replicators::Post;
use havm_core::event::Event;
use havm_core::ids::{GuestName, LifeId};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long a guest has to shut down by itself before its QEMU is ended.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(90);
/// Between two presses of the power button.
const PRESS: Duration = Duration::from_secs(5);
/// How long libvirt may take to notice that a QEMU is gone.
const NOTICE: Duration = Duration::from_secs(5);
/// Where libvirt's system daemon notes the QEMU of a domain.
const LIBVIRT_PIDS: &str = "/run/libvirt/qemu";

enum Job {
    Start { life: LifeId, waiting: bool },
    Kill,
    Shutdown,
}

/// What every part of the worker needs.
struct Inner {
    guest: GuestName,
    paths: Paths,
    libvirt: Libvirt,
    qemu_ids: (u32, u32),
    post: Post,
    /// Counts starts and kills: a watcher of an earlier process keeps silent.
    generation: AtomicU64,
    /// The next end of the process is meant.
    intended: AtomicBool,
}

/// The worker's handle.
#[derive(Clone)]
pub struct Qemu {
    jobs: mpsc::UnboundedSender<Job>,
    inner: Arc<Inner>,
}

/// What outlived the last daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outlived {
    /// The life of a QEMU that still runs.
    pub life: Option<LifeId>,
    /// It was started as a waiting one.
    pub waiting: bool,
    /// It ended since, and somebody meant it.
    pub ended_on_purpose: bool,
}

impl Qemu {
    /// Starts the worker of a guest.
    pub fn new(
        guest: GuestName,
        paths: Paths,
        libvirt: Libvirt,
        qemu_ids: (u32, u32),
        post: Post,
    ) -> Qemu {
        let inner = Arc::new(Inner {
            guest,
            paths,
            libvirt,
            qemu_ids,
            post,
            generation: AtomicU64::new(0),
            intended: AtomicBool::new(false),
        });
        // Unbounded in type only: the engine has one start or kill under way at a time.
        let (jobs, mut inbox) = mpsc::unbounded_channel();
        let me = inner.clone();
        tokio::spawn(async move {
            while let Some(job) = inbox.recv().await {
                match job {
                    Job::Start { life, waiting } => me.start(life, waiting).await,
                    Job::Kill => me.kill().await,
                    Job::Shutdown => me.shutdown().await,
                }
            }
        });
        Qemu { jobs, inner }
    }

    /// Starts QEMU; `GuestStarted` or `GuestStartFailed` is posted.
    pub fn start(&self, life: LifeId, waiting: bool) {
        self.send(Job::Start { life, waiting });
    }
    /// Kills it; `GuestKilled` is posted when it is seen dead.
    pub fn kill(&self) {
        self.send(Job::Kill);
    }
    /// Asks the guest to shut down; `GuestLost { intended: true }` is posted when it is gone.
    pub fn shutdown(&self) {
        self.send(Job::Shutdown);
    }
    fn send(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!(guest = %self.inner.guest, "the guest's worker has ended");
        }
    }

    /// What the last daemon left behind. Watches a QEMU that still runs.
    pub async fn outlived(&self) -> Outlived {
        let me = &self.inner;
        let Some(file) = LifeFile::load(&me.run_dir()) else {
            return Outlived::default();
        };
        if let Some(process) = Process::same(file.qemu) {
            me.watch(process);
            return Outlived {
                life: Some(file.life),
                waiting: file.waiting,
                ended_on_purpose: false,
            };
        }
        // The file was not removed by us, so nobody of ours ended it.
        LifeFile::remove(&me.run_dir());
        Outlived {
            life: None,
            waiting: file.waiting,
            ended_on_purpose: me.meant().await,
        }
    }
}

impl Inner {
    fn run_dir(&self) -> PathBuf {
        self.paths.run(&self.guest)
    }

    async fn start(self: &Arc<Self>, life: LifeId, waiting: bool) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.intended.store(false, Ordering::SeqCst);
        match self.try_start(life, waiting).await {
            Ok(process) => {
                (self.post)(Event::GuestStarted { life });
                self.watch(process);
            }
            Err(why) => {
                // "Nothing of it is left" is part of the event's promise.
                if !self.started_by_hand().await
                    && let Err(e) = self.end_process().await
                {
                    tracing::error!(guest = %self.guest, error = %e, "a failed start left something behind");
                }
                (self.post)(Event::GuestStartFailed { why });
            }
        }
    }

    async fn try_start(&self, life: LifeId, waiting: bool) -> Result<Process, String> {
        let name = self.guest.as_str();
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let xml = domain_xml(&self.paths, &self.guest)
            .map_err(|e| text(&e))?
            .ok_or("its definition (domain.xml) is not in havm's state folder; unprotect and protect it again")?;
        if let DomState::Up { paused: true } =
            self.libvirt.state(name).await.map_err(|e| text(&e))?
        {
            // A daemon that died between the start and noting its life left it behind.
            self.end_process().await?;
        }
        if self.started_by_hand().await {
            return Err(format!(
                "libvirt has a running domain {name} that havm did not start; end it: virsh destroy {name}"
            ));
        }
        make_run_folders(&self.paths, &self.guest, self.qemu_ids).map_err(|e| text(&e))?;
        let full = relocate(
            &Element::parse(&xml).map_err(|e| text(&e))?,
            &self.run_dir(),
        );
        let live = if waiting { standby(&full) } else { full };
        self.libvirt
            .create_paused(live.to_xml())
            .await
            .map_err(|e| text(&e))?;
        let process = self.libvirt_pid().and_then(Process::open).ok_or_else(|| {
            format!("libvirt started it, but its process is not noted in {LIBVIRT_PIDS}/{name}.pid")
        })?;
        let file = LifeFile {
            life,
            waiting,
            qemu: process.id,
        };
        file.store(&self.run_dir())
            .map_err(|e| format!("cannot note its life: {e}"))?;
        Ok(process)
    }

    /// A running domain of this name whose life is not noted: an admin's.
    async fn started_by_hand(&self) -> bool {
        LifeFile::load(&self.run_dir()).is_none()
            && matches!(
                self.libvirt.state(self.guest.as_str()).await,
                Ok(DomState::Up { paused: false })
            )
    }

    /// The process that libvirt noted for the domain.
    fn libvirt_pid(&self) -> Option<i32> {
        let path = format!("{LIBVIRT_PIDS}/{}.pid", self.guest);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    async fn kill(self: &Arc<Self>) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        let mut wait = Duration::from_millis(200);
        // "Seen dead" is what the peer's safety rests on: there is no giving up.
        while let Err(e) = self.end_process().await {
            tracing::error!(guest = %self.guest, error = %e, "the guest's QEMU cannot be ended yet; trying again");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(10));
        }
        (self.post)(Event::GuestKilled);
    }

    /// Kills the process by its pidfd, sees it dead, and has libvirt notice.
    async fn end_process(&self) -> Result<(), String> {
        let name = self.guest.as_str();
        let noted = self.noted();
        // Gone from here on: its end is not to be taken for an admin's.
        LifeFile::remove(&self.run_dir());
        let known = noted.is_some();
        if let Some(p) = noted {
            p.kill();
            tokio::time::timeout(Duration::from_secs(30), p.gone())
                .await
                .map_err(|_| "QEMU does not die within 30 s of SIGKILL (a hung device or disk?)")?
                .map_err(|e| format!("its pidfd cannot be watched: {e}"))?;
        }
        let end = Instant::now() + if known { NOTICE } else { Duration::ZERO };
        loop {
            match self.libvirt.state(name).await {
                Ok(DomState::Up { .. }) => {}
                Ok(_) => break,
                // QEMU that we knew is dead; a libvirt that is away cannot start another.
                Err(e) => {
                    tracing::warn!(guest = %self.guest, error = %e, "libvirt's view is unknown");
                    if self.libvirt_pid().and_then(Process::open).is_none() {
                        break;
                    }
                    return Err(e.to_string());
                }
            }
            if Instant::now() > end {
                // One that we did not know, or that libvirt did not notice.
                self.libvirt
                    .destroy(name)
                    .await
                    .map_err(|e| e.to_string())?;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn shutdown(self: &Arc<Self>) {
        self.intended.store(true, Ordering::SeqCst);
        if self.noted().is_none() {
            (self.post)(Event::GuestLost { intended: true });
            return;
        }
        let (me, generation) = (self.clone(), self.generation.load(Ordering::SeqCst));
        tokio::spawn(async move {
            let end = Instant::now() + SHUTDOWN_GRACE;
            while me.generation.load(Ordering::SeqCst) == generation {
                let Some(p) = me.noted() else { return };
                if Instant::now() > end {
                    tracing::warn!(guest = %me.guest, seconds = SHUTDOWN_GRACE.as_secs(),
                        "the guest did not shut down in time; its QEMU is ended");
                    p.kill();
                    return;
                }
                // Pressed again and again: a guest that still boots does not see the first one.
                if let Err(e) = me.libvirt.shutdown(me.guest.as_str()).await {
                    tracing::warn!(guest = %me.guest, error = %e, "the guest cannot be asked to shut down");
                }
                tokio::time::sleep(PRESS).await;
            }
        });
    }

    /// The QEMU whose life is noted, where it lives.
    fn noted(&self) -> Option<Process> {
        LifeFile::load(&self.run_dir()).and_then(|f| Process::same(f.qemu))
    }

    /// Posts `GuestLost` when the process ends without an order of ours.
    fn watch(self: &Arc<Self>, process: Process) {
        let (me, generation) = (self.clone(), self.generation.load(Ordering::SeqCst));
        tokio::spawn(async move {
            if let Err(e) = process.gone().await {
                tracing::error!(guest = %me.guest, error = %e, "QEMU's pidfd cannot be watched");
                return;
            }
            if me.generation.load(Ordering::SeqCst) != generation {
                return;
            }
            let intended = me.intended.load(Ordering::SeqCst) || me.meant().await;
            if me.generation.load(Ordering::SeqCst) == generation {
                LifeFile::remove(&me.run_dir());
                (me.post)(Event::GuestLost { intended });
            }
        });
    }

    /// Whether the domain, off by now, was turned off by somebody.
    async fn meant(&self) -> bool {
        let end = Instant::now() + NOTICE;
        loop {
            match self.libvirt.state(self.guest.as_str()).await {
                Ok(DomState::OffOnPurpose) => return true,
                Ok(DomState::Off | DomState::Absent) => return false,
                Ok(DomState::Up { .. }) if Instant::now() < end => {}
                Ok(DomState::Up { .. }) => return false,
                Err(e) => {
                    tracing::warn!(guest = %self.guest, error = %e,
                        "libvirt cannot say why the guest ended; taken for a crash");
                    return false;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
