//! What the loop's tasks share.

use super::Input;
use crate::events::EventLog;
use crate::guests::Paths;
use crate::identity_store::{Myself, PairFile};
use crate::libvirt::conn::Libvirt;
use crate::peer::PeerClient;
use crate::replicators::Post;
use crate::witness::WitnessClient;
use havm_config::Config;
use havm_core::command::Severity;
use havm_core::event::{Event, Operator};
use havm_core::ids::{GuestName, Term};
use havm_core::settings::{ArbiterKind, FailbackSettings, Settings};
use havm_core::status::GuestStatus;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Everything of a paired node that does not change while it runs.
pub struct Shared {
    /// The config.
    pub config: Config,
    /// Where things are.
    pub paths: Paths,
    /// This node.
    pub me: Myself,
    /// The peer.
    pub pair: PairFile,
    /// The connection to the peer's daemon.
    pub peer: PeerClient,
    /// The witness, as soon as one is configured and enrolled: see [`Shared::witness`].
    pub witness: OnceLock<WitnessClient>,
    /// libvirt, for the host's questions and for protecting.
    pub libvirt: Libvirt,
    /// The user and group that QEMU runs as.
    pub qemu_ids: (u32, u32),
    /// The replicator's program.
    pub replicator: PathBuf,
    /// Events.
    pub events: Arc<Mutex<EventLog>>,
    /// To the loop.
    pub inputs: mpsc::UnboundedSender<Input>,
    /// The daemon's start: the zero of the engines' time.
    pub started: Instant,
    /// The same, milliseconds since 1970.
    pub started_at_ms: u64,
}

/// The daemon's loop does not answer: only at its end.
const NO_LOOP: &str = "havmd is ending";

impl Shared {
    /// The engines' time.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The witness, where one is configured and this node is enrolled.
    pub fn witness(&self) -> Option<&WitnessClient> {
        self.witness.get()
    }

    /// Where a guest's tasks post their events.
    pub fn post(&self, guest: &GuestName) -> Post {
        let (inputs, guest) = (self.inputs.clone(), guest.clone());
        Arc::new(move |event: Event| {
            // Fails only when the daemon ends.
            let _ = inputs.send(Input::Guest(guest.clone(), Box::new(event)));
        })
    }

    /// An event that no engine made: of the host, or about a guest.
    pub fn say(&self, guest: Option<&GuestName>, severity: Severity, text: impl AsRef<str>) {
        let mut log = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        log.put(guest, "warning".into(), severity, Term(0), text.as_ref());
    }

    /// An event of the host by its name in the hooks' catalogue.
    pub fn tell(&self, kind: &str, severity: Severity, text: &str) {
        let mut log = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        log.put(None, kind.into(), severity, Term(0), text);
    }

    /// Gives a guest's engine something to do; an error is its refusal.
    pub async fn operate(&self, guest: &GuestName, op: Operator) -> Result<(), String> {
        let (tx, rx) = oneshot::channel();
        self.inputs
            .send(Input::Operate(guest.clone(), op, tx))
            .map_err(|_| NO_LOOP.to_owned())?;
        rx.await.map_err(|_| NO_LOOP.to_owned())?
    }

    /// One guest's status; none where it is not protected here.
    pub async fn guest_status(&self, guest: &GuestName) -> Option<GuestStatus> {
        let (tx, rx) = oneshot::channel();
        self.inputs
            .send(Input::GuestStatus(guest.clone(), tx))
            .ok()?;
        rx.await.ok()?
    }

    /// Takes a guest that is protected from now on into the loop, with its first operator event.
    pub async fn take_in(&self, guest: &GuestName, first: Option<Operator>) -> Result<(), String> {
        let (tx, rx) = oneshot::channel();
        self.inputs
            .send(Input::TakeIn(guest.clone(), first, tx))
            .map_err(|_| NO_LOOP.to_owned())?;
        rx.await.map_err(|_| NO_LOOP.to_owned())?
    }

    /// The engine's numbers for a guest.
    pub fn engine_settings(&self, policy: &havm_config::model::Guest) -> Settings {
        use havm_config::model::{FailbackPolicy, Witness};
        let defaults = Settings::default();
        let f = &policy.failback;
        Settings {
            arbiter: match self.config.witness {
                Witness::Builtin { .. } => ArbiterKind::Witness,
                Witness::None => ArbiterKind::None,
            },
            failback: FailbackSettings {
                automatic: f.policy == FailbackPolicy::Automatic,
                stability: Duration::from_secs(f.stability_s),
                budget: f.flap_max,
                window: Duration::from_secs(f.flap_window_s),
                ..defaults.failback
            },
            ..defaults
        }
    }
}
