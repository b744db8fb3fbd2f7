//! What goes over the wire between client and guest, and what a record on the disk looks like.
//!
//! All headers are 64 bytes, little-endian, and end with a CRC-32 of their first 60. A frame
//! recorder can so find answers in raw TCP payloads.

use std::io::{self, Read, Write};

/// The TCP port of the testifying guest.
pub const PORT: u16 = 7000;
/// The UDP port that sends every datagram back: it measures outages without TCP's timers.
pub const ECHO_PORT: u16 = 7001;
/// Bytes of every header.
pub const HEADER_BYTES: usize = 64;
/// The longest payload that either side accepts.
pub const MAX_PAYLOAD_BYTES: usize = 256 * 1024;
/// How much of a request's payload a record keeps.
pub const RECORD_PAYLOAD_BYTES: usize = 512 - HEADER_BYTES;
/// The record number of an answer that has no record (a guest without a disk).
pub const NO_RECORD: u64 = u64::MAX;

const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"HVRQ");
const ANSWER_MAGIC: u32 = u32::from_le_bytes(*b"HVAN");
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"HVRC");

/// What a request or an answer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A numbered request, to be recorded.
    Testify,
    /// JSON for [`crate::report::Ask`]; leaves no record.
    Control,
}

/// How the guest took a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Recorded (or, for control, done).
    Ok,
    /// The answer that the request names as the last one is not what the guest remembers: its
    /// history was taken back.
    UnknownHistory,
    /// The record could not be written.
    DiskError,
    /// The request makes no sense.
    BadRequest,
}

/// The head of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it is about.
    pub kind: Kind,
    /// The connection, as the client numbers it.
    pub conn: u64,
    /// Counts the requests of the connection from 1.
    pub number: u64,
    /// The counter of the answer that the client saw last here; 0 for none.
    pub seen_counter: u64,
    /// Its stamp.
    pub seen_stamp_ns: u64,
    /// Bytes that follow.
    pub payload_len: u32,
    /// Their CRC-32.
    pub payload_crc: u32,
}

/// The head of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// What it is about.
    pub kind: Kind,
    /// How the request was taken.
    pub verdict: Verdict,
    /// The connection.
    pub conn: u64,
    /// The request's number.
    pub number: u64,
    /// Grows by one with every answer of the whole guest.
    pub counter: u64,
    /// The record on the disk, [`NO_RECORD`] for none.
    pub record: u64,
    /// The guest's monotonic clock when the record was made.
    pub stamp_ns: u64,
    /// Differs for every boot of the guest.
    pub boot: u32,
    /// Bytes that follow (control only).
    pub payload_len: u32,
    /// CRC-32 of what follows; for a testimony, of the request's payload.
    pub payload_crc: u32,
}

/// One record on the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Its number, from 0, over all boots.
    pub seq: u64,
    /// The connection.
    pub conn: u64,
    /// The request's number.
    pub number: u64,
    /// The guest's monotonic clock when the record was made.
    pub stamp_ns: u64,
    /// The boot.
    pub boot: u32,
    /// CRC-32 of the request's payload.
    pub payload_crc: u32,
    /// Length of the request's payload; the first [`RECORD_PAYLOAD_BYTES`] of it are kept.
    pub payload_len: u32,
}

/// Why bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl From<Malformed> for io::Error {
    fn from(m: Malformed) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, m.0)
    }
}

type Header = [u8; HEADER_BYTES];

fn put<const N: usize>(h: &mut Header, at: usize, bytes: [u8; N]) {
    h[at..at + N].copy_from_slice(&bytes);
}
fn get_u16(h: &Header, at: usize) -> u16 {
    u16::from_le_bytes([h[at], h[at + 1]])
}
fn get_u32(h: &Header, at: usize) -> u32 {
    u32::from_le_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]])
}
fn get_u64(h: &Header, at: usize) -> u64 {
    u64::from(get_u32(h, at)) | u64::from(get_u32(h, at + 4)) << 32
}
fn close(mut h: Header) -> Header {
    let crc = crc32fast::hash(&h[..60]);
    put(&mut h, 60, crc.to_le_bytes());
    h
}
fn open(h: &Header, magic: u32) -> Result<(), Malformed> {
    if get_u32(h, 0) != magic {
        return Err(Malformed("not the expected header"));
    }
    if crc32fast::hash(&h[..60]) != get_u32(h, 60) {
        return Err(Malformed("header checksum is wrong"));
    }
    Ok(())
}

impl Kind {
    fn code(self) -> u16 {
        match self {
            Kind::Testify => 1,
            Kind::Control => 2,
        }
    }
    fn from_code(code: u16) -> Result<Kind, Malformed> {
        match code {
            1 => Ok(Kind::Testify),
            2 => Ok(Kind::Control),
            _ => Err(Malformed("unknown kind")),
        }
    }
}

impl Verdict {
    fn code(self) -> u16 {
        match self {
            Verdict::Ok => 0,
            Verdict::UnknownHistory => 1,
            Verdict::DiskError => 2,
            Verdict::BadRequest => 3,
        }
    }
    fn from_code(code: u16) -> Result<Verdict, Malformed> {
        match code {
            0 => Ok(Verdict::Ok),
            1 => Ok(Verdict::UnknownHistory),
            2 => Ok(Verdict::DiskError),
            3 => Ok(Verdict::BadRequest),
            _ => Err(Malformed("unknown verdict")),
        }
    }
}

fn bounded(len: u32) -> Result<u32, Malformed> {
    if len as usize > MAX_PAYLOAD_BYTES {
        Err(Malformed("payload is too long"))
    } else {
        Ok(len)
    }
}

impl Request {
    /// As bytes.
    pub fn encode(&self) -> Header {
        let mut h = [0; HEADER_BYTES];
        put(&mut h, 0, REQUEST_MAGIC.to_le_bytes());
        put(&mut h, 4, self.kind.code().to_le_bytes());
        put(&mut h, 8, self.conn.to_le_bytes());
        put(&mut h, 16, self.number.to_le_bytes());
        put(&mut h, 24, self.seen_counter.to_le_bytes());
        put(&mut h, 32, self.seen_stamp_ns.to_le_bytes());
        put(&mut h, 40, self.payload_len.to_le_bytes());
        put(&mut h, 44, self.payload_crc.to_le_bytes());
        close(h)
    }

    /// From bytes.
    pub fn decode(h: &Header) -> Result<Request, Malformed> {
        open(h, REQUEST_MAGIC)?;
        Ok(Request {
            kind: Kind::from_code(get_u16(h, 4))?,
            conn: get_u64(h, 8),
            number: get_u64(h, 16),
            seen_counter: get_u64(h, 24),
            seen_stamp_ns: get_u64(h, 32),
            payload_len: bounded(get_u32(h, 40))?,
            payload_crc: get_u32(h, 44),
        })
    }
}

impl Answer {
    /// As bytes.
    pub fn encode(&self) -> Header {
        let mut h = [0; HEADER_BYTES];
        put(&mut h, 0, ANSWER_MAGIC.to_le_bytes());
        put(
            &mut h,
            4,
            (self.kind.code() | self.verdict.code() << 8).to_le_bytes(),
        );
        put(&mut h, 8, self.conn.to_le_bytes());
        put(&mut h, 16, self.number.to_le_bytes());
        put(&mut h, 24, self.counter.to_le_bytes());
        put(&mut h, 32, self.record.to_le_bytes());
        put(&mut h, 40, self.stamp_ns.to_le_bytes());
        put(&mut h, 48, self.boot.to_le_bytes());
        put(&mut h, 52, self.payload_len.to_le_bytes());
        put(&mut h, 56, self.payload_crc.to_le_bytes());
        close(h)
    }

    /// From bytes.
    pub fn decode(h: &Header) -> Result<Answer, Malformed> {
        open(h, ANSWER_MAGIC)?;
        let codes = get_u16(h, 4);
        Ok(Answer {
            kind: Kind::from_code(codes & 0xff)?,
            verdict: Verdict::from_code(codes >> 8)?,
            conn: get_u64(h, 8),
            number: get_u64(h, 16),
            counter: get_u64(h, 24),
            record: get_u64(h, 32),
            stamp_ns: get_u64(h, 40),
            boot: get_u32(h, 48),
            payload_len: bounded(get_u32(h, 52))?,
            payload_crc: get_u32(h, 56),
        })
    }

    /// Adds this answer to the running hash of its connection, which both sides keep.
    pub fn chain(&self, before: u64) -> u64 {
        [
            self.number,
            self.counter,
            self.record,
            self.stamp_ns,
            u64::from(self.boot),
        ]
        .into_iter()
        .fold(before, |hash, x| {
            (hash ^ x)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        })
    }
}

impl Record {
    /// As bytes: the head of a record's sector, and one entry of a dump.
    pub fn encode(&self) -> Header {
        let mut h = [0; HEADER_BYTES];
        put(&mut h, 0, RECORD_MAGIC.to_le_bytes());
        put(&mut h, 8, self.seq.to_le_bytes());
        put(&mut h, 16, self.conn.to_le_bytes());
        put(&mut h, 24, self.number.to_le_bytes());
        put(&mut h, 32, self.stamp_ns.to_le_bytes());
        put(&mut h, 40, self.boot.to_le_bytes());
        put(&mut h, 44, self.payload_crc.to_le_bytes());
        put(&mut h, 48, self.payload_len.to_le_bytes());
        close(h)
    }

    /// From bytes.
    pub fn decode(h: &Header) -> Result<Record, Malformed> {
        open(h, RECORD_MAGIC)?;
        Ok(Record {
            seq: get_u64(h, 8),
            conn: get_u64(h, 16),
            number: get_u64(h, 24),
            stamp_ns: get_u64(h, 32),
            boot: get_u32(h, 40),
            payload_crc: get_u32(h, 44),
            payload_len: get_u32(h, 48),
        })
    }
}

fn read_header(from: &mut impl Read) -> io::Result<Header> {
    let mut h = [0; HEADER_BYTES];
    from.read_exact(&mut h)?;
    Ok(h)
}

fn read_payload(from: &mut impl Read, len: u32) -> io::Result<Vec<u8>> {
    let mut payload = vec![0; bounded(len)? as usize];
    from.read_exact(&mut payload)?;
    Ok(payload)
}

/// Reads one request with its payload and checks both checksums.
pub fn read_request(from: &mut impl Read) -> io::Result<(Request, Vec<u8>)> {
    let request = Request::decode(&read_header(from)?)?;
    let payload = read_payload(from, request.payload_len)?;
    if crc32fast::hash(&payload) != request.payload_crc {
        return Err(Malformed("payload checksum is wrong").into());
    }
    Ok((request, payload))
}

/// Reads one answer with its payload and checks the checksums.
pub fn read_answer(from: &mut impl Read) -> io::Result<(Answer, Vec<u8>)> {
    let answer = Answer::decode(&read_header(from)?)?;
    let payload = read_payload(from, answer.payload_len)?;
    if answer.kind == Kind::Control && crc32fast::hash(&payload) != answer.payload_crc {
        return Err(Malformed("payload checksum is wrong").into());
    }
    Ok((answer, payload))
}

/// Sends a request and its payload in one write.
pub fn write_request(
    to: &mut impl Write,
    mut request: Request,
    payload: &[u8],
) -> Result<(), io::Error> {
    if payload.len() > MAX_PAYLOAD_BYTES {
        return Err(Malformed("payload is too long").into());
    }
    request.payload_len = payload.len() as u32;
    request.payload_crc = crc32fast::hash(payload);
    let mut bytes = request.encode().to_vec();
    bytes.extend_from_slice(payload);
    to.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        Answer {
            kind: Kind::Testify,
            verdict: Verdict::UnknownHistory,
            conn: 3,
            number: 1 << 40,
            counter: 77,
            record: NO_RECORD,
            stamp_ns: 123_456_789_012,
            boot: 9,
            payload_len: 0,
            payload_crc: 5,
        }
    }

    /// A proof is worth nothing if a damaged answer or record passes for a good one.
    #[test]
    fn every_damaged_byte_is_noticed() {
        let good = answer().encode();
        assert_eq!(Answer::decode(&good), Ok(answer()));
        let record = Record {
            seq: 1,
            conn: 2,
            number: 3,
            stamp_ns: 4,
            boot: 5,
            payload_crc: 6,
            payload_len: 7,
        };
        assert_eq!(Record::decode(&record.encode()), Ok(record));
        for at in 0..HEADER_BYTES {
            let mut bad = good;
            bad[at] ^= 0x10;
            assert!(Answer::decode(&bad).is_err(), "answer, byte {at}");
            let mut bad = record.encode();
            bad[at] ^= 0x10;
            assert!(Record::decode(&bad).is_err(), "record, byte {at}");
        }
    }

    /// Sizes from outside are bounded before memory is taken for them.
    #[test]
    fn a_huge_payload_is_refused() {
        let mut a = answer();
        a.payload_len = u32::MAX;
        assert!(Answer::decode(&a.encode()).is_err());
        let request = Request {
            kind: Kind::Control,
            conn: 1,
            number: 1,
            seen_counter: 0,
            seen_stamp_ns: 0,
            payload_len: 0,
            payload_crc: 0,
        };
        let mut wire = Vec::new();
        assert!(write_request(&mut wire, request, &vec![0; MAX_PAYLOAD_BYTES + 1]).is_err());
        write_request(&mut wire, request, b"{}").unwrap();
        let (_, payload) = read_request(&mut wire.as_slice()).unwrap();
        assert_eq!(payload, b"{}");
        let last = wire.len() - 1;
        wire[last] ^= 1;
        assert!(read_request(&mut wire.as_slice()).is_err());
    }
}
