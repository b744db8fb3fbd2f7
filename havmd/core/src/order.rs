//! What the daemon orders its replicator to do, and what the replicator reports.
//!
//! JSON, one value a line, over the replicator's control socket (0600). Lines are bounded by
//! [`MAX_LINE_BYTES`]. The replicator refuses every order of a term below the highest that it has
//! seen ([`Report::Refused`]). It survives its daemon: a new daemon connects, sends
//! [`Order::Status`], and goes on from the [`ReplicaState`] that it gets.
//!
//! ```text
//!   idle ──AttachPrimary──> attached ──OpenGate──> solo ──StartStream──> syncing ──(Synced) Arm──> protected
//!   idle ──AttachStandby──> attached ──Receive──> receiving ──(EligibleImage) ConfirmEligible──> eligible
//!   eligible ──Seal, Promote──> solo | protected          protected ──HandOver──> handed
//!   handed ──BecomeStandby──> eligible ──AttachStandby (a fresh waiting QEMU)──> eligible
//!   handed ──Resume──> solo                               any primary ──Freeze──> frozen
//! ```

use crate::ids::{EpochNo, LifeId, StreamId, Term};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// The longest line either side accepts on the control socket.
pub const MAX_LINE_BYTES: usize = 256 * 1024;

/// The version of this protocol; both sides of a control socket must have the same one, an older
/// replicator is kept running and adopted as long as this does not change.
pub const CONTROL_VERSION: u32 = 1;

/// What the two images have in common when a stream starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamBase {
    /// Nothing is known: all pages count as dirty, blocks are compared as logs and hashes say.
    Unknown,
    /// Both sides hold the same image and disk (after a handover).
    Equal,
}

/// What the promoted guest's gate does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "gate")]
pub enum PromoteAs {
    /// Open at once, under the durable record solo(term).
    Solo,
    /// Closed: it is protected by the old primary from its first epoch on (rule 9).
    Protected {
        /// This copy's life.
        my_life: LifeId,
        /// The old primary's life.
        peer_life: LifeId,
        /// Where the old primary's replicator receives.
        ports: Vec<SocketAddr>,
    },
}

/// An order of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "order")]
pub enum Order {
    /// Answer with [`Report::State`]; from now on this connection gets the reports.
    Status,
    /// The guest's QEMU is up (running, or started paused): connect to its monitor, prepare capture, and let
    /// its NICs reach the gate, which stays closed.
    AttachPrimary {
        /// The life of this guest process.
        life: LifeId,
    },
    /// A QEMU waits for an incoming migration: map its RAM. With an image held already (after
    /// [`Order::BecomeStandby`]) the image moves into it, and acks go on meanwhile.
    AttachStandby {
        /// The life of this copy.
        life: LifeId,
    },
    /// Run the vCPUs of an attached primary (started paused so that nothing is lost before).
    Run {
        /// The term.
        term: Term,
    },
    /// Open the gate: the record says solo(term). Writes are marked for the peer from now on.
    OpenGate {
        /// The term.
        term: Term,
    },
    /// Close the gate; what the guest sends is held.
    CloseGate {
        /// The term.
        term: Term,
    },
    /// Connect to the standby and bring it up to date; report [`Report::Synced`] when epochs flow
    /// and the rest is small.
    StartStream {
        /// The term.
        term: Term,
        /// This copy's life.
        my_life: LifeId,
        /// The standby's life.
        peer_life: LifeId,
        /// The standby's addresses, one a link.
        ports: Vec<SocketAddr>,
        /// What is equal already.
        base: StreamBase,
    },
    /// End the stream and forget the standby. The gate stays as it is.
    StopStream {
        /// The term.
        term: Term,
    },
    /// The record says protected(term): mark the next epoch eligible; from now on the gate
    /// releases what the standby acked. Report [`Report::Protected`] at the first such ack.
    Arm {
        /// The term.
        term: Term,
    },
    /// Listen for the primary's stream; report [`Report::Listening`].
    Receive {
        /// The term.
        term: Term,
        /// This copy's life.
        my_life: LifeId,
        /// The primary's life, where it is known.
        peer_life: Option<LifeId>,
    },
    /// The record says eligible(term): acks may be sent.
    ConfirmEligible {
        /// The term.
        term: Term,
    },
    /// Stop committing and acking; report [`Report::Sealed`].
    Seal {
        /// The term that is being taken.
        term: Term,
    },
    /// Go on from the last committed epoch. Seals first where that was not done.
    Promote {
        /// The new term, already persisted.
        term: Term,
        /// Refuse unless exactly this epoch is the last (a handover).
        expect: Option<EpochNo>,
        /// What the gate does.
        then: PromoteAs,
    },
    /// Stop the vCPUs, have a last epoch acked, open a receiver; report [`Report::HandedOver`].
    HandOver {
        /// The term that ends.
        term: Term,
    },
    /// A handover that found no taker, or a frozen primary with a permit: run, gate open.
    Resume {
        /// The new term, already persisted as solo.
        term: Term,
    },
    /// The handover is confirmed, and the record says eligible(term): the paused RAM and the disk
    /// are image N, acks may be sent. QEMU may be killed once [`Report::ImageHeld`] came.
    BecomeStandby {
        /// The new term.
        term: Term,
        /// This copy's life.
        my_life: LifeId,
        /// The new primary's life.
        peer_life: LifeId,
    },
    /// Refused: close the gate, stop the vCPUs, keep everything.
    Freeze {
        /// The term.
        term: Term,
    },
    /// The guest's QEMU is about to be ended on purpose: let go of it, and do not report it.
    /// Answered by [`Report::Detached`].
    Detach,
    /// Compare all of RAM and disk on both sides at one epoch (on the primary).
    Verify {
        /// Names the answer.
        id: u64,
    },
    /// Leave: close everything and exit. Only for a guest that is no longer protected, or a copy
    /// that is given up.
    Quit,
}

impl Order {
    /// The order's name, as on the control socket.
    pub fn name(&self) -> &'static str {
        match self {
            Order::Status => "status",
            Order::AttachPrimary { .. } => "attach-primary",
            Order::AttachStandby { .. } => "attach-standby",
            Order::Run { .. } => "run",
            Order::OpenGate { .. } => "open-gate",
            Order::CloseGate { .. } => "close-gate",
            Order::StartStream { .. } => "start-stream",
            Order::StopStream { .. } => "stop-stream",
            Order::Arm { .. } => "arm",
            Order::Receive { .. } => "receive",
            Order::ConfirmEligible { .. } => "confirm-eligible",
            Order::Seal { .. } => "seal",
            Order::Promote { .. } => "promote",
            Order::HandOver { .. } => "hand-over",
            Order::Resume { .. } => "resume",
            Order::BecomeStandby { .. } => "become-standby",
            Order::Freeze { .. } => "freeze",
            Order::Detach => "detach",
            Order::Verify { .. } => "verify",
            Order::Quit => "quit",
        }
    }

    /// The term that it was given in, where it has one.
    pub fn term(&self) -> Option<Term> {
        match self {
            Order::Run { term }
            | Order::OpenGate { term }
            | Order::CloseGate { term }
            | Order::StartStream { term, .. }
            | Order::StopStream { term }
            | Order::Arm { term }
            | Order::Receive { term, .. }
            | Order::ConfirmEligible { term }
            | Order::Seal { term }
            | Order::Promote { term, .. }
            | Order::HandOver { term }
            | Order::Resume { term }
            | Order::BecomeStandby { term, .. }
            | Order::Freeze { term } => Some(*term),
            Order::Status
            | Order::AttachPrimary { .. }
            | Order::AttachStandby { .. }
            | Order::Detach
            | Order::Verify { .. }
            | Order::Quit => None,
        }
    }
}

/// What a replicator is doing; the states of the module's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Serving the disk, no guest.
    Idle,
    /// A guest's QEMU is attached as primary, gate closed, no stream.
    Attached,
    /// Primary, gate open, no stream.
    Solo,
    /// Primary, gate open, bringing a standby up to date.
    Syncing,
    /// Primary, gate under acks.
    Protected,
    /// Old primary of a handover.
    Handed,
    /// Refused primary.
    Frozen,
    /// A waiting QEMU is attached.
    Waiting,
    /// Standby, not yet eligible.
    Receiving,
    /// Standby with a complete image, acking.
    Eligible,
    /// Standby that stopped committing.
    Sealed,
}

/// Numbers that grow, and the last of those that change. All since the replicator's start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Epochs closed (primary) or committed (standby).
    pub epochs: u64,
    /// Median pause of the last 1000 epochs, microseconds.
    pub pause_us_p50: u64,
    /// 99th percentile of the same.
    pub pause_us_p99: u64,
    /// Mean distance between the last 100 barriers, microseconds.
    pub interval_us: u64,
    /// Dirty bytes captured (RAM pages, disk writes, device state).
    pub dirty_bytes: u64,
    /// Bytes sent to the peer for them.
    pub wire_bytes: u64,
    /// Bytes sent for sync and resync.
    pub sync_bytes: u64,
    /// Frames held by the gate at the moment.
    pub held_frames: u64,
    /// Frames let out.
    pub released_frames: u64,
    /// Frames dropped: held at a seal or a lost stream, or over the bound.
    pub dropped_frames: u64,
    /// Frames passed to the guest.
    pub input_frames: u64,
    /// Frames for the guest that did not fit its queue.
    pub input_dropped: u64,
    /// Disk writes served.
    pub disk_writes: u64,
    /// Disk bytes written.
    pub disk_write_bytes: u64,
    /// Links that carry the stream at the moment.
    pub links_up: u32,
    /// Links that failed under the stream.
    pub link_failures: u64,
    /// Pages in the last epoch.
    pub last_pages: u64,
    /// Blocks that may differ from the peer's, bytes.
    pub disk_out_of_sync_bytes: u64,
}

/// What a replicator says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaState {
    /// See [`CONTROL_VERSION`].
    pub version: u32,
    /// What it does.
    pub mode: Mode,
    /// The highest term it was ordered in.
    pub term: Term,
    /// The life of its copy.
    pub life: Option<LifeId>,
    /// The stream it sends or receives.
    pub stream: Option<StreamId>,
    /// The last epoch closed and acked (primary) or committed (standby).
    pub acked: EpochNo,
    /// The last epoch closed (primary) or received (standby).
    pub closed: EpochNo,
    /// The guest's vCPUs run.
    pub running: bool,
    /// Something came from the peer's replicator lately.
    pub stream_alive: bool,
    /// The addresses it receives at.
    pub ports: Vec<SocketAddr>,
    /// Guest RAM, bytes.
    pub ram_bytes: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// All disks, bytes.
    pub disk_bytes: u64,
    /// Sync progress: done and total bytes.
    pub sync: Option<(u64, u64)>,
    /// Counters.
    pub counters: Counters,
}

/// Why a guest's QEMU or vCPUs stopped, as seen on its monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestEnd {
    /// The guest powered itself off.
    Shutdown,
    /// The monitor closed: QEMU is gone.
    Gone,
}

/// A report of the replicator.
#[allow(clippy::large_enum_variant)] // one a second at most is a `State`; none is stored in bulk
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "report")]
pub enum Report {
    /// The answer to [`Order::Status`], and every second after that.
    State(ReplicaState),
    /// The QEMU is attached.
    Attached {
        /// The life of the copy.
        life: LifeId,
    },
    /// It could not be attached; the text names the reason and the remedy.
    AttachFailed {
        /// For a person.
        why: String,
    },
    /// QEMU was let go.
    Detached,
    /// The standby's replicator listens.
    Listening {
        /// The term.
        term: Term,
        /// One address a link.
        ports: Vec<SocketAddr>,
    },
    /// Sync goes on.
    SyncProgress {
        /// Bytes dealt with.
        done_bytes: u64,
        /// Bytes in all; grows while the guest writes.
        total_bytes: u64,
    },
    /// The standby has everything but the last small epoch.
    Synced {
        /// The term.
        term: Term,
    },
    /// (standby) An epoch marked eligible is complete and its commit record written: persist
    /// eligible(term), then order [`Order::ConfirmEligible`].
    EligibleImage {
        /// The term.
        term: Term,
        /// The stream.
        stream: StreamId,
        /// The epoch.
        n: EpochNo,
    },
    /// (primary) The standby acked an eligible epoch: the guest is protected.
    Protected {
        /// The term.
        term: Term,
        /// The stream.
        stream: StreamId,
        /// The epoch.
        n: EpochNo,
    },
    /// Nothing came from the peer's replicator for the detection time.
    StreamSilent {
        /// The term.
        term: Term,
    },
    /// Something came again.
    StreamAlive {
        /// The term.
        term: Term,
    },
    /// The stream broke and cannot be mended by reconnecting: lost state on the other side, a
    /// protocol fault, or a bound. The standby's eligibility is not affected by this report.
    StreamBroken {
        /// The term.
        term: Term,
        /// For a person.
        why: String,
    },
    /// (standby) Committing has stopped.
    Sealed {
        /// The last committed epoch; none where no eligible image is held.
        n: Option<EpochNo>,
    },
    /// The guest runs here.
    Promoted {
        /// The term.
        term: Term,
        /// The epoch it went on from.
        n: EpochNo,
        /// From the order to running vCPUs, microseconds.
        took_us: u64,
    },
    /// It does not; the copy is lost or the expectation was not met.
    PromoteFailed {
        /// The term.
        term: Term,
        /// For a person.
        why: String,
    },
    /// All of the disk is durable again after a promotion: the record may say `cold`.
    DiskFlushed {
        /// The term.
        term: Term,
    },
    /// (old primary) vCPUs stand, the last epoch is acked, a receiver listens.
    HandedOver {
        /// The term that ends.
        term: Term,
        /// The last epoch.
        n: EpochNo,
        /// Where it will receive.
        ports: Vec<SocketAddr>,
    },
    /// The last epoch was not acked in time; the guest runs on, protected.
    HandOverFailed {
        /// The term.
        term: Term,
        /// For a person.
        why: String,
    },
    /// (old primary) The RAM image no longer needs the old QEMU: it may be replaced by a waiting one.
    ImageHeld,
    /// (standby) The image is in a waiting QEMU: promotion is possible at once.
    Ready,
    /// The guest's QEMU stopped.
    GuestEnded {
        /// How.
        how: GuestEnd,
    },
    /// (standby) The primary said that the guest shut itself down: a flag of an acked epoch.
    PeerGuestShutdown {
        /// The term.
        term: Term,
    },
    /// The gate's queue is full: the vCPUs stand until the standby acks or a permit comes.
    OutputFull,
    /// The answer to [`Order::Verify`].
    Verified {
        /// The order's.
        id: u64,
        /// Pages that differ.
        ram_different: u64,
        /// Pages compared.
        ram_pages: u64,
        /// Disk blocks that differ.
        disk_different: u64,
        /// Disk blocks compared.
        disk_blocks: u64,
        /// Where it could not be done: why.
        error: Option<String>,
    },
    /// An order was not obeyed.
    Refused {
        /// The order's name.
        order: String,
        /// For a person.
        why: String,
    },
    /// Something a person should know; nothing to decide.
    Warning {
        /// For a person.
        text: String,
    },
}
