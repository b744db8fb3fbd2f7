//! `havm-e2e`: the real thing on the lab. `demo`, `run [SCENARIO…]`, `list`, `up`.

mod demo;
mod outside;
mod pair;
mod pairing;
mod runner;
mod scenarios;
mod stage;
mod story;
mod wait;

use anyhow::Result;
use clap::{Parser, Subcommand};
use havm_guest::domain::Domain;
use havm_lab::Host;
use pair::{Pair, Setup};
use std::path::PathBuf;
use std::process::ExitCode;

/// End-to-end tests and the demo of havm, on two hosts in this machine.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The main job on a real guest, told as it happens.
    Demo {
        /// Where the figures go.
        #[arg(long, default_value = "target/demo/report.json")]
        report: PathBuf,
        /// Detection time in ms instead of the default (see `[detection] lost_ms`).
        #[arg(long)]
        lost_ms: Option<u64>,
    },
    /// Play the bad cases (all, or those whose names contain a word).
    Run {
        /// Parts of names.
        only: Vec<String>,
    },
    /// Name the bad cases.
    List,
    /// Bring up a pair with a protected guest and leave it running.
    Up,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("havm-e2e: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo { report, lost_ms } => demo::run(&report, lost_ms),
        Command::Run { only } => runner::run(&only),
        Command::List => {
            for s in scenarios::ALL {
                println!("{:32} {}", s.name, s.what);
            }
            Ok(())
        }
        Command::Up => up(),
    }
}

fn up() -> Result<()> {
    story::tell("bringing up two hosts, a witness and a client");
    let mut pair = Pair::up(&Setup::default())?;
    pair.lab.keep();
    story::tell("protecting the guest `web`, at home on alpha");
    let took = pair
        .protect(&Domain::new("web", 10), Host::Alpha)
        .map_err(|e| e.context(pair.logs()))?;
    story::tell(format!("protected after {:.1} s", took.as_secs_f64()));
    println!("{}", pair.havm_ok(Host::Alpha, &["status"])?);
    println!("It is yours: README.md says what to try. `make lab-down` removes it.");
    Ok(())
}
