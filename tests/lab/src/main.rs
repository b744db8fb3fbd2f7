//! The program `lab`: see tests/lab/README.md.

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use havm_guest::client::cli::{ClientCommand, work as work_as_client};
use havm_guest::domain::Domain;
use havm_guest::image::{GuestFiles, make_disk};
use havm_lab::status::Status;
use havm_lab::{Host, Lab, LinkState, Options, init, place};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Two libvirt hosts, a witness box and an outside client on one machine")]
struct Cli {
    /// Which lab: several can be up at once.
    #[arg(long, global = true, env = "HAVM_LAB_NAME", default_value = "havm")]
    name: String,
    /// Its folder [default: target/lab, or target/lab-NAME].
    #[arg(long, global = true, env = "HAVM_LAB_DIR")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a new lab up, with empty disks; an old one of the same name is taken down first.
    Up {
        /// Keep the disks of the last one.
        #[arg(long)]
        keep_disks: bool,
    },
    /// Take it down. Logs and disks stay in its folder.
    Down,
    /// Run a command on a host.
    Exec {
        /// alpha, beta or gamma.
        host: Host,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// A host's power switch.
    Power {
        /// What to do.
        action: Power,
        /// alpha, beta or gamma.
        host: Host,
    },
    /// Cut, mend or spoil a link: `link rep0 down`, `link rep0 drop 30`, `link rep0 oneway alpha>beta`.
    Link {
        /// rep0 rep1 lan-alpha lan-beta lan-client mgmt-alpha mgmt-beta mgmt-gamma.
        link: String,
        /// up, down, drop or oneway.
        action: LinkAction,
        /// The percentage for drop, A>B for oneway (only A to B gets through).
        argument: Option<String>,
    },
    /// Run a command in the outside world (10.9.0.2 on the guest LAN).
    Client {
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Run the testifying guest's client in the outside world, or its frame recorder at the
    /// switches: `testify run 10.9.0.10 --seconds 5`, `testify record lan-alpha lan-beta`.
    Testify {
        /// What testify-client takes; `testify --help` lists it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The same, already in place.
    #[command(name = "__testify", hide = true)]
    TestifyHere {
        #[command(subcommand)]
        command: ClientCommand,
    },
    /// Say how hosts, guests and links are.
    Status {
        /// For a program.
        #[arg(long)]
        json: bool,
    },
    /// Define a testifying guest on a host, with an empty disk. `virsh start` starts it.
    Guest {
        /// alpha or beta.
        host: Host,
        /// Its name.
        guest: String,
        /// Its address on the guest LAN.
        #[arg(long, default_value = "10.9.0.10")]
        ip: Ipv4Addr,
        /// Memory.
        #[arg(long, default_value_t = 192)]
        memory_mib: u64,
        /// vCPUs.
        #[arg(long, default_value_t = 1)]
        vcpus: u32,
        /// Disk.
        #[arg(long, default_value_t = 1024)]
        disk_mib: u64,
    },
    /// Build the testifying guest's kernel and initramfs (and, with --disk, an empty disk).
    GuestImage {
        /// Also make an empty raw disk here.
        #[arg(long)]
        disk: Option<PathBuf>,
        /// Its size.
        #[arg(long, default_value_t = 1024)]
        disk_mib: u64,
    },
    /// Process 1 of a host.
    #[command(name = "__init", hide = true)]
    Init {
        #[arg(long)]
        inner: bool,
        host: Host,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Power {
    Off,
    On,
    Freeze,
    Thaw,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LinkAction {
    Up,
    Down,
    Drop,
    Oneway,
}

fn link_state(action: LinkAction, argument: Option<&str>) -> Result<LinkState> {
    Ok(match (action, argument) {
        (LinkAction::Up, None) => LinkState::Up,
        (LinkAction::Down, None) => LinkState::Down,
        (LinkAction::Drop, Some(p)) => LinkState::Drop(
            p.trim_end_matches('%')
                .parse()
                .context("drop wants a percentage")?,
        ),
        (LinkAction::Oneway, Some(way)) => match way.split_once('>') {
            Some((a, b)) => LinkState::OneWay(a.to_owned(), b.to_owned()),
            None => bail!("oneway wants A>B, for example 'alpha>beta' (quoted)"),
        },
        (LinkAction::Drop, None) => bail!("drop wants a percentage"),
        (LinkAction::Oneway, None) => bail!("oneway wants A>B, for example 'alpha>beta' (quoted)"),
        (_, Some(word)) => bail!("{word:?}: up and down take no argument"),
    })
}

/// Becomes another program; returns only on failure.
fn become_command(mut command: std::process::Command, args: &[String]) -> Result<()> {
    Err(command.args(args).exec()).context("starting the command")
}

fn main() -> ExitCode {
    match work(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lab: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(cli: Cli) -> Result<()> {
    let mut options = Options::named(&cli.name)?;
    if let Some(dir) = cli.dir {
        options.dir = dir;
    }
    let lab = Lab::open(&options)?;
    match cli.command {
        Command::Up { keep_disks } => {
            let start = std::time::Instant::now();
            options.keep_disks = keep_disks;
            options.keep_boot = true;
            Lab::up(&options)?.keep();
            println!(
                "lab {} is up after {:.1} s",
                options.name,
                start.elapsed().as_secs_f64()
            );
            Ok(())
        }
        Command::Down => lab.down(),
        Command::Exec { host, command } => {
            let program = command.first().context("no command")?;
            become_command(lab.command(host, program)?, &command[1..])
        }
        Command::Power { action, host } => match action {
            Power::Off => lab.power_off(host).map(drop),
            Power::On => lab.power_on(host),
            Power::Freeze => lab.freeze(host),
            Power::Thaw => lab.thaw(host),
        },
        Command::Link {
            link,
            action,
            argument,
        } => lab.set_link(&link, link_state(action, argument.as_deref())?),
        Command::Client { command } => {
            let program = command.first().context("no command")?;
            become_command(lab.client_command(program)?, &command[1..])
        }
        Command::Testify { arguments } => {
            if arguments.is_empty() || arguments.iter().any(|a| a == "--help" || a == "-h") {
                let here = std::env::current_exe().context("finding this program")?;
                let mut help = std::process::Command::new(here);
                help.arg("__testify");
                return become_command(help, &[&arguments[..], &["--help".to_owned()]].concat());
            }
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            become_command(lab.testify(&arguments)?, &[])
        }
        Command::TestifyHere { command } => work_as_client(command),
        Command::Status { json } => {
            let status = Status::of(&lab)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{}", status.text());
            }
            Ok(())
        }
        Command::Guest {
            host,
            guest,
            ip,
            memory_mib,
            vcpus,
            disk_mib,
        } => {
            let domain = Domain {
                ip,
                memory_mib,
                vcpus,
                ..Domain::new(&guest, 0)
            };
            lab.define_guest(host, &domain, disk_mib << 20)
        }
        Command::GuestImage { disk, disk_mib } => {
            let files = GuestFiles::in_target(&place::target_dir()?);
            files.build(&place::workspace_dir()?)?;
            println!(
                "{}\n{}",
                files.vmlinuz().display(),
                files.initramfs().display()
            );
            if let Some(disk) = disk {
                make_disk(&disk, disk_mib << 20)?;
                println!("{}", disk.display());
            }
            Ok(())
        }
        Command::Init { inner: false, host } => init::outer(&options.name, lab.dir(), host),
        Command::Init { inner: true, host } => init::inner(lab.dir(), host),
    }
}
