//! `havm`: the command line. It asks the daemon over its control socket and shows the answers.

mod check;
mod config;
mod events;
mod exit;
mod guest;
mod pair;
mod status;
mod talk;
mod wait;

pub use exit::Exit;

use clap::{Parser, Subcommand};
use havm_core::ids::GuestName;
use std::path::PathBuf;
use talk::Daemon;

/// Protects virtual machines with a second server: see `havm status`.
#[derive(Debug, Parser)]
#[command(name = "havm", version, after_help = Exit::HELP)]
pub struct Cli {
    /// The node's configuration.
    #[arg(long, global = true, default_value = havm_config::DEFAULT_PATH)]
    pub config: PathBuf,
    /// The daemon's control socket; by default the one in the configured run folder.
    #[arg(long, global = true)]
    pub socket: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// How safe every guest is, and what to do.
    Status {
        /// Only this guest.
        guest: Option<GuestName>,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// Again every second, until interrupted.
        #[arg(long)]
        watch: bool,
    },
    /// Protect a guest: shows the difference in its definition, prepares both nodes, and waits
    /// until it is safe.
    Protect {
        /// The libvirt domain, on this node.
        guest: GuestName,
        /// Only show what would be done.
        #[arg(long)]
        dry_run: bool,
        /// The node it should run on (default: this one).
        #[arg(long, value_name = "NODE")]
        home: Option<String>,
        /// A running guest may be shut down cleanly and started again, which is needed once.
        #[arg(long)]
        restart: bool,
        /// Do not wait until it is safe.
        #[arg(long)]
        no_wait: bool,
    },
    /// End a guest's protection and put its original definition back.
    Unprotect {
        /// The guest.
        guest: GuestName,
        /// A running guest may be shut down cleanly and started again, which is needed.
        #[arg(long)]
        restart: bool,
    },
    /// Move a guest to the other node, without a break in its protection.
    Switchover(OnGuest),
    /// Move a guest to its home node.
    Failback(OnGuest),
    /// Run a guest that was stopped.
    Start(OnGuest),
    /// Shut a guest down, on purpose: no failover.
    Stop(OnGuest),
    /// Compare all of RAM and disk on both nodes at one epoch.
    Verify {
        /// The guest.
        guest: GuestName,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// What happened.
    Events {
        /// Only this guest's.
        guest: Option<GuestName>,
        /// As JSON, one value a line.
        #[arg(long)]
        json: bool,
        /// Go on as they come.
        #[arg(long, short)]
        follow: bool,
        /// How many of the past.
        #[arg(long, short = 'n', default_value_t = 50)]
        last: usize,
    },
    /// The status as Prometheus text.
    Metrics,
    /// What this host has and lacks.
    Check,
    /// Make this node and the other one known to each other, or enrol both at a witness.
    Pair(pair::Pair),
    /// Be the witness of pairs (on a third machine), or prepare it.
    Witness(pair::WitnessArgs),
    /// About the configuration file.
    Config {
        /// What.
        #[command(subcommand)]
        what: ConfigCommand,
    },
    /// Take a guest over although no arbiter can be reached. ONLY when the peer is surely off:
    /// two running copies destroy each other's data.
    ForcePromote {
        /// The guest.
        guest: GuestName,
        /// You have looked: the other server is powered off.
        #[arg(long = "peer-is-off", required = true)]
        peer_is_off: bool,
    },
    /// After a conflict: give this node's copy up and take the peer's. What only this copy has is
    /// lost.
    #[command(alias = "discard")]
    DiscardMine {
        /// The guest.
        guest: GuestName,
        /// Really.
        #[arg(long, required = true)]
        yes: bool,
    },
    /// The version.
    Version,
}

/// A command about one guest that may take a while.
#[derive(Debug, clap::Args)]
pub struct OnGuest {
    /// The guest.
    guest: GuestName,
    /// Do not wait for the end.
    #[arg(long)]
    no_wait: bool,
}

/// `havm config …`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a file; errors come with line, column and remedy.
    Check {
        /// The file (default: --config).
        file: Option<PathBuf>,
    },
    /// Print every key with its default and what it means.
    Defaults,
}

/// Prints a line on stdout. Whoever read it may have gone away (`havm status | head -1`): then
/// there is nobody to tell, and the program ends quietly.
fn say(text: impl std::fmt::Display) {
    use std::io::Write;
    let mut out = std::io::stdout();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Runs a command line.
pub fn run(cli: Cli) -> Exit {
    use crate::control::Op;
    let daemon = Daemon::new(cli.socket.as_deref(), &cli.config);
    match cli.command {
        Command::Status { guest, json, watch } => status::run(&daemon, guest.as_ref(), json, watch),
        Command::Protect {
            guest,
            dry_run,
            home,
            restart,
            no_wait,
        } => guest::protect(&daemon, guest, dry_run, home, restart, no_wait),
        Command::Unprotect { guest, restart } => guest::unprotect(&daemon, guest, restart),
        Command::Switchover(g) => guest::operate(&daemon, g.guest, Op::Switchover, !g.no_wait),
        Command::Failback(g) => guest::operate(&daemon, g.guest, Op::Failback, !g.no_wait),
        Command::Start(g) => guest::operate(&daemon, g.guest, Op::Start, !g.no_wait),
        Command::Stop(g) => guest::operate(&daemon, g.guest, Op::Stop, !g.no_wait),
        Command::ForcePromote { guest, .. } => {
            guest::operate(&daemon, guest, Op::ForcePromote, true)
        }
        Command::DiscardMine { guest, .. } => {
            guest::operate(&daemon, guest, Op::DiscardMine, false)
        }
        Command::Verify { guest, json } => guest::verify(&daemon, guest, json),
        Command::Events {
            guest,
            json,
            follow,
            last,
        } => events::run(&daemon, guest, json, follow, last),
        Command::Metrics => status::metrics(&daemon),
        Command::Check => check::run(&cli.config),
        Command::Pair(args) => pair::run(args, &cli.config),
        Command::Witness(args) => pair::witness(args),
        Command::Config { what } => config::run(what, &cli.config),
        Command::Version => {
            crate::cli::say(format!("havm {}", env!("CARGO_PKG_VERSION")));
            Exit::Ok
        }
    }
}
