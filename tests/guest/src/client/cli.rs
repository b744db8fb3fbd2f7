//! The client's command line, for the program `testify-client` and for `lab testify`.

use super::{Question, control, run};
use crate::recorder;
use crate::report::Ask;
use anyhow::{Context, Result};
use clap::Subcommand;
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What the client can do.
#[derive(Subcommand)]
pub enum ClientCommand {
    /// Keep connections busy until `stop` comes on stdin (or the socket), then print the proof.
    Run {
        /// The guest's address.
        guest: IpAddr,
        /// Connections whose requests go in turn.
        #[arg(long, default_value_t = 4)]
        connections: usize,
        /// Between an answer and the next request on them.
        #[arg(long, default_value_t = 2)]
        think_ms: u64,
        /// Connections that send without waiting for answers.
        #[arg(long, default_value_t = 1)]
        paced: usize,
        /// How often these send.
        #[arg(long, default_value_t = 10)]
        every_ms: u64,
        /// Between two datagrams of the echo probe; 0 for none.
        #[arg(long, default_value_t = 5)]
        probe_ms: u64,
        /// How long to try to connect.
        #[arg(long, default_value_t = 15)]
        connect_s: u64,
        /// How long to wait at the end for open answers.
        #[arg(long, default_value_t = 20)]
        drain_s: u64,
        /// Take lines from this unix socket instead of stdin.
        #[arg(long)]
        socket: Option<PathBuf>,
        /// Stop by itself after this long.
        #[arg(long)]
        seconds: Option<u64>,
    },
    /// Record guests' frames on interfaces until `stop`, then print what was seen.
    Record {
        /// The interfaces, for example lan-alpha lan-beta in the switch namespace.
        #[arg(required = true)]
        interfaces: Vec<String>,
        /// Take lines from this unix socket instead of stdin.
        #[arg(long)]
        socket: Option<PathBuf>,
    },
    /// Say a line (stats, mark, stop) to a client or recorder with a socket.
    Tell {
        /// Its socket.
        socket: PathBuf,
        /// The line.
        line: String,
    },
    /// Ask a guest, in JSON: `ask 10.9.0.10 '{"op":"seen"}'`; also dirty, burst, check, conns,
    /// poweroff, reboot.
    Ask {
        /// The guest's address.
        guest: IpAddr,
        /// The question.
        question: String,
    },
}

/// Where stdin may be closed from the start, lines come from a socket that nobody needs to know.
fn own_socket() -> PathBuf {
    std::env::temp_dir().join(format!("testify-client-{}.sock", std::process::id()))
}

/// Does it.
pub fn work(command: ClientCommand) -> Result<()> {
    let ms = Duration::from_millis;
    match command {
        ClientCommand::Run {
            guest,
            connections,
            think_ms,
            paced,
            every_ms,
            probe_ms,
            connect_s,
            drain_s,
            socket,
            seconds,
        } => run::run(&run::Plan {
            guest,
            connections,
            think: ms(think_ms),
            paced,
            every: ms(every_ms.max(1)),
            probe: ms(probe_ms),
            connect_time: Duration::from_secs(connect_s),
            drain: Duration::from_secs(drain_s),
            socket: socket.or(seconds.map(|_| own_socket())),
            time: seconds.map(Duration::from_secs),
        }),
        ClientCommand::Record { interfaces, socket } => {
            recorder::run(&recorder::Plan { interfaces, socket })
        }
        ClientCommand::Tell { socket, line } => {
            println!("{}", control::ask(&socket, &line)?);
            Ok(())
        }
        ClientCommand::Ask { guest, question } => {
            let ask: Ask = serde_json::from_str(&question).context("the question")?;
            let answer = Question::connect(guest, Duration::from_secs(5))?.ask(&ask)?;
            std::io::stdout()
                .write_all(&answer)
                .context("printing the answer")?;
            println!();
            Ok(())
        }
    }
}
