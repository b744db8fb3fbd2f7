//! What the daemon tells a replicator at its start: one file, `RUN_DIR/g/GUEST/spec.json`.
//!
//! Written by `havmd` before it starts `havm-replicator --spec FILE`; read once. Everything that
//! can change while the replicator runs is an [`crate::order::Order`], not a part of this.

use crate::ids::GuestName;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The version of this file; a replicator refuses another one.
pub const SPEC_VERSION: u32 = 1;

/// The longest spec file that is read.
pub const MAX_SPEC_BYTES: u64 = 256 * 1024;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// See [`SPEC_VERSION`].
    pub version: u32,
    /// The guest.
    pub guest: GuestName,
    /// `RUN_DIR/g/GUEST`: control socket, pid file, NBD and QMP sockets. Lost at a host boot.
    pub run_dir: PathBuf,
    /// `STATE_DIR/guests/GUEST`: what must last.
    pub state_dir: PathBuf,
    /// The folder with this node's private key and certificate, see `havm pair`.
    pub identity_dir: PathBuf,
    /// SHA-256 of the peer's certificate (DER), 64 hexadecimal digits.
    pub peer_fingerprint: String,
    /// Replication links, in the order of both nodes' config.
    pub links: Vec<LinkSpec>,
    /// First and last TCP port to listen at as a standby.
    pub port_range: (u16, u16),
    /// The guest's disks, in the order of its XML.
    pub disks: Vec<DiskSpec>,
    /// The guest's NICs, in the order of its XML.
    pub nics: Vec<NicSpec>,
    /// Where QEMU's second monitor listens.
    pub qmp_socket: PathBuf,
    /// The user that QEMU runs as: NBD sockets must be usable by it.
    pub qemu_uid: u32,
    /// Its group.
    pub qemu_gid: u32,
    /// The versioned machine type, `pc-q35-10.0`.
    pub machine: String,
    /// Timing and bounds.
    pub settings: Settings,
}

/// One replication link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkSpec {
    /// Its name in the config.
    pub name: String,
    /// This node's address on it.
    pub local: IpAddr,
    /// The peer's.
    pub peer: IpAddr,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The raw image or block device on this node.
    pub path: PathBuf,
    /// Where the replicator keeps what it must remember about it (a folder of this node).
    pub meta_path: PathBuf,
    /// The NBD export's name.
    pub export: String,
    /// The NBD server's unix socket.
    pub nbd_socket: PathBuf,
    /// The size, equal on both nodes.
    pub size_bytes: u64,
}

/// One NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// The tap that QEMU opens; made by the replicator before QEMU starts, in no bridge.
    pub guest_tap: String,
    /// The tap on the bridge's side; made by the replicator.
    pub bridge_tap: String,
    /// The host bridge.
    pub bridge: String,
    /// The guest's address, `52:54:00:…`.
    pub mac: String,
}

/// Timing and bounds, from the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The longest distance of two barriers, milliseconds.
    pub max_interval_ms: u64,
    /// The shortest.
    pub min_interval_ms: u64,
    /// When the standby acks.
    pub ack: Ack,
    /// Memory for copies of pages sent lately, MiB.
    pub delta_cache_mib: u64,
    /// How much held output a guest may have before its vCPUs are stopped, MiB.
    pub output_limit_mib: u64,
    /// How long nothing may come from the peer before [`crate::order::Report::StreamSilent`].
    pub stream_silent_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            max_interval_ms: 100,
            min_interval_ms: 5,
            ack: Ack::Memory,
            delta_cache_mib: 64,
            output_limit_mib: 16,
            stream_silent_ms: 100,
        }
    }
}

/// When an epoch counts as safe on the standby (rule 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ack {
    /// Staged in memory that outlives the replicator process.
    Memory,
    /// The same, and on the standby's disk, synced.
    Disk,
}

impl Spec {
    /// Where `havmd` looks for the spec of a guest's replicator.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("spec.json")
    }
    /// Where the replicator listens for orders.
    pub fn control_socket(run_dir: &Path) -> PathBuf {
        run_dir.join("control.sock")
    }
    /// Where the replicator writes its process id and start time (see [`PidFile`]).
    pub fn pid_file(run_dir: &Path) -> PathBuf {
        run_dir.join("replicator.pid")
    }
    /// Its log.
    pub fn log_file(run_dir: &Path) -> PathBuf {
        run_dir.join("replicator.log")
    }
}

/// A process, so that a reused process id is not taken for it. Written by the replicator
/// (aside, then renamed) before it listens at its control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidFile {
    /// The process id.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks since boot.
    pub start_ticks: u64,
}
