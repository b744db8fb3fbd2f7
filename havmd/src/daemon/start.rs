//! From the config file to the running loop.

use super::remote::{Ask, Told};
use super::shared::Shared;
use super::{Ears, Input, Loop};
use crate::beats::{BeatEvent, BeatLink, BeatSettings, Beats};
use crate::control;
use crate::events::{EventLog, wall_ms};
use crate::guests::{GuestFile, Paths};
use crate::identity_store::{Myself, PairFile, WitnessPin};
use crate::libvirt::conn::Libvirt;
use crate::peer::{self, Served};
use crate::witness::WitnessClient;
use anyhow::Context;
use havm_config::Config;
use havm_config::model::Witness;
use havm_core::command::Severity;
use havm_core::detector::DetectorSettings;
use havm_core::event::Peer;
use havm_core::message::Envelope;
use havm_hooks::{Limits, Runner};
use nix::fcntl::{Flock, FlockArg};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Between two looks at the witness.
const PROBE: Duration = Duration::from_secs(1);
/// Between two comparisons of both configs.
const AGREE: Duration = Duration::from_secs(10);

/// Runs the daemon until it is told to end. Guests and replicators go on without it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let paths = Paths::of(&config);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(&paths.run_dir)
        .with_context(|| format!("cannot make the run folder {}", paths.run_dir.display()))?;
    crate::durable::make_folder(&paths.state_dir)
        .with_context(|| format!("cannot make the state folder {}", paths.state_dir.display()))?;
    let _lock = lock(&paths.run_dir)?;
    let me = Myself::load_or_create(&paths.state_dir)?;
    let pair = wait_for_pair(&config, &paths).await?;
    let (inputs, inbox) = mpsc::unbounded_channel();
    let libvirt = Libvirt::start(&config.libvirt.uri, "host").context("the libvirt thread")?;
    let qemu_ids = qemu_ids(&libvirt).await;
    let events = Arc::new(Mutex::new(event_log(&config, &paths)?));
    let (peer, served) = peer::start(&config, &me, &pair)
        .await
        .context("the connection to the peer")?;
    let beats = start_beats(&config, &me, &pair, inputs.clone())?;
    let shared = Arc::new(Shared {
        witness: witness(&config, &me)?.map_or_else(OnceLock::new, OnceLock::from),
        config,
        paths,
        me,
        pair,
        peer,
        libvirt,
        qemu_ids,
        replicator: beside_me("havm-replicator")?,
        events,
        inputs,
        started: Instant::now(),
        started_at_ms: wall_ms(),
    });
    let mut the_loop = Loop {
        shared: shared.clone(),
        beats,
        guests: BTreeMap::new(),
        early: HashMap::new(),
        born_waits: HashMap::new(),
        verifying: HashMap::new(),
        next_verify: 1,
        verdict: Peer::Suspect,
        witness: None,
        faults: Vec::new(),
    };
    let (files, faults) = GuestFile::all(&shared.paths);
    for why in faults {
        shared.say(
            None,
            Severity::Alarm,
            format!("a guest's files cannot be read: {why}"),
        );
    }
    for f in files {
        the_loop.early.insert(f.guest.clone(), Vec::new());
        super::guest::look_for(shared.clone(), f.guest);
    }
    let messages = serve_peer(&shared, served);
    serve_control(&shared)?;
    tokio::spawn(watch_witness(shared.clone()));
    tokio::spawn(watch_agreement(shared.clone()));
    the_loop.beats.set_flags(crate::beats::FLAG_READY);
    tracing::info!(node = %shared.config.node.name, peer = %shared.config.peer.name,
        id = %shared.me.node, version = env!("CARGO_PKG_VERSION"), "havmd is up");
    tokio::select! {
        () = the_loop.run(Ears { inputs: inbox, messages }) => {
            anyhow::bail!("the loop has ended")
        }
        r = ended() => {
            r?;
            tracing::info!("havmd ends as asked; guests and replicators go on");
            Ok(())
        }
    }
}

fn event_log(config: &Config, paths: &Paths) -> anyhow::Result<EventLog> {
    let mut log = EventLog::open(Some(paths.state_dir.join("events.jsonl")));
    let limits = Limits {
        deadline: Duration::from_secs(config.hooks.timeout_s),
        ..Limits::default()
    };
    log.set_hooks(Runner::new(&config.hooks.dir, limits).context("the hooks' threads")?);
    Ok(log)
}

/// One daemon a host: two would order the same replicators about.
fn lock(run_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = run_dir.join("havmd.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
        anyhow::anyhow!(
            "cannot lock {}: {e}; another havmd runs on this host",
            path.display()
        )
    })
}

/// A node that is not paired has nothing to do but to wait for it.
async fn wait_for_pair(config: &Config, paths: &Paths) -> anyhow::Result<PairFile> {
    let mut said = false;
    loop {
        if let Some(p) = PairFile::load(&paths.state_dir)? {
            return Ok(p);
        }
        if !said {
            tracing::warn!(node = %config.node.name,
                "this node is not paired yet: run `havm pair` on both nodes; havmd waits for it");
            said = true;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
            r = ended() => {
                r?;
                anyhow::bail!("ended before this node was paired")
            }
        }
    }
}

/// SIGTERM or SIGINT.
async fn ended() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = term.recv() => {}
        r = tokio::signal::ctrl_c() => r?,
    }
    Ok(())
}

async fn qemu_ids(libvirt: &Libvirt) -> (u32, u32) {
    // Guests that run go on without libvirt: the daemon must start too.
    match libvirt.host().await {
        Ok(h) => h.qemu_ids,
        Err(e) => {
            tracing::error!("{e}");
            (0, 0)
        }
    }
}

/// The way to the witness: none where none is configured, or this node is not enrolled yet.
fn witness(config: &Config, me: &Myself) -> anyhow::Result<Option<WitnessClient>> {
    let Witness::Builtin { addresses } = &config.witness else {
        return Ok(None);
    };
    let state_dir = &config.node.state_dir;
    let Some(pin) = WitnessPin::load(state_dir)? else {
        return Ok(None);
    };
    let client = WitnessClient::new(addresses.clone(), me, &pin, state_dir)?;
    Ok(Some(client))
}

fn start_beats(
    config: &Config,
    me: &Myself,
    pair: &PairFile,
    inputs: mpsc::UnboundedSender<Input>,
) -> anyhow::Result<Beats> {
    let ms = Duration::from_millis;
    let d = &config.detection;
    let links = config.peer.links.iter().map(|l| BeatLink {
        local: SocketAddr::new(l.local, config.peer.beat_port),
        peer: SocketAddr::new(l.peer, config.peer.beat_port),
    });
    let settings = BeatSettings {
        node: me.node,
        peer: pair.peer,
        key: pair.pair_key.clone(),
        links: links.collect(),
        detector: DetectorSettings {
            interval: ms(d.beat_ms),
            suspect_after: ms(d.lost_ms / 2),
            lost_after: ms(d.lost_ms),
        },
    };
    Beats::start(settings, move |event| match event {
        BeatEvent::Verdict { peer, .. } => drop(inputs.send(Input::Verdict(peer))),
        BeatEvent::Link { link, up } => drop(inputs.send(Input::Link(link, up))),
        BeatEvent::PeerSession { .. } => tracing::info!("the peer's daemon has started"),
        BeatEvent::PeerFlags { .. } => {}
    })
    .context("the heartbeats")
}

/// The program of that name beside this one, else whatever the path finds.
fn beside_me(name: &str) -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("this program's place")?;
    let there = me.parent().map(|p| p.join(name)).filter(|p| p.exists());
    Ok(there.unwrap_or_else(|| PathBuf::from(name)))
}

fn serve_control(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let path = shared.paths.control_socket();
    let listener = control::bind(&path)
        .with_context(|| format!("cannot make the control socket {}", path.display()))?;
    let shared = shared.clone();
    let handler: control::Handler = Arc::new(move |request, answers| {
        tokio::spawn(shared.clone().serve(request, answers));
    });
    tokio::spawn(control::serve(listener, handler));
    Ok(())
}

/// Answers the peer's questions; its messages go to the loop.
fn serve_peer(shared: &Arc<Shared>, mut served: Served) -> mpsc::Receiver<Envelope> {
    let shared = shared.clone();
    tokio::spawn(async move {
        while let Some((question, reply)) = served.requests.recv().await {
            let shared = shared.clone();
            tokio::spawn(async move {
                let told = match serde_json::from_value(question) {
                    Ok(ask) => shared.answer(ask).await,
                    Err(e) => Told::Failed {
                        why: format!("not a question of this version: {e}"),
                    },
                };
                // Plain data: it always has a JSON form.
                let _ = reply.send(serde_json::to_value(told).unwrap_or_default());
            });
        }
    });
    served.messages
}

async fn watch_witness(shared: Arc<Shared>) {
    if shared.config.witness == Witness::None {
        return;
    }
    loop {
        tokio::time::sleep(PROBE).await;
        let Some(w) = shared.witness() else {
            // Enrolled while the daemon runs, perhaps.
            match witness(&shared.config, &shared.me) {
                Ok(Some(w)) => drop(shared.witness.set(w)),
                Ok(None) => {}
                Err(e) => tracing::warn!("{e:#}"),
            }
            continue;
        };
        let seen = w.probe(PROBE).await.incarnation();
        if shared.inputs.send(Input::Witness(seen)).is_err() {
            return;
        }
    }
}

async fn watch_agreement(shared: Arc<Shared>) {
    loop {
        let mut faults = Vec::new();
        // A peer that cannot be asked is shown as silent elsewhere.
        if shared
            .ask_peer(&Ask::Agreement, Duration::from_secs(5))
            .await
            .is_ok()
            && let Err(why) = shared.agree().await
        {
            faults.push(why);
        }
        if shared.inputs.send(Input::Faults(faults)).is_err() {
            return;
        }
        tokio::time::sleep(AGREE).await;
    }
}
