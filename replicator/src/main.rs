//! `havm-replicator --spec FILE`: the data plane of one guest on this host. Started by `havmd`, and
//! outlives it.

use anyhow::Context;
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// The data plane of one guest; started by havmd, not by hand.
#[derive(Parser)]
#[command(name = "havm-replicator", version)]
struct Args {
    /// What to replicate, written by havmd.
    #[arg(long)]
    spec: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("HAVM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .init();
    let run = || {
        let spec = havm_replicator::start::read_spec(&args.spec)?;
        let guest = spec.guest.clone();
        let _span = tracing::info_span!("replicator", %guest).entered();
        havm_replicator::run(spec).with_context(|| format!("guest {guest}"))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}
