//! The checked model. Every value here is within its range, every name is unique, every
//! reference resolves.

use havm_core::ids::GuestName;
use havm_core::spec::{Ack, LinkSpec, Settings};
use std::net::SocketAddr;
use std::path::PathBuf;

/// The whole configuration of one node.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// This node.
    pub node: Node,
    /// The other one.
    pub peer: Peer,
    /// When a silent peer counts as lost.
    pub detection: Detection,
    /// Who arbitrates.
    pub witness: Witness,
    /// When a guest moves home.
    pub failback: Failback,
    /// Epochs, for guests that say nothing else.
    pub replication: Replication,
    /// How libvirt is reached.
    pub libvirt: Libvirt,
    /// Executables that are told about events.
    pub hooks: Hooks,
    /// The guests.
    pub guests: Vec<Guest>,
}

/// This node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name, for people and for `home`. Its identity is a random id made at pairing.
    pub name: String,
    /// What must last.
    pub state_dir: PathBuf,
    /// Sockets and process ids; lost at a boot.
    pub run_dir: PathBuf,
    /// A `tracing` filter: `info`, `havm=debug,info`.
    pub log: String,
}

/// The other node, and the ways to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Direct links, at least one; the order is the same on both nodes.
    pub links: Vec<LinkSpec>,
    /// UDP port of the heartbeats, on both nodes.
    pub beat_port: u16,
    /// TCP port of the daemons' control connection (TLS), on both nodes.
    pub peer_port: u16,
    /// First and last TCP port that a standby's replicator listens at.
    pub replication_ports: (u16, u16),
}

/// When a silent peer counts as lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Detection {
    /// Distance of two heartbeats on each link, milliseconds.
    pub beat_ms: u64,
    /// How long every link must be silent, milliseconds. At least three beats.
    pub lost_ms: u64,
    /// How long a guest's epoch stream must be silent before it is reported, milliseconds.
    pub stream_silent_ms: u64,
}

/// Who arbitrates when the nodes cannot see each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Witness {
    /// `havm witness` on a third box, at any of these addresses (all of one witness).
    Builtin {
        /// Tried in turn.
        addresses: Vec<SocketAddr>,
    },
    /// Nobody: a silent peer is replaced only by its own yield.
    None,
}

impl Witness {
    /// The word in the config.
    pub fn kind(&self) -> &'static str {
        match self {
            Witness::Builtin { .. } => "builtin",
            Witness::None => "none",
        }
    }
}

/// Whether a guest moves home by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailbackPolicy {
    /// When its home has been stable, protected and in sync for `stability_s`.
    Automatic,
    /// Only by `havm failback`.
    Manual,
}

impl FailbackPolicy {
    /// The word in the config.
    pub fn word(self) -> &'static str {
        match self {
            FailbackPolicy::Automatic => "automatic",
            FailbackPolicy::Manual => "manual",
        }
    }
}

/// When a guest moves home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failback {
    /// Whether it does.
    pub policy: FailbackPolicy,
    /// How long its home must have been healthy, seconds.
    pub stability_s: u64,
    /// How many automatic moves a guest may make in `flap_window_s`; then it waits for a person.
    pub flap_max: u32,
    /// The window of `flap_max`, seconds.
    pub flap_window_s: u64,
}

/// Epochs: the same meanings as in [`havm_core::spec::Settings`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replication {
    /// The longest distance of two barriers, milliseconds.
    pub max_interval_ms: u64,
    /// The shortest.
    pub min_interval_ms: u64,
    /// When the standby acks.
    pub ack: Ack,
    /// Memory for copies of pages sent lately, MiB per guest.
    pub delta_cache_mib: u64,
    /// Held output at which the guest's vCPUs are stopped, MiB.
    pub output_limit_mib: u64,
}

impl Replication {
    /// What the replicator is told.
    pub fn settings(&self, detection: &Detection) -> Settings {
        Settings {
            max_interval_ms: self.max_interval_ms,
            min_interval_ms: self.min_interval_ms,
            ack: self.ack,
            delta_cache_mib: self.delta_cache_mib,
            output_limit_mib: self.output_limit_mib,
            stream_silent_ms: detection.stream_silent_ms,
        }
    }
}

/// How libvirt is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libvirt {
    /// Its connection URI.
    pub uri: String,
}

/// Executables that are told about events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hooks {
    /// Where they are looked for.
    pub dir: PathBuf,
    /// How long one may take, seconds.
    pub timeout_s: u64,
}

/// What is done for a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Fault tolerant: memory, devices and disks are replicated, output waits for the standby.
    Ft,
}

impl Policy {
    /// The word in the config.
    pub fn word(self) -> &'static str {
        match self {
            Policy::Ft => "ft",
        }
    }
}

/// One guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Guest {
    /// The libvirt domain's name.
    pub name: GuestName,
    /// The node that it should run on: this node's name or the peer's.
    pub home: String,
    /// What is done for it.
    pub policy: Policy,
    /// When it moves home: the node's section, with this guest's overrides.
    pub failback: Failback,
    /// Its epochs: the node's section, with this guest's overrides.
    pub replication: Replication,
}

impl Config {
    /// The guest of that name.
    pub fn guest(&self, name: &GuestName) -> Option<&Guest> {
        self.guests.iter().find(|g| g.name == *name)
    }
    /// Whether this node is the guest's home.
    pub fn is_home(&self, guest: &Guest) -> bool {
        guest.home == self.node.name
    }
    /// What the guest's replicator is told.
    pub fn settings(&self, guest: &Guest) -> Settings {
        guest.replication.settings(&self.detection)
    }
}

impl Default for Detection {
    fn default() -> Self {
        Detection {
            beat_ms: 10,
            lost_ms: 120,
            stream_silent_ms: 100,
        }
    }
}

impl Default for Failback {
    fn default() -> Self {
        Failback {
            policy: FailbackPolicy::Automatic,
            stability_s: 30,
            flap_max: 3,
            flap_window_s: 3600,
        }
    }
}

impl Default for Replication {
    fn default() -> Self {
        let s = Settings::default();
        Replication {
            max_interval_ms: s.max_interval_ms,
            min_interval_ms: s.min_interval_ms,
            ack: s.ack,
            delta_cache_mib: s.delta_cache_mib,
            output_limit_mib: s.output_limit_mib,
        }
    }
}

impl Default for Libvirt {
    fn default() -> Self {
        Libvirt {
            uri: "qemu:///system".into(),
        }
    }
}

impl Default for Hooks {
    fn default() -> Self {
        Hooks {
            dir: "/etc/havm/hooks".into(),
            timeout_s: 30,
        }
    }
}

/// Default of `node.state_dir`.
pub const STATE_DIR: &str = "/var/lib/havm";
/// Default of `node.run_dir`.
pub const RUN_DIR: &str = "/run/havm";
/// Default of `node.log`.
pub const LOG: &str = "info";
/// Default of `peer.beat_port` (UDP).
pub const BEAT_PORT: u16 = 7420;
/// Default of `peer.peer_port` (TCP).
pub const PEER_PORT: u16 = 7421;
/// Default of `peer.replication_ports` (TCP).
pub const REPLICATION_PORTS: (u16, u16) = (7440, 7499);
/// Port of the built-in witness where an address names none (TCP).
pub const WITNESS_PORT: u16 = 7422;
