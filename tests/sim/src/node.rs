//! A modelled host: what lasts, what a crash takes, and the processes on it.

use crate::check::Point;
use crate::replica::Replica;
use havm_core::detector::Detector;
use havm_core::engine::Engine;
use havm_core::ids::LifeId;
use havm_core::record::Record;

/// A guest's QEMU.
#[derive(Debug, Clone)]
pub struct Guest {
    /// As ordered.
    pub life: LifeId,
    /// Waiting for a migration: holds no state of its own yet.
    pub waiting: bool,
    /// vCPUs run.
    pub running: bool,
    /// Its state.
    pub point: Option<Point>,
    /// It has shut itself down; its process ends soon.
    pub down: bool,
}

/// The daemon with its engine.
#[derive(Debug)]
pub struct Daemon {
    /// Names the process.
    pub session: u64,
    /// The engine.
    pub engine: Engine,
    /// The real detector, fed by modelled beats.
    pub detector: Detector,
    /// When it started, microseconds.
    pub started_us: u64,
    /// The tick that is under way.
    pub tick_us: Option<u64>,
    /// Beats sent.
    pub beats: u64,
}

/// A host's disk for the guest.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disk {
    /// What a process on this host reads; none while in-place writes make it a mixture.
    pub now: Option<Point>,
    /// What a crash of the host leaves.
    pub flushed: Option<Point>,
}

/// A host.
#[derive(Debug)]
pub struct Node {
    /// Powered on.
    pub up: bool,
    /// Counts boots: what belonged to an earlier one never happens.
    pub boot: u64,
    /// Nothing runs before this time.
    pub frozen_until_us: u64,
    /// The durable record.
    pub record: Option<Record>,
    /// The disk.
    pub disk: Disk,
    /// Committed, but not flushed since a promotion.
    pub unflushed: bool,
    /// The daemon.
    pub daemon: Option<Daemon>,
    /// The replicator.
    pub replica: Option<Replica>,
    /// The guest's process.
    pub guest: Option<Guest>,
    /// A start that is under way, by its number.
    pub starting: Option<u64>,
    /// The guest ended on purpose while no daemon looked.
    pub ended_on_purpose: bool,
    /// Can reach the witness.
    pub sees_witness: bool,
}

impl Node {
    /// A host that is off.
    pub fn new() -> Node {
        Node {
            up: false,
            boot: 0,
            frozen_until_us: 0,
            record: None,
            disk: Disk::default(),
            unflushed: false,
            daemon: None,
            replica: None,
            guest: None,
            starting: None,
            ended_on_purpose: false,
            sees_witness: true,
        }
    }
}

impl Default for Node {
    fn default() -> Self {
        Node::new()
    }
}
