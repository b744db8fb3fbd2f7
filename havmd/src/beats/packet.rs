//! One heartbeat: 96 bytes, little-endian, authenticated.
//!
//! ```text
//!    0 magic "HVB1"      4 link     5 flags    6 zero (2)
//!    8 session          16 seq     24 sent_ns            the sender's, its own clock
//!   32 echo session     40 seq     48 sent_ns            the receiver's last beat, as it was sent
//!   56 echo held_ns                                      how long the sender has had it
//!   64 BLAKE3 of all before, keyed by the pair key and the sender's node id
//! ```
//! The key differs by direction, so a beat sent back to its sender is a forgery.

use crate::identity_store::PairKey;
use havm_core::ids::NodeId;
use std::time::Duration;

/// The length of a beat.
pub const BEAT_BYTES: usize = 96;
const MAGIC: [u8; 4] = *b"HVB1";
const MAC_AT: usize = 64;

/// The sender's daemon is up and serves (set by the daemon, cleared while it starts or ends).
pub const FLAG_READY: u8 = 1;
/// The sender is about to leave on purpose: its silence will be no failure.
pub const FLAG_LEAVING: u8 = 2;

/// What an echo says: "I have your beat".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Echo {
    /// The session of the beat's sender; 0: there is no echo.
    pub session: u64,
    /// Its number.
    pub seq: u64,
    /// When it was sent, by its sender's clock.
    pub sent: Duration,
    /// How long the echoing side has had it.
    pub held: Duration,
}

/// A heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The link's place in both configs.
    pub link: u8,
    /// See [`FLAG_READY`].
    pub flags: u8,
    /// Random at each start of the sender, never 0.
    pub session: u64,
    /// Counts up, per link, from 1.
    pub seq: u64,
    /// The sender's monotonic clock.
    pub sent: Duration,
    /// The receiver's last beat.
    pub echo: Echo,
}

/// The key of one direction.
#[derive(Clone)]
pub struct DirectionKey([u8; 32]);

impl DirectionKey {
    /// For beats that `sender` sends.
    pub fn new(pair: &PairKey, sender: NodeId) -> Self {
        let mut h = blake3::Hasher::new_derive_key("havm 2026 heartbeat v1");
        h.update(&pair.0).update(&sender.0);
        DirectionKey(h.finalize().into())
    }
}

impl Packet {
    /// The bytes to send.
    pub fn encode(&self, key: &DirectionKey) -> [u8; BEAT_BYTES] {
        let mut out = [0; BEAT_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = self.link;
        out[5] = self.flags;
        let e = &self.echo;
        let words = [
            self.session,
            self.seq,
            nanos(self.sent),
            e.session,
            e.seq,
            nanos(e.sent),
            nanos(e.held),
        ];
        for (at, w) in out[8..MAC_AT].chunks_exact_mut(8).zip(words) {
            at.copy_from_slice(&w.to_le_bytes());
        }
        let mac = blake3::keyed_hash(&key.0, &out[..MAC_AT]);
        out[MAC_AT..].copy_from_slice(mac.as_bytes());
        out
    }

    /// Reads a beat; `None` for anything that the holder of the key did not make.
    pub fn decode(bytes: &[u8], key: &DirectionKey) -> Option<Packet> {
        let bytes: &[u8; BEAT_BYTES] = bytes.try_into().ok()?;
        let (body, mac) = bytes.split_last_chunk::<32>()?;
        // blake3::Hash compares in constant time.
        if body[..4] != MAGIC || blake3::keyed_hash(&key.0, body) != blake3::Hash::from(*mac) {
            return None;
        }
        let word = |i: usize| {
            let at = 8 + 8 * i;
            u64::from_le_bytes(body[at..at + 8].try_into().unwrap_or_default())
        };
        Some(Packet {
            link: body[4],
            flags: body[5],
            session: word(0),
            seq: word(1),
            sent: Duration::from_nanos(word(2)),
            echo: Echo {
                session: word(3),
                seq: word(4),
                sent: Duration::from_nanos(word(5)),
                held: Duration::from_nanos(word(6)),
            },
        })
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_is_read_back_and_no_changed_or_turned_one_is() {
        let pair = PairKey([5; 32]);
        let (a, b) = (
            DirectionKey::new(&pair, NodeId([1; 16])),
            DirectionKey::new(&pair, NodeId([2; 16])),
        );
        let p = Packet {
            link: 1,
            flags: FLAG_READY,
            session: 77,
            seq: 3,
            sent: Duration::from_nanos(1234),
            echo: Echo {
                session: 88,
                seq: 9,
                sent: Duration::from_millis(5),
                held: Duration::from_micros(7),
            },
        };
        let bytes = p.encode(&a);
        assert_eq!(Packet::decode(&bytes, &a), Some(p));
        assert_eq!(Packet::decode(&bytes, &b), None);
        for bit in 0..BEAT_BYTES * 8 {
            let mut other = bytes;
            other[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Packet::decode(&other, &a), None, "bit {bit}");
        }
        for len in 0..BEAT_BYTES {
            assert_eq!(Packet::decode(&bytes[..len], &a), None);
        }
    }
}
