//! `havm config`.

use super::{ConfigCommand, Exit};
use std::path::Path;

/// Checks a file or prints the defaults.
pub fn run(what: ConfigCommand, default: &Path) -> Exit {
    match what {
        ConfigCommand::Defaults => {
            print!("{}", havm_config::DEFAULTS_TOML);
            Exit::Ok
        }
        ConfigCommand::Check { file } => {
            let file = file.as_deref().unwrap_or(default);
            match havm_config::load(file) {
                Ok(c) => {
                    crate::cli::say(format!(
                        "{}: ok: node {}, peer {}, {} links, {} guests named, witness {}",
                        file.display(),
                        c.node.name,
                        c.peer.name,
                        c.peer.links.len(),
                        c.guests.len(),
                        c.witness.kind()
                    ));
                    Exit::Ok
                }
                Err(e) => {
                    eprintln!("{e}");
                    Exit::Config
                }
            }
        }
    }
}
