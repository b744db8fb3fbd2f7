//! The program `lab`: see tests/lab/README.md.

use anyhow::Result;
use clap::{Parser, Subcommand};
use havm_guest::image::{GuestFiles, make_disk};
use havm_lab::place;
use std::path::PathBuf;

#[derive(Parser)]
#[command(about = "Two libvirt hosts on one machine, to try havm on")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the testifying guest: kernel, initramfs, and (with --disk) an empty disk.
    GuestImage {
        /// Also make an empty raw disk here.
        #[arg(long)]
        disk: Option<PathBuf>,
        /// Its size.
        #[arg(long, default_value_t = 1024)]
        disk_mib: u64,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
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
    }
}
