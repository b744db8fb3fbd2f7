//! What a crash leaves of a standby's disk: exactly one committed state, never a mix; and after
//! promotion nothing that the guest flushed is lost, nor anything below it.
//! Seeded: `HAVM_DISK_SEED=n HAVM_DISK_RUNS=1` replays one history.

mod sim;

use havm_core::ids::{EpochNo, StreamId};
use havm_disk::{Disk, DiskWrite, Durability, EpochWrites, WriteOp};
use sim::{Crash, Machine, Rng, config, histories};
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
const UNIT: u64 = 4096;
const STREAM: StreamId = StreamId([3; 16]);

fn random_write(rng: &mut Rng) -> DiskWrite {
    let units = SIZE / UNIT;
    // Few places, so that writes overlap often.
    let first = if rng.chance(70) {
        rng.below(24)
    } else {
        rng.below(units - 8)
    };
    let len = (1 + rng.below(6)) * UNIT;
    let op = if rng.chance(20) {
        WriteOp::Zero(len)
    } else {
        // Each write has a value of its own.
        let stamp = rng.next().to_le_bytes();
        WriteOp::Data(
            stamp
                .iter()
                .copied()
                .cycle()
                .take(len as usize)
                .collect::<Vec<_>>()
                .into(),
        )
    };
    DiskWrite {
        offset: first * UNIT,
        op,
    }
}

fn apply(v: &mut [u8], w: &DiskWrite) {
    let range = w.offset as usize..w.end() as usize;
    match &w.op {
        WriteOp::Data(d) => v[range].copy_from_slice(d),
        WriteOp::Zero(_) => v[range].fill(0),
    }
}

/// What may be found after a crash at some point.
#[derive(Clone)]
struct Allowed {
    /// Whole states (index into `states`): from, to.
    from: usize,
    staged: usize,
    committed: usize,
    promoted: bool,
    /// After promotion: the state that is sure (flushed), and guest writes since.
    sure: Option<Arc<Vec<u8>>>,
    since: Vec<DiskWrite>,
}

struct Run {
    machine: Machine,
    states: Vec<Arc<Vec<u8>>>,
    /// (operations done, what is allowed from then on)
    marks: Vec<(usize, Allowed)>,
}

fn history(rng: &mut Rng) -> Run {
    let machine = Machine::new(SIZE);
    let disk = Disk::create_stores(&config(), machine.stores(), false).unwrap();
    disk.begin_receiving(STREAM, EpochNo(0)).unwrap();
    let durability = if rng.chance(30) {
        Durability::Disk
    } else {
        Durability::Memory
    };
    let mut states = vec![Arc::new(vec![0u8; SIZE as usize])];
    let mut a = Allowed {
        from: 0,
        staged: 0,
        committed: 0,
        promoted: false,
        sure: None,
        since: Vec::new(),
    };
    let mut marks = vec![(machine.world.now(), a.clone())];
    let promote_at = rng.below(50);
    let mut unworked = 0;
    for i in 0..60 {
        if !a.promoted && i == promote_at {
            assert_eq!(disk.promote().unwrap().0, a.committed as u64);
            a.promoted = true;
        }
        if a.promoted {
            match rng.below(10) {
                0..6 => {
                    let w = random_write(rng);
                    // In flight: any part of it may be found.
                    a.since.push(w.clone());
                    marks.push((machine.world.now(), a.clone()));
                    match &w.op {
                        WriteOp::Data(d) => disk.write(w.offset, &mut d.to_vec(), false).unwrap(),
                        WriteOp::Zero(n) => disk.zero(w.offset, *n, true, false).unwrap(),
                    }
                }
                6 => {
                    disk.flush().unwrap();
                    let mut v = a.sure.as_ref().map_or(&states[a.committed], |s| s).to_vec();
                    a.since.drain(..).for_each(|w| apply(&mut v, &w));
                    a.sure = Some(Arc::new(v));
                }
                7 => {
                    disk.flush_after_promotion().unwrap();
                    let mut v = a.sure.as_ref().map_or(&states[a.committed], |s| s).to_vec();
                    a.since.drain(..).for_each(|w| apply(&mut v, &w));
                    a.sure = Some(Arc::new(v));
                }
                _ => {
                    disk.work().unwrap();
                }
            }
        } else {
            match rng.below(10) {
                0..5 => {
                    // Two epochs can fill both segments; the third would wait for the flusher.
                    unworked += 1;
                    if unworked == 2 || rng.chance(50) {
                        disk.work().unwrap();
                        unworked = 0;
                    }
                    let writes: Vec<_> = (0..rng.below(6)).map(|_| random_write(rng)).collect();
                    let mut v = states.last().unwrap().to_vec();
                    writes.iter().for_each(|w| apply(&mut v, w));
                    states.push(Arc::new(v));
                    let n = states.len() - 1;
                    a.staged = n;
                    marks.push((machine.world.now(), a.clone()));
                    disk.stage(&Arc::new(EpochWrites::new(EpochNo(n as u64), writes)))
                        .unwrap();
                }
                5..8 => {
                    let n = a.committed + rng.below((a.staged - a.committed + 1) as u64) as usize;
                    disk.commit(EpochNo(n as u64), durability).unwrap();
                    a.committed = n;
                    if durability == Durability::Disk {
                        assert_eq!(disk.durable_upto().0, n as u64);
                    }
                }
                _ => {
                    disk.work().unwrap();
                }
            }
            a.from = disk.durable_upto().0 as usize;
        }
        marks.push((machine.world.now(), a.clone()));
        // What is committed is visible at once, whatever of it is in place.
        let mut seen = vec![0u8; SIZE as usize];
        disk.read(0, &mut seen).unwrap();
        let mut want = a.sure.as_ref().map_or(&states[a.committed], |s| s).to_vec();
        a.since.iter().for_each(|w| apply(&mut want, w));
        assert!(
            seen == want,
            "read after step {i} is not the committed state"
        );
    }
    Run {
        machine,
        states,
        marks,
    }
}

/// Each unit is the sure one's, or that of one of the writes since.
fn mixes(found: &[u8], sure: &[u8], since: &[DiskWrite]) -> bool {
    (0..SIZE / 512).all(|s| {
        let r = (s * 512) as usize..(s * 512 + 512) as usize;
        found[r.clone()] == sure[r.clone()]
            || since.iter().any(|w| {
                w.offset as usize <= r.start
                    && r.end <= w.end() as usize
                    && match &w.op {
                        WriteOp::Zero(_) => found[r.clone()].iter().all(|b| *b == 0),
                        WriteOp::Data(d) => {
                            let o = r.start - w.offset as usize;
                            found[r.clone()] == d[o..o + 512]
                        }
                    }
            })
    })
}

fn check(run: &Run, at: usize, how: Crash, rng: &mut Rng) -> Result<(), String> {
    // Several marks may stand at one operation: the last of them, plus what was under way.
    let i = run
        .marks
        .iter()
        .rposition(|m| m.0 <= at)
        .ok_or("a crash before the beginning")?;
    let a = &run.marks[i].1;
    let crashed = run.machine.crashed(at, how, rng);
    let exact = how == Crash::Kill && !a.promoted;
    let upto = exact.then_some((STREAM, EpochNo(a.committed as u64)));
    let disk = Disk::open_stores(&config(), crashed.stores(), upto).map_err(|e| e.to_string())?;
    drop(disk);
    let found = crashed.files[0].content();
    let whole = |n: usize| found == **run.states[n];
    let base = a.sure.as_ref().unwrap_or(&run.states[a.committed]);
    let ok = if exact {
        whole(a.committed)
    } else if !a.promoted {
        (a.from..=a.staged).any(whole)
    } else if a.sure.is_some() || how == Crash::Kill {
        mixes(&found, base, &a.since)
    } else {
        mixes(&found, base, &a.since) || (a.from..=a.staged).any(whole)
    };
    // A second crash during or after recovery must change nothing.
    let again = crashed.crashed(crashed.world.now(), Crash::Power, rng);
    drop(Disk::open_stores(&config(), again.stores(), None).map_err(|e| e.to_string())?);
    if again.files[0].content() != found {
        return Err("a crash right after recovery changed the disk".into());
    }
    if ok {
        Ok(())
    } else {
        Err(format!(
            "none of the allowed states: durable {} committed {} staged {} promoted {}",
            a.from, a.committed, a.staged, a.promoted
        ))
    }
}

#[test]
fn one_state_after_any_crash() {
    let mut crashes = 0;
    for seed in histories(12) {
        let rng = &mut Rng(seed);
        let run = history(rng);
        let end = run.machine.world.now();
        let start = run.marks[0].0;
        for _ in 0..60 {
            let mut at = start + rng.below((end - start + 1) as u64) as usize;
            if rng.chance(40) {
                at = run.machine.world.before_flush(at);
            }
            let how = if rng.chance(25) {
                Crash::Kill
            } else {
                Crash::Power
            };
            if let Err(e) = check(&run, at, how, rng) {
                panic!("seed {seed}, {how:?} at operation {at} of {end}: {e}");
            }
            crashes += 1;
        }
    }
    assert!(crashes > 0);
}

// A process killed in the middle of appending: cut the journal at every byte of the last record.
#[test]
fn journal_cut_at_every_byte() {
    let machine = Machine::new(SIZE);
    let disk = Disk::create_stores(&config(), machine.stores(), false).unwrap();
    disk.begin_receiving(STREAM, EpochNo(0)).unwrap();
    let data = |v: u8, n: usize| WriteOp::Data(vec![v; n].into());
    let one = vec![DiskWrite {
        offset: 0,
        op: data(1, 600),
    }];
    let two = vec![
        DiskWrite {
            offset: 0,
            op: data(2, 300),
        },
        DiskWrite {
            offset: 5000,
            op: data(2, 100),
        },
        DiskWrite {
            offset: 300,
            op: WriteOp::Zero(200),
        },
    ];
    disk.commit_epochs(
        &[Arc::new(EpochWrites::new(EpochNo(1), one))],
        Durability::Memory,
    )
    .unwrap();
    let before = machine.files[2].content();
    disk.commit_epochs(
        &[Arc::new(EpochWrites::new(EpochNo(2), two))],
        Durability::Memory,
    )
    .unwrap();
    let after = machine.files[2].content();
    let first = before.iter().zip(&after).position(|(a, b)| a != b).unwrap();
    let last = before
        .iter()
        .zip(&after)
        .rposition(|(a, b)| a != b)
        .unwrap();
    assert!(last - first > 400);
    let state = |n: u8| {
        let mut v = vec![0u8; SIZE as usize];
        v[..600].fill(1);
        if n == 2 {
            v[..300].fill(2);
            v[5000..5100].fill(2);
            v[300..500].fill(0);
        }
        v
    };
    let (one, two) = (state(1), state(2));
    let base: [Vec<u8>; 4] = std::array::from_fn(|i| machine.files[i].content());
    for cut in first..=last + 1 {
        for new_first in [true, false] {
            let mut j = if new_first {
                before.clone()
            } else {
                after.clone()
            };
            let from = if new_first { &after } else { &before };
            j[first..cut].copy_from_slice(&from[first..cut]);
            let mut files = base.clone();
            files[2] = j;
            let m = Machine::from_files(files);
            drop(Disk::open_stores(&config(), m.stores(), None).unwrap());
            let found = m.files[0].content();
            let whole = (new_first && cut == last + 1) || (!new_first && cut == first);
            assert!(
                found == if whole { two.clone() } else { one.clone() },
                "cut at {cut}"
            );
        }
    }
}
