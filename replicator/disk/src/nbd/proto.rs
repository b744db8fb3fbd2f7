//! The protocol's numbers (`doc/proto.md`) and its fixed-size messages. All big-endian.

pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(super) const REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, no zeroes after EXPORT_NAME.
pub(super) const HS_FIXED_NEWSTYLE: u16 = 1;
pub(super) const HS_NO_ZEROES: u16 = 2;

pub(super) mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

pub(super) mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// What an export offers: flags, flush, FUA, trim, write-zeroes, and several connections with one
/// consistent view. It never says read-only: a waiting QEMU opens it before it may write.
pub(super) const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;

pub(super) mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    pub const FLAG_FUA: u16 = 1;
    pub const FLAG_NO_HOLE: u16 = 2;
    pub const FLAG_DF: u16 = 4;
    pub const FLAG_REQ_ONE: u16 = 8;
}

pub(super) mod chunk {
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
}

/// States of base:allocation.
pub(super) const STATE_HOLE_ZERO: u32 = 3;

/// The largest read or write, bytes: what the specification tells clients to count on.
pub(super) const MAX_REQUEST: u32 = 32 << 20;
/// The largest option, bytes (an export name has at most 4096).
pub(super) const MAX_OPTION: u32 = 8192;
/// Bytes of a request's head.
pub(super) const REQUEST_BYTES: usize = 28;

/// A request's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    /// None when the magic is wrong: the stream is out of step.
    pub(super) fn decode(r: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let u16_at = |i: usize| u16::from_be_bytes([r[i], r[i + 1]]);
        let u32_at = |i: usize| u32::from_be_bytes([r[i], r[i + 1], r[i + 2], r[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) << 32 | u64::from(u32_at(i + 4));
        (u32_at(0) == REQUEST_MAGIC).then(|| Request {
            flags: u16_at(4),
            kind: u16_at(6),
            cookie: u64_at(8),
            offset: u64_at(16),
            len: u32_at(24),
        })
    }

    /// Whether its flags are among those that its kind may have.
    pub(super) fn flags_ok(&self) -> bool {
        let may = match self.kind {
            cmd::READ => cmd::FLAG_DF | cmd::FLAG_FUA,
            cmd::WRITE | cmd::TRIM => cmd::FLAG_FUA,
            cmd::WRITE_ZEROES => cmd::FLAG_FUA | cmd::FLAG_NO_HOLE,
            cmd::BLOCK_STATUS => cmd::FLAG_REQ_ONE | cmd::FLAG_FUA,
            _ => cmd::FLAG_FUA,
        };
        self.flags & !may == 0
    }
}

/// A simple reply's head.
pub(super) fn simple_reply(error: u32, cookie: u64) -> [u8; 16] {
    let mut o = [0u8; 16];
    o[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    o[4..8].copy_from_slice(&error.to_be_bytes());
    o[8..].copy_from_slice(&cookie.to_be_bytes());
    o
}

/// A structured reply chunk's head; always the last (and only) chunk.
pub(super) fn chunk_head(kind: u16, cookie: u64, len: u32) -> [u8; 20] {
    let mut o = [0u8; 20];
    o[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    o[4..6].copy_from_slice(&chunk::DONE.to_be_bytes());
    o[6..8].copy_from_slice(&kind.to_be_bytes());
    o[8..16].copy_from_slice(&cookie.to_be_bytes());
    o[16..].copy_from_slice(&len.to_be_bytes());
    o
}
