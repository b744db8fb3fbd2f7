//! `havm pair` and `havm witness`: how machines come to know each other, and the third box.

use super::Exit;
use crate::identity_store::WitnessPin;
use crate::pairing::{Code, PairAs, accept, join};
use crate::witness::enrol::{enrol_pair, new_code, put_code};
use crate::witness::store::BookStore;
use havm_config::Config;
use havm_config::model::{WITNESS_PORT, Witness};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// `havm pair`.
#[derive(Debug, clap::Args)]
pub struct Pair {
    /// [ADDRESS:PORT] CODE, as `havm pair --accept` printed it on the other node. The address is
    /// by default that of the first link (with --witness: the witness's in the config).
    #[arg(value_name = "[ADDRESS] CODE", num_args = 0..=2)]
    words: Vec<String>,
    /// Wait here for the other node, and print the code that it needs.
    #[arg(long, conflicts_with = "witness")]
    accept: bool,
    /// Enrol this paired node at the witness, with the code that `havm witness --enrol` printed
    /// there. Run it on both nodes.
    #[arg(long)]
    witness: bool,
    /// Pair again although this node is paired already.
    #[arg(long)]
    replace: bool,
    /// Take the code from this file instead (with --accept: use it, or make it), for scripts that
    /// bring it to both machines themselves.
    #[arg(long, value_name = "FILE")]
    code_file: Option<PathBuf>,
}

/// `havm witness`.
#[derive(Debug, clap::Args)]
pub struct WitnessArgs {
    /// Where to listen.
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], WITNESS_PORT)))]
    listen: SocketAddr,
    /// What must last.
    #[arg(long, default_value = "/var/lib/havm-witness")]
    state_dir: PathBuf,
    /// Do not serve: print a code with which a pair enrols at the running witness.
    #[arg(long, conflicts_with = "reset")]
    enrol: bool,
    /// Do not serve: forget everything, so that the next start is a new witness. Every pair must
    /// enrol again. The witness must not run.
    #[arg(long)]
    reset: bool,
    /// With --enrol: use the code in this file (or make it).
    #[arg(long, value_name = "FILE", requires = "enrol")]
    code_file: Option<PathBuf>,
}

fn fail(e: impl std::fmt::Display) -> Exit {
    eprintln!("havm: {e}");
    Exit::Failed
}

fn block<T>(work: impl Future<Output = T>) -> Result<T, Exit> {
    let rt = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    rt.map(|rt| rt.block_on(work)).map_err(fail)
}

fn code_of(args: &Pair) -> Result<(Option<SocketAddr>, Code), Exit> {
    let usage = |e: String| {
        eprintln!("havm: {e}");
        Exit::Usage
    };
    let mut words = args.words.clone();
    let code = match &args.code_file {
        Some(f) => Code::load(f).map_err(fail)?,
        None => words
            .pop()
            .ok_or_else(|| {
                usage(
                    "the code is missing; `havm pair --accept` on the other node prints it".into(),
                )
            })?
            .parse()
            .map_err(|e: crate::pairing::CodeError| usage(e.to_string()))?,
    };
    let address = match words.pop() {
        None => None,
        Some(a) => Some(
            a.parse()
                .map_err(|e| usage(format!("{a}: {e}: expected ADDRESS:PORT")))?,
        ),
    };
    Ok((address, code))
}

/// Runs `havm pair`.
pub fn run(args: Pair, config: &Path) -> Exit {
    let config = match havm_config::load(config) {
        Ok(c) => c,
        Err(e) => {
            eprintln!("{e}");
            return Exit::Config;
        }
    };
    let done = if args.witness {
        enrol(&args, &config)
    } else {
        pair(&args, &config)
    };
    done.unwrap_or_else(|e| e)
}

fn pair(args: &Pair, config: &Config) -> Result<Exit, Exit> {
    let me = PairAs {
        state_dir: config.node.state_dir.clone(),
        name: config.node.name.clone(),
        expect_peer: Some(config.peer.name.clone()),
        replace: args.replace,
    };
    let link = &config.peer.links[0];
    let port = config.peer.peer_port;
    let pair = if args.accept {
        let code = accept_code(args.code_file.as_deref())?;
        let listen = SocketAddr::new(link.local, port);
        block(accept(listen, &code, &me, |at| {
            eprintln!("waiting at {at}; on {}: havm pair {code}", config.peer.name);
        }))?
    } else {
        let (address, code) = code_of(args)?;
        let address = address.unwrap_or(SocketAddr::new(link.peer, port));
        block(join(address, &code, &me))?
    };
    let pair = pair.map_err(fail)?;
    crate::cli::say(format!(
        "paired with {} (node {})",
        pair.peer_name, pair.peer
    ));
    eprintln!(
        "havmd goes on by itself where it waits for this; restart one that was paired before"
    );
    Ok(Exit::Ok)
}

fn accept_code(file: Option<&Path>) -> Result<Code, Exit> {
    match file {
        Some(f) if f.exists() => Code::load(f).map_err(fail),
        Some(f) => {
            let code = Code::random().map_err(fail)?;
            code.save(f).map_err(fail)?;
            Ok(code)
        }
        None => Code::random().map_err(fail),
    }
}

fn enrol(args: &Pair, config: &Config) -> Result<Exit, Exit> {
    let (address, code) = code_of(args)?;
    let configured = match &config.witness {
        Witness::Builtin { addresses } => addresses.first().copied(),
        Witness::None => None,
    };
    let address = address.or(configured).ok_or_else(|| {
        eprintln!("havm: no witness is configured: name one in [witness]");
        Exit::Config
    })?;
    let work = enrol_pair(address, &code, &config.node.name, &config.node.state_dir);
    let pin: WitnessPin = block(work)?.map_err(fail)?;
    crate::cli::say(format!(
        "enrolled at the witness {address} (incarnation {})",
        pin.incarnation
    ));
    eprintln!(
        "do the same on the other node, with the same code; a havmd that was enrolled elsewhere before must be restarted"
    );
    Ok(Exit::Ok)
}

/// Runs `havm witness`.
pub fn witness(args: WitnessArgs) -> Exit {
    if args.reset {
        return match BookStore::reset(&args.state_dir) {
            Ok(()) => {
                crate::cli::say(
                    "the witness's book is gone; start it, then enrol every pair again",
                );
                Exit::Ok
            }
            Err(e) => fail(e),
        };
    }
    if args.enrol {
        let code = match args.code_file.as_deref() {
            Some(f) => accept_code(Some(f))
                .and_then(|c| put_code(&args.state_dir, &c).map(|()| c).map_err(fail)),
            None => new_code(&args.state_dir).map_err(fail),
        };
        return match code {
            Ok(code) => {
                crate::cli::say(format!(
                    "on both nodes, within ten minutes: havm pair --witness {code}"
                ));
                Exit::Ok
            }
            Err(e) => e,
        };
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("HAVM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    match block(crate::witness::serve(args.listen, &args.state_dir)) {
        Ok(Ok(())) => Exit::Ok,
        Ok(Err(e)) => fail(e),
        Err(e) => e,
    }
}
