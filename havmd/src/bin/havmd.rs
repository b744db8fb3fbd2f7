//! The daemon of havm.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// Keeps guests alive on two servers. One runs on each; ask it with `havm`.
#[derive(Debug, Parser)]
#[command(name = "havmd", version)]
struct Args {
    /// The node's configuration.
    #[arg(long, default_value = havm_config::DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let config = match havm_config::load(&args.config) {
        Ok(c) => c,
        Err(e) => {
            eprintln!("{e}");
            return havm_daemon::cli::Exit::Config.into();
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("HAVM_LOG")
        .or_else(|_| tracing_subscriber::EnvFilter::try_new(&config.node.log))
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("havmd")
        .enable_all()
        .build();
    let run = runtime.map_err(anyhow::Error::from).and_then(|rt| {
        let r = rt.block_on(havm_daemon::daemon::run(config));
        // A libvirt call that hangs must not keep a daemon that should end.
        rt.shutdown_background();
        r
    });
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            eprintln!("havmd: {e:#}");
            ExitCode::FAILURE
        }
    }
}
