//! Thousands of histories of the pair, every one safe, and every one protected again at its end.

use havm_sim::faults::Fault;
use havm_sim::{Setup, run};

fn all_good(seeds: std::ops::Range<u64>, change: impl Fn(&mut Setup)) {
    for seed in seeds {
        let mut setup = Setup::seed(seed);
        change(&mut setup);
        let out = run(&setup);
        assert_eq!(
            out.wrong,
            None,
            "replay with `sim --seed {seed} --seconds {}`",
            setup.faults_us / 1_000_000
        );
        assert!(
            out.released > 0,
            "seed {seed}: the guest was never seen: nothing was tested"
        );
    }
}

/// Every kind of fault, mixed.
#[test]
fn all_faults() {
    all_good(0..3_000, |_| ());
}

/// Long histories: many terms in a row.
#[test]
fn long_histories() {
    all_good(1_000_000..1_000_150, |s| s.faults_us = 120_000_000);
}

/// Hosts, links and the witness only: the classic split-brain makers, more often than in the mix.
#[test]
fn partitions() {
    all_good(2_000_000..2_001_000, |s| {
        s.only = vec![
            Fault::BothLinks,
            Fault::Witness,
            Fault::Freeze,
            Fault::PowerOff,
        ];
    });
}

/// Moves on purpose, with links that break and daemons that die in the middle of them.
#[test]
fn handovers() {
    all_good(3_000_000..3_001_000, |s| {
        s.only = vec![
            Fault::Switchover,
            Fault::BothLinks,
            Fault::Daemon,
            Fault::MidCommand,
            Fault::PowerOff,
        ];
    });
}

/// The same seed is the same history, or no failure could be replayed.
#[test]
fn one_seed_one_history() {
    let setup = Setup {
        record: true,
        ..Setup::seed(7)
    };
    let (a, b) = (run(&setup), run(&setup));
    assert!(a.history.len() > 100);
    assert_eq!(a.history, b.history);
}
