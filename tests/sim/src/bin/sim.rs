//! Runs histories: `sim --seed 42` replays one, `sim --seeds 10000` runs many.

use clap::Parser;
use havm_sim::{Setup, run};

/// A deterministic simulation of a pair: real engines, modelled world, faults, checkers.
#[derive(Parser)]
struct Args {
    /// Replay this one and print its history.
    #[arg(long)]
    seed: Option<u64>,
    /// How many to run.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Faults for so many seconds of virtual time.
    #[arg(long, default_value_t = 12)]
    seconds: u64,
    /// Go on after a failure, and count.
    #[arg(long)]
    keep_going: bool,
}

fn main() {
    if let Err(e) = work() {
        println!("{e}");
        std::process::exit(1);
    }
}

fn work() -> anyhow::Result<()> {
    let args = Args::parse();
    let setup = |seed| Setup {
        faults_us: args.seconds * 1_000_000,
        ..Setup::seed(seed)
    };
    if let Some(seed) = args.seed {
        let out = run(&Setup {
            record: true,
            ..setup(seed)
        });
        for line in &out.history {
            println!("{line}");
        }
        match out.wrong {
            Some(w) => anyhow::bail!("seed {seed}: {w}"),
            None => println!(
                "seed {seed}: good; healed after {} ms, term {}, {} releases",
                out.healed_us / 1000,
                out.highest_term,
                out.released
            ),
        }
        return Ok(());
    }
    let (mut terms, mut slowest, mut bad) = (0, 0, 0u64);
    for seed in args.from..args.from + args.seeds {
        let out = run(&setup(seed));
        terms += out.highest_term;
        slowest = slowest.max(out.healed_us);
        if let Some(w) = out.wrong {
            bad += 1;
            println!("seed {seed}: {w}");
            if !args.keep_going {
                anyhow::bail!(
                    "replay it with `sim --seed {seed} --seconds {}`",
                    args.seconds
                );
            }
        }
    }
    println!(
        "{} histories: {bad} bad, {} terms, slowest healing {} ms",
        args.seeds,
        terms,
        slowest / 1000
    );
    anyhow::ensure!(bad == 0, "{bad} histories went wrong");
    Ok(())
}
