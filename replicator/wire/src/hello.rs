//! What belongs to one link: the handshake, and the positions that free memory and prove life.
//!
//! ```text
//! connecting side:  Hello ───────────>
//!                         <────────── Welcome | Refused
//! both, from then on:     Position (whenever something was received, and when idle)
//! ```
//! `Hello` up to its version, and all of `Refused`, keep their form in every version, so that two
//! versions can tell each other what they are.

use crate::codec::{DecodeError, Get, Put};
use crate::decode::{get_guest, kind, name};
use crate::frame::{MAX_NAME_BYTES, MAX_TEXT_BYTES};
use crate::raw::{Encoded, RawFrame, TooLarge};
use crate::version::{MAGIC, VersionMismatch, WIRE_VERSION, check};
use havm_core::ids::{GuestName, LifeId, StreamId, Term};

/// Which stream a link wants to carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamHello {
    /// The guest.
    pub guest: GuestName,
    /// The primary's term.
    pub term: Term,
    /// Its capture session.
    pub stream: StreamId,
    /// The primary's life.
    pub my_life: LifeId,
    /// The standby's life that it is meant for.
    pub peer_life: LifeId,
}

/// How far a side has come in the direction that it receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// All frames up to this one were received: they need not be kept for a resend.
    pub received: u64,
    /// All frames up to this one were taken by their consumer: their room is free again.
    pub consumed: u64,
}

/// What a connection of a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// It carries the stream.
    Data,
    /// It carries signs of life only ([`LinkFrame::Position`]): those must wait neither behind data
    /// nor for the threads that work on data.
    Beat,
}

/// A message of one link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkFrame {
    /// The first of the side that connects.
    Hello {
        /// The stream.
        hello: StreamHello,
        /// Where it stands in the standby's messages.
        position: Position,
        /// What the connection is for.
        lane: Lane,
    },
    /// The link carries the stream from here on.
    Welcome {
        /// Where the standby stands in the stream.
        position: Position,
        /// Bytes that it takes before the first is consumed.
        window_bytes: u64,
        /// Random, made when it took the stream on. Another one later means that the standby
        /// lost what it had received.
        session: [u8; 16],
    },
    /// It does not.
    Refused {
        /// The refusing side's version.
        version: u32,
        /// This stream will never be taken; otherwise try again later.
        forever: bool,
        /// For a person.
        why: String,
    },
    /// See [`Position`]; also sent when there is nothing to say, as a sign of life.
    Position(Position),
}

/// Why a frame is not a usable link message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkFrameError {
    /// It is malformed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The peer is of another version.
    #[error(transparent)]
    Version(#[from] VersionMismatch),
}

impl LinkFrame {
    /// The message, ready to be sent with sequence number 0.
    pub fn encode(&self) -> Result<Encoded, TooLarge> {
        self.encode_as(WIRE_VERSION)
    }

    /// The same, claiming to be of another version: for tests of the handshake.
    #[cfg(feature = "test-support")]
    pub fn encode_as_version(&self, version: u32) -> Result<Encoded, TooLarge> {
        self.encode_as(version)
    }

    fn encode_as(&self, my_version: u32) -> Result<Encoded, TooLarge> {
        let mut b = Vec::new();
        let kind = match self {
            LinkFrame::Hello {
                hello,
                position,
                lane,
            } => {
                b.extend_from_slice(&MAGIC);
                b.u32(my_version);
                b.text(hello.guest.as_str(), MAX_NAME_BYTES);
                b.u64(hello.term.0);
                b.extend_from_slice(&hello.stream.0);
                b.extend_from_slice(&hello.my_life.0);
                b.extend_from_slice(&hello.peer_life.0);
                put_position(&mut b, position);
                b.u8(match lane {
                    Lane::Data => 0,
                    Lane::Beat => 1,
                });
                kind::HELLO
            }
            LinkFrame::Welcome {
                position,
                window_bytes,
                session,
            } => {
                put_position(&mut b, position);
                b.u64(*window_bytes);
                b.extend_from_slice(session);
                kind::WELCOME
            }
            LinkFrame::Refused {
                version,
                forever,
                why,
            } => {
                b.u32(*version);
                b.u8(u8::from(*forever));
                b.text(why, MAX_TEXT_BYTES);
                kind::REFUSED
            }
            LinkFrame::Position(p) => {
                put_position(&mut b, p);
                kind::POSITION
            }
        };
        Encoded::new(kind, b.into())
    }

    /// Whether a frame belongs to the link, not to the stream.
    pub fn is_kind(kind: u8) -> bool {
        kind >= 0x80
    }

    /// Reads a received message.
    pub fn decode(raw: &RawFrame) -> Result<LinkFrame, LinkFrameError> {
        let mut g = Get::new(name(raw.header.kind), &raw.payload);
        if raw.header.seq != 0 {
            return Err(g.bad("a link's own frame has a sequence number").into());
        }
        let frame = match raw.header.kind {
            kind::HELLO => {
                if g.array::<8>()? != MAGIC {
                    return Err(g.bad("it does not start as a havm stream").into());
                }
                check(g.u32()?)?;
                LinkFrame::Hello {
                    hello: StreamHello {
                        guest: get_guest(&mut g)?,
                        term: Term(g.u64()?),
                        stream: StreamId(g.array()?),
                        my_life: LifeId(g.array()?),
                        peer_life: LifeId(g.array()?),
                    },
                    position: get_position(&mut g)?,
                    lane: match g.u8()? {
                        0 => Lane::Data,
                        1 => Lane::Beat,
                        n => return Err(g.bad(format!("unknown lane {n}")).into()),
                    },
                }
            }
            kind::WELCOME => LinkFrame::Welcome {
                position: get_position(&mut g)?,
                window_bytes: g.u64()?,
                session: g.array()?,
            },
            kind::REFUSED => LinkFrame::Refused {
                version: g.u32()?,
                forever: g.bool()?,
                why: g.text(MAX_TEXT_BYTES)?.to_owned(),
            },
            kind::POSITION => LinkFrame::Position(get_position(&mut g)?),
            other => return Err(g.bad(format!("kind {other:#04x} is not a link's")).into()),
        };
        g.end()?;
        Ok(frame)
    }
}

fn put_position(b: &mut Vec<u8>, p: &Position) {
    b.u64(p.received);
    b.u64(p.consumed);
}

fn get_position(g: &mut Get<'_>) -> Result<Position, DecodeError> {
    let p = Position {
        received: g.u64()?,
        consumed: g.u64()?,
    };
    if p.consumed > p.received {
        return Err(g.bad(format!(
            "consumed {} of {} received",
            p.consumed, p.received
        )));
    }
    Ok(p)
}
