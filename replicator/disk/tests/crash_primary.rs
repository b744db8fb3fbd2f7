//! After any crash of a primary, the blocks that may differ from the peer are known: what its
//! metadata says is a superset of what really differs, whatever state the peer is at (rule 14).
//! And while it lives: when nothing is marked, the peer's state at an epoch is the primary's.
//! Seeded: `HAVM_DISK_SEED=n HAVM_DISK_RUNS=1` replays one history.

mod sim;

use havm_core::ids::{EpochNo, StreamId};
use havm_disk::{BLOCK_BYTES, BlockSet, Disk, Mode, WriteOp};
use sim::{Crash, Machine, Rng, config, histories};
use std::sync::Arc;

const SIZE: u64 = 6 << 20;
type State = Arc<Vec<u8>>;

/// What the peer may hold: any of these, depending on where it crashes.
#[derive(Clone)]
struct Peer {
    /// The epoch of the first one, and the states from it on.
    first: u64,
    states: Vec<State>,
}

struct Run {
    machine: Machine,
    marks: Vec<(usize, Peer)>,
}

fn content(m: &Machine) -> Vec<u8> {
    m.files[0].content()
}

fn history(rng: &mut Rng) -> Run {
    let machine = Machine::new(SIZE);
    let disk = Disk::create_stores(&config(), machine.stores(), false).unwrap();
    disk.go_solo().unwrap();
    let mut peer = Peer {
        first: 0,
        states: vec![Arc::new(content(&machine))],
    };
    let mut marks = vec![(machine.world.now(), peer.clone())];
    // Histories of different character: some never flush, some have a peer that is slow to.
    let flushes = rng.below(2) * 50;
    let peer_flushes = [10, 50, 90][rng.below(3) as usize];
    let narrow = rng.chance(50);
    let mut streams = 0u8;
    let mut next_epoch = 1;
    let mut synced: Vec<(u32, Vec<u8>)> = Vec::new();
    for _ in 0..140 {
        match rng.below(20) {
            0..10 => {
                let units = SIZE / 512;
                // A narrow history stays within the log for long, a wide one evicts all the time.
                let at = rng.below(if narrow { units / 2 } else { units }) * 512;
                let len = (512 + rng.below(200) * 512).min(SIZE - at);
                if rng.chance(15) {
                    disk.zero(at, len, true, rng.chance(flushes / 5)).unwrap();
                } else {
                    let stamp = rng.next().to_le_bytes();
                    let mut data: Vec<u8> =
                        stamp.iter().copied().cycle().take(len as usize).collect();
                    disk.write(at, &mut data, rng.chance(flushes / 5)).unwrap();
                }
            }
            10..13 if disk.mode() == Mode::Tracking => {
                let e = disk.barrier().unwrap();
                assert_eq!(e.epoch.0, next_epoch);
                next_epoch += 1;
                let mut v = peer.states.last().unwrap().to_vec();
                for (b, data) in synced.drain(..) {
                    let at = b as usize * BLOCK_BYTES as usize;
                    v[at..at + data.len()].copy_from_slice(&data);
                }
                for w in &e.writes {
                    let r = w.offset as usize..w.end() as usize;
                    match &w.op {
                        WriteOp::Data(d) => v[r].copy_from_slice(d),
                        WriteOp::Zero(_) => v[r].fill(0),
                    }
                }
                if disk.out_of_sync().is_empty() {
                    assert!(
                        v == content(&machine),
                        "nothing is marked, and yet the peer differs"
                    );
                }
                peer.states.push(Arc::new(v));
            }
            13 if disk.mode() == Mode::Tracking => {
                // The peer reports: acked and durable up to some epoch.
                let n = peer.first + rng.below(peer.states.len() as u64 + 2);
                let n = n.min(peer.first + peer.states.len() as u64 - 1);
                disk.acked(EpochNo(n));
                if rng.chance(peer_flushes) {
                    disk.peer_durable(EpochNo(n));
                    peer.states.drain(..(n - peer.first) as usize);
                    peer.first = n;
                }
            }
            14 if disk.mode() == Mode::Tracking => {
                // A piece of resync rides in the open epoch.
                let marked: Vec<u32> = disk.out_of_sync().iter().take(20).collect();
                for b in &marked {
                    let mut data = vec![0u8; disk.block_range(*b).unwrap().count()];
                    disk.read(u64::from(*b) * BLOCK_BYTES, &mut data).unwrap();
                    synced.push((*b, data));
                }
                disk.synced(&marked, EpochNo(next_epoch)).unwrap();
            }
            15 if disk.mode() == Mode::Solo => {
                streams += 1;
                // It stayed at some state it had.
                let at = rng.below(peer.states.len() as u64) as usize;
                peer = Peer {
                    first: 0,
                    states: vec![peer.states[at].clone()],
                };
                next_epoch = 1;
                disk.begin_tracking(StreamId([streams; 16]), EpochNo(1))
                    .unwrap();
            }
            16 if disk.mode() == Mode::Tracking && rng.chance(60) => {
                disk.end_tracking().unwrap();
                synced.clear();
            }
            17 if rng.chance(flushes * 2) => disk.flush().unwrap(),
            18 if rng.chance(flushes) => disk.tidy().unwrap(),
            _ => (),
        }
        marks.push((machine.world.now(), peer.clone()));
        // The same must hold for what the living one says after its stream broke.
        if disk.mode() == Mode::Solo && rng.chance(20) {
            assert_covers(&disk.out_of_sync(), &content(&machine), &peer, "alive");
        }
    }
    if rng.chance(30) {
        disk.close().unwrap();
        marks.push((machine.world.now(), peer.clone()));
    }
    Run { machine, marks }
}

fn assert_covers(set: &BlockSet, mine: &[u8], peer: &Peer, what: &str) {
    for (i, s) in peer.states.iter().enumerate() {
        for (b, (x, y)) in mine
            .chunks(BLOCK_BYTES as usize)
            .zip(s.chunks(BLOCK_BYTES as usize))
            .enumerate()
        {
            assert!(
                x == y || set.contains(b as u32),
                "{what}: block {b} differs from the peer's epoch {} and is not known to",
                peer.first + i as u64
            );
        }
    }
}

#[test]
fn what_may_differ_is_known_after_any_crash() {
    for seed in histories(20) {
        let rng = &mut Rng(seed);
        println!("seed {seed}");
        let run = history(rng);
        let (start, end) = (run.marks[0].0, run.machine.world.now());
        for _ in 0..15 {
            let mut at = start + rng.below((end - start + 1) as u64) as usize;
            if rng.chance(60) {
                // Where most is at stake: just before a flush.
                at = run.machine.world.before_flush(at);
            }
            let how = if rng.chance(25) {
                Crash::Kill
            } else {
                Crash::Power
            };
            // Marks at the same operation: an event without IO may or may not have happened; the
            // later one allows fewer states, the earlier more, so the union is checked.
            let i = run.marks.iter().rposition(|m| m.0 <= at).unwrap();
            let crashed = run.machine.crashed(at, how, rng);
            let disk = Disk::open_stores(&config(), crashed.stores(), None)
                .unwrap_or_else(|e| panic!("seed {seed}, {how:?} at {at}: {e}"));
            let what = format!("seed {seed}, {how:?} at operation {at} of {end}");
            assert_covers(
                &disk.out_of_sync(),
                &content(&crashed),
                &run.marks[i].1,
                &what,
            );
        }
    }
}

// A clean end is remembered exactly: the next resync copies what differs and no more.
#[test]
fn a_clean_close_is_exact() {
    let m = Machine::new(SIZE);
    let disk = Disk::create_stores(&config(), m.stores(), false).unwrap();
    disk.go_solo().unwrap();
    for b in [3u64, 17, 80, 95] {
        disk.write(b * BLOCK_BYTES + 5, &mut vec![1; 10], false)
            .unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    let disk = Disk::open_stores(&config(), m.stores(), None).unwrap();
    assert_eq!(
        disk.out_of_sync().iter().collect::<Vec<_>>(),
        [3, 17, 80, 95]
    );
}

// The steady state costs no flush for a write: only new extents do.
#[test]
fn active_extents_cost_no_flush() {
    let m = Machine::new(SIZE);
    let disk = Disk::create_stores(&config(), m.stores(), false).unwrap();
    disk.go_solo().unwrap();
    disk.write(0, &mut vec![1; 4096], false).unwrap();
    let before = m.world.now();
    for i in 0..100u64 {
        disk.write(i * 4096, &mut vec![1; 4096], false).unwrap();
    }
    assert_eq!(
        m.world.now() - before,
        100,
        "one operation a write: the write"
    );
    assert_eq!(disk.counters().log_writes, 1);
}

// An extent that makes room in the log stays known unless its last write is acked, durable at the
// peer *and* flushed here; and so does one whose block only rides in an epoch as resync.
#[test]
fn eviction_keeps_what_is_not_settled() {
    const EXTENT: u64 = 1 << 20;
    let block = |extent: u32| extent * 16;
    for (what, acked, durable, flushed, kept) in [
        ("not acked", false, true, true, true),
        ("acked, not durable at the peer", true, false, true, true),
        ("not flushed here", true, true, false, true),
        ("settled", true, true, true, false),
    ] {
        for by_resync in [false, true] {
            let m = Machine::new(SIZE);
            let disk = Disk::create_stores(&config(), m.stores(), false).unwrap();
            disk.go_solo().unwrap();
            // With four extents the log is full.
            let fill = || {
                for e in 0..4 {
                    disk.write(e * EXTENT, &mut vec![1; 512], false).unwrap();
                }
            };
            if by_resync {
                fill();
            }
            disk.begin_tracking(StreamId([1; 16]), EpochNo(1)).unwrap();
            if by_resync {
                disk.synced(&[0, 1, 2, 3].map(block), EpochNo(1)).unwrap();
            } else {
                fill();
            }
            drop(disk.barrier().unwrap());
            if flushed {
                disk.flush().unwrap();
            }
            if acked {
                disk.acked(EpochNo(1));
            }
            if durable {
                disk.peer_durable(EpochNo(1));
            }
            // A fifth extent needs room.
            disk.write(4 * EXTENT, &mut vec![1; 512], false).unwrap();
            let after = m.crashed(m.world.now(), Crash::Kill, &mut Rng(1));
            let known = Disk::open_stores(&config(), after.stores(), None)
                .unwrap()
                .out_of_sync();
            let all = (0..5).all(|e| known.contains(block(e)));
            assert_eq!(all, kept, "{what}, by resync: {by_resync}");
            assert!(known.contains(block(4)));
        }
    }
}
