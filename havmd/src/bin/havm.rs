//! The command line of havm.

use clap::Parser;
use havm_daemon::cli::{Cli, run};
use std::process::ExitCode;

fn main() -> ExitCode {
    run(Cli::parse()).into()
}
