//! What can be asked of the guest, and what it says.

use serde::{Deserialize, Serialize};

/// A control request, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// Answer with [`Seen`].
    Seen,
    /// Answer with a list of [`ConnSeen`].
    Conns,
    /// Check all of the dirtied memory now, then answer with [`Seen`].
    Check,
    /// Dirty memory at this rate from now on.
    Dirty {
        /// MiB a second; 0 stops it.
        mib_per_s: f64,
        /// The memory that is walked through, MiB.
        working_mib: u64,
    },
    /// Dirty this much at once.
    Burst {
        /// MiB.
        mib: u64,
    },
    /// Read records back from the disk. The answer is a dump: for each sequence number 64 bytes,
    /// the record as it stands on the disk, or zeros where there is no valid one.
    Dump {
        /// First sequence number.
        from: u64,
        /// How many; bounded by [`MAX_DUMP_RECORDS`].
        count: u64,
    },
    /// Power the guest off from inside.
    Poweroff,
    /// Reboot it from inside.
    Reboot,
}

/// The most records that one dump may ask for.
pub const MAX_DUMP_RECORDS: u64 = 1024;

/// What the guest has seen.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Differs for every boot.
    pub boot: u32,
    /// Milliseconds since boot by the guest's clock.
    pub uptime_ms: u64,
    /// Testimonies answered.
    pub answers: u64,
    /// The last counter used.
    pub counter: u64,
    /// Connections that ever sent a testimony.
    pub conns: u64,
    /// Requests whose named last answer the guest does not know.
    pub unknown_history: u64,
    /// The disk, where there is one.
    pub disk: Option<DiskSeen>,
    /// The dirtied memory.
    pub memory: MemorySeen,
}

/// What the guest knows of its disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskSeen {
    /// Records that fit; a later one takes the place of record `seq - slots`.
    pub slots: u64,
    /// The sequence number that comes next.
    pub next_seq: u64,
    /// Records written in this boot.
    pub written: u64,
    /// Writes that failed.
    pub errors: u64,
    /// Sequence number at which this boot began.
    pub first_seq: u64,
    /// Records found before this boot's first that were not valid though later ones are.
    pub holes_at_boot: u64,
}

/// What the guest knows of its dirtied memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MemorySeen {
    /// Pages of 4 KiB that are walked through.
    pub pages: u64,
    /// Pages written since boot.
    pub rewritten: u64,
    /// Pages checked since boot.
    pub checked: u64,
    /// Pages that did not hold what they should.
    pub errors: u64,
    /// The first of them in words.
    pub first_error: Option<String>,
}

/// What the guest remembers of one connection.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConnSeen {
    /// The connection, as the client numbers it.
    pub conn: u64,
    /// Testimonies answered.
    pub answers: u64,
    /// The last request's number.
    pub number: u64,
    /// The last answer's counter.
    pub counter: u64,
    /// The last answer's stamp.
    pub stamp_ns: u64,
    /// Running hash of all its answers ([`crate::proto::Answer::chain`]).
    pub chain: u64,
}
