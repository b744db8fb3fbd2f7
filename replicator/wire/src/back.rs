//! What the standby's replicator says to the primary's: few, small, in order, over every live link.

use crate::codec::{DecodeError, Get, Put};
use crate::decode::{kind, name};
use crate::frame::{MAX_HASHES, MAX_TEXT_BYTES};
use crate::raw::{Encoded, RawFrame, TooLarge};
use bytes::Bytes;
use havm_core::ids::{EpochId, EpochNo, LifeId, StreamId, Term};

/// A message of the standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Back {
    /// This epoch and all before are complete and staged where they outlive the replicator (rule 4).
    Ack {
        /// The epoch.
        epoch: EpochId,
        /// The life that holds it.
        life: LifeId,
    },
    /// This epoch and all before are on stable storage (rule 14).
    Durable {
        /// The epoch.
        epoch: EpochId,
    },
    /// The answer to a hash range.
    HashReply {
        /// Which.
        id: u64,
        /// Places in the range (from 0) that differ.
        differing: Vec<u32>,
    },
    /// A part of the answer to [`crate::frame::Frame::PeerSetRequest`].
    PeerSet {
        /// Which disk.
        disk: u16,
        /// More parts follow.
        more: bool,
        /// The disk crate's encoding of the set.
        encoded: Bytes,
    },
    /// The answer to a verification.
    Verified {
        /// Which.
        id: u64,
        /// Pages that differ.
        ram_different: u64,
        /// Pages compared.
        ram_pages: u64,
        /// Disk blocks that differ.
        disk_different: u64,
        /// Disk blocks compared.
        disk_blocks: u64,
        /// Why it could not be done.
        error: Option<String>,
    },
    /// The standby leaves on purpose.
    Bye {
        /// For a person.
        reason: String,
    },
}

impl Back {
    /// The message, ready to be sent.
    pub fn encode(&self) -> Result<Encoded, TooLarge> {
        let mut b = Vec::new();
        let kind = match self {
            Back::Ack { epoch, life } => {
                put_epoch(&mut b, epoch);
                b.extend_from_slice(&life.0);
                kind::BACK_ACK
            }
            Back::Durable { epoch } => {
                put_epoch(&mut b, epoch);
                kind::BACK_DURABLE
            }
            Back::HashReply { id, differing } => {
                b.u64(*id);
                b.u32(differing.len() as u32);
                differing.iter().for_each(|d| b.u32(*d));
                kind::BACK_HASH_REPLY
            }
            Back::PeerSet {
                disk,
                more,
                encoded,
            } => {
                b.u16(*disk);
                b.u8(u8::from(*more));
                b.extend_from_slice(encoded);
                kind::BACK_PEER_SET
            }
            Back::Verified {
                id,
                ram_different,
                ram_pages,
                disk_different,
                disk_blocks,
                error,
            } => {
                for v in [id, ram_different, ram_pages, disk_different, disk_blocks] {
                    b.u64(*v);
                }
                b.u8(u8::from(error.is_some()));
                b.text(error.as_deref().unwrap_or(""), MAX_TEXT_BYTES);
                kind::BACK_VERIFIED
            }
            Back::Bye { reason } => {
                b.text(reason, MAX_TEXT_BYTES);
                kind::BACK_BYE
            }
        };
        Encoded::new(kind, b.into())
    }

    /// Reads a received message.
    pub fn decode(raw: &RawFrame) -> Result<Back, DecodeError> {
        let mut g = Get::new(name(raw.header.kind), &raw.payload);
        let back = match raw.header.kind {
            kind::BACK_ACK => Back::Ack {
                epoch: get_epoch(&mut g)?,
                life: LifeId(g.array()?),
            },
            kind::BACK_DURABLE => Back::Durable {
                epoch: get_epoch(&mut g)?,
            },
            kind::BACK_HASH_REPLY => {
                let id = g.u64()?;
                let n = g.count(MAX_HASHES, 4)?;
                let differing = (0..n).map(|_| g.u32()).collect::<Result<_, _>>()?;
                Back::HashReply { id, differing }
            }
            kind::BACK_PEER_SET => Back::PeerSet {
                disk: g.u16()?,
                more: g.bool()?,
                encoded: g.rest(&raw.payload),
            },
            kind::BACK_VERIFIED => {
                let [id, ram_different, ram_pages, disk_different, disk_blocks] =
                    [g.u64()?, g.u64()?, g.u64()?, g.u64()?, g.u64()?];
                let failed = g.bool()?;
                let text = g.text(MAX_TEXT_BYTES)?;
                let error = failed.then(|| text.to_owned());
                Back::Verified {
                    id,
                    ram_different,
                    ram_pages,
                    disk_different,
                    disk_blocks,
                    error,
                }
            }
            kind::BACK_BYE => Back::Bye {
                reason: g.text(MAX_TEXT_BYTES)?.to_owned(),
            },
            other => return Err(g.bad(format!("unknown kind {other:#04x}"))),
        };
        g.end()?;
        Ok(back)
    }
}

fn put_epoch(b: &mut Vec<u8>, e: &EpochId) {
    b.u64(e.term.0);
    b.extend_from_slice(&e.stream.0);
    b.u64(e.n.0);
}

fn get_epoch(g: &mut Get<'_>) -> Result<EpochId, DecodeError> {
    Ok(EpochId {
        term: Term(g.u64()?),
        stream: StreamId(g.array()?),
        n: EpochNo(g.u64()?),
    })
}
