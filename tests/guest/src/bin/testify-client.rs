//! The outside client of a testifying guest: see tests/lab/README.md.

use clap::Parser;
use havm_guest::client::cli::{ClientCommand, work};
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Questions a testifying guest, keeps it busy, and proves that nothing was lost")]
struct Cli {
    #[command(subcommand)]
    command: ClientCommand,
}

fn main() -> ExitCode {
    match work(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("testify-client: {e:#}");
            ExitCode::FAILURE
        }
    }
}
