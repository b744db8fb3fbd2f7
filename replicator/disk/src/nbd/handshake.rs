//! Negotiation: options until GO or EXPORT_NAME.

use super::proto::*;
use std::io::{self, Read, Write};

/// What was agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Agreed {
    /// Reads are answered by structured chunks.
    pub(super) structured: bool,
    /// base:allocation may be asked for.
    pub(super) allocation: bool,
}

/// The export as negotiation sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Export<'a> {
    pub(super) name: &'a str,
    pub(super) size: u64,
}

const CONTEXT: &str = "base:allocation";
/// The id by which replies name the context.
pub(super) const CONTEXT_ID: u32 = 1;
/// More options than any client sends; a peer that goes on for ever is hung up on.
const MAX_OPTIONS: usize = 64;

/// Some(agreed) when transmission begins, None when the client left in order.
pub(super) fn negotiate<S: Read + Write>(
    s: &mut S,
    export: Export<'_>,
) -> io::Result<Option<Agreed>> {
    let mut hello = Vec::with_capacity(18);
    hello.extend_from_slice(&MAGIC.to_be_bytes());
    hello.extend_from_slice(&IHAVEOPT.to_be_bytes());
    hello.extend_from_slice(&(HS_FIXED_NEWSTYLE | HS_NO_ZEROES).to_be_bytes());
    s.write_all(&hello)?;
    let client = read_u32(s)?;
    if client & !u32::from(HS_FIXED_NEWSTYLE | HS_NO_ZEROES) != 0 {
        return Err(bad("unknown client flags"));
    }
    let no_zeroes = client & u32::from(HS_NO_ZEROES) != 0;
    let mut agreed = Agreed::default();
    for _ in 0..MAX_OPTIONS {
        let mut head = [0u8; 16];
        s.read_exact(&mut head)?;
        let word = |i: usize| u32::from_be_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        if head[..8] != IHAVEOPT.to_be_bytes() {
            return Err(bad("wrong option magic"));
        }
        let (option, len) = (word(8), word(12));
        if len > MAX_OPTION {
            // Skipped up to what a sane client could send, so that it gets an answer.
            if len > MAX_REQUEST {
                return Err(bad("an absurdly long option"));
            }
            io::copy(&mut Read::take(&mut *s, u64::from(len)), &mut io::sink())?;
            reply(s, option, rep::ERR_TOO_BIG, b"option too long")?;
            continue;
        }
        let mut data = vec![0u8; len as usize];
        s.read_exact(&mut data)?;
        match option {
            opt::EXPORT_NAME => {
                // This option has no error reply: hanging up is the answer.
                if data != export.name.as_bytes() {
                    return Err(bad("unknown export name"));
                }
                let mut out = Vec::with_capacity(134);
                out.extend_from_slice(&export.size.to_be_bytes());
                out.extend_from_slice(&EXPORT_FLAGS.to_be_bytes());
                if !no_zeroes {
                    out.resize(out.len() + 124, 0);
                }
                s.write_all(&out)?;
                return Ok(Some(agreed));
            }
            opt::ABORT => {
                reply(s, option, rep::ACK, &[])?;
                return Ok(None);
            }
            opt::LIST if data.is_empty() => {
                let mut item = (export.name.len() as u32).to_be_bytes().to_vec();
                item.extend_from_slice(export.name.as_bytes());
                reply(s, option, rep::SERVER, &item)?;
                reply(s, option, rep::ACK, &[])?;
            }
            opt::INFO | opt::GO => {
                if info(s, option, &data, export)? && option == opt::GO {
                    return Ok(Some(agreed));
                }
            }
            opt::STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured = true;
                reply(s, option, rep::ACK, &[])?;
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                if option == opt::SET_META_CONTEXT {
                    agreed.allocation = false;
                }
                match contexts(&data, export.name, option == opt::LIST_META_CONTEXT) {
                    _ if !agreed.structured => {
                        reply(
                            s,
                            option,
                            rep::ERR_INVALID,
                            b"structured replies come first",
                        )?;
                    }
                    Err((code, why)) => reply(s, option, code, why)?,
                    Ok(wanted) => {
                        if wanted {
                            let mut item = CONTEXT_ID.to_be_bytes().to_vec();
                            item.extend_from_slice(CONTEXT.as_bytes());
                            reply(s, option, rep::META_CONTEXT, &item)?;
                        }
                        agreed.allocation |= wanted && option == opt::SET_META_CONTEXT;
                        reply(s, option, rep::ACK, &[])?;
                    }
                }
            }
            opt::LIST | opt::STRUCTURED_REPLY => {
                reply(s, option, rep::ERR_INVALID, b"this option has no data")?;
            }
            _ => reply(s, option, rep::ERR_UNSUP, &[])?,
        }
    }
    Err(bad("too many options"))
}

/// Answers INFO and GO; whether the export was the right one.
fn info<S: Write>(s: &mut S, option: u32, data: &[u8], export: Export<'_>) -> io::Result<bool> {
    let parsed = (|| {
        let (name, rest) = counted(data)?;
        let (n, rest) = rest.split_at_checked(2)?;
        let n = usize::from(u16::from_be_bytes([n[0], n[1]]));
        (rest.len() == 2 * n).then_some(name)
    })();
    let Some(name) = parsed else {
        reply(
            s,
            option,
            rep::ERR_INVALID,
            b"malformed request for information",
        )?;
        return Ok(false);
    };
    if name != export.name.as_bytes() {
        reply(
            s,
            option,
            rep::ERR_UNKNOWN,
            b"there is no export of that name here",
        )?;
        return Ok(false);
    }
    let mut e = INFO_EXPORT.to_be_bytes().to_vec();
    e.extend_from_slice(&export.size.to_be_bytes());
    e.extend_from_slice(&EXPORT_FLAGS.to_be_bytes());
    reply(s, option, rep::INFO, &e)?;
    let mut b = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for v in [1u32, 4096, MAX_REQUEST] {
        b.extend_from_slice(&v.to_be_bytes());
    }
    reply(s, option, rep::INFO, &b)?;
    reply(s, option, rep::ACK, &[])?;
    Ok(true)
}

/// Whether the queries ask for base:allocation.
fn contexts(data: &[u8], name: &str, list: bool) -> Result<bool, (u32, &'static [u8])> {
    const BAD: (u32, &[u8]) = (rep::ERR_INVALID, b"malformed list of contexts");
    let (export, rest) = counted(data).ok_or(BAD)?;
    let (n, mut rest) = rest.split_at_checked(4).ok_or(BAD)?;
    let n = u32::from_be_bytes([n[0], n[1], n[2], n[3]]);
    // Each query takes four bytes at least, so the option's own length bounds this loop.
    let mut wanted = list && n == 0;
    for _ in 0..n {
        let (query, after) = counted(rest).ok_or(BAD)?;
        wanted |= query == CONTEXT.as_bytes() || list && query == b"base:";
        rest = after;
    }
    if !rest.is_empty() {
        return Err(BAD);
    }
    if export != name.as_bytes() {
        return Err((rep::ERR_UNKNOWN, b"there is no export of that name here"));
    }
    Ok(wanted)
}

/// A string with its length (u32) before it, and what follows.
fn counted(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (n, rest) = data.split_at_checked(4)?;
    rest.split_at_checked(u32::from_be_bytes([n[0], n[1], n[2], n[3]]) as usize)
}

fn reply<S: Write>(s: &mut S, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut out = Vec::with_capacity(20 + data.len());
    out.extend_from_slice(&REP_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    s.write_all(&out)
}

fn read_u32<S: Read>(s: &mut S) -> io::Result<u32> {
    let mut b = [0u8; 4];
    s.read_exact(&mut b)?;
    Ok(u32::from_be_bytes(b))
}

pub(super) fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
