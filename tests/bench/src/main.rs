//! `havm-bench`: what havm must reach, measured, each figure beside its floor in the same run.
//!
//! ```text
//!   measurement (pause, promotion, gate, beats, demo) ──> figures ──> report.json, and a line each
//! ```
//!
//! A figure that misses its target is printed as MISSED and is no failure of the program; a measurement
//! that could not be made is: its figures are null, with the reason. docs/benchmarks.md explains each.

mod beats;
mod demo;
mod gate;
mod machine;
mod pause;
mod promotion;
mod report;
mod resync;
mod stats;

// What the tests of these crates run on is what the bench runs on.
#[path = "../../../replicator/gate/tests/common/mod.rs"]
mod gate_lab;
#[path = "../../../replicator/capture/tests/common/mod.rs"]
mod guest;

use anyhow::{Context, Result, bail};
use clap::Parser;
use report::{Figure, Found, Report, TARGETS, Target, attempt};
use std::path::PathBuf;
use std::process::ExitCode;

/// Measures what havm must reach.
#[derive(Parser)]
struct Cli {
    /// Where to write the figures, as JSON.
    #[arg(long)]
    report: PathBuf,
    /// Only these measurements: pause, promotion, gate, beats, demo. All if none is named.
    #[arg(long)]
    only: Vec<String>,
    /// How often the demo is run; its figures are medians.
    #[arg(long, default_value_t = 3)]
    demos: usize,
}

/// A measurement by its name: it gives several figures at once.
type Measurement = (&'static str, Box<dyn Fn() -> Result<Found>>);

fn measurements(cli: &Cli) -> Result<Vec<Measurement>> {
    let demos = cli.demos;
    let all: Vec<Measurement> = vec![
        ("pause", Box::new(pause::measure)),
        ("promotion", Box::new(promotion::measure)),
        ("gate", Box::new(gate::measure)),
        ("beats", Box::new(beats::measure)),
        ("demo", Box::new(move || demo::measure(demos))),
    ];
    for name in &cli.only {
        if !all.iter().any(|(n, _)| n == name) {
            let names: Vec<_> = all.iter().map(|(n, _)| *n).collect();
            bail!(
                "there is no measurement {name:?}; there are {}",
                names.join(", ")
            );
        }
    }
    let wanted = |n: &str| cli.only.is_empty() || cli.only.iter().any(|o| o == n);
    Ok(all.into_iter().filter(|(n, _)| wanted(n)).collect())
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("havm-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if all could be measured.
fn run(cli: &Cli) -> Result<bool> {
    let wanted = measurements(cli)?;
    // Panics become the reason of a figure; the trace behind it helps nobody here.
    std::panic::set_hook(Box::new(|_| {}));
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: guests are traced, namespaces are made");
    }
    if let Some(dir) = cli.report.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let mut report = Report::new(machine::describe()?);
    for (name, measure) in wanted {
        println!("-- {name} (load {:.1})", machine::load()?[0]);
        let load = machine::load()?;
        let found = attempt(measure);
        let targets: Vec<&Target> = TARGETS.iter().filter(|t| t.measurement == name).collect();
        for target in targets {
            let figure = Figure::new(target, found.as_ref(), load);
            println!("{figure}");
            report.figures.push(figure);
        }
        if let Ok(found) = found {
            report.details.insert(name.into(), found.detail);
        }
        // After each, so that what was measured is kept whatever comes next.
        report.write(&cli.report)?;
    }
    println!("{}", cli.report.display());
    Ok(report.figures.iter().all(|f| !f.failed))
}
