//! The configuration of a node: TOML in, a checked [`Config`] out.
//!
//! ```text
//!   text ──toml──> raw (every value with its place) ──check──> Config
//!                     └──────── ConfigError: file, line, column, caret, remedy ────────┘
//! ```
//!
//! Nothing is guessed: an unknown key is an error, and so is a value out of its range. The
//! defaults are in `defaults.toml` beside this crate ([`DEFAULTS_TOML`]) and in
//! [`model`]; a test keeps both the same. What both nodes of a pair must have in common is in
//! [`Config::agreement`].
#![forbid(unsafe_code)]

mod agree;
mod check;
mod diagnostic;
pub mod model;
mod raw;
mod suggest;

pub use agree::{Agreement, Difference};
pub use diagnostic::{ConfigError, Diagnostic};
pub use model::Config;

use std::io::Read;
use std::path::Path;

/// Every key with its default and what it means: for `havm config --defaults`.
pub const DEFAULTS_TOML: &str = include_str!("../defaults.toml");

/// Where the daemon looks when it is not told otherwise.
pub const DEFAULT_PATH: &str = "/etc/havm/havm.toml";

/// The largest config file that is read, bytes.
pub const MAX_CONFIG_BYTES: u64 = 1024 * 1024;

/// Reads and checks a file.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let unreadable = |why: String, help: &str| ConfigError::unreadable(path, why, help);
    let file = std::fs::File::open(path).map_err(|e| {
        unreadable(
            e.to_string(),
            "name the file with --config, or write it: `havm config --defaults` prints every key",
        )
    })?;
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| unreadable(e.to_string(), "it must be a readable file"))?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(unreadable(
            "it has more than 1 MiB".into(),
            "is this really havm's config?",
        ));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        unreadable(
            format!("byte {} is not UTF-8", e.utf8_error().valid_up_to() + 1),
            "save it as UTF-8",
        )
    })?;
    parse(&text, &path.display().to_string())
}

/// Checks a text; `name` stands for the file in errors.
pub fn parse(text: &str, name: &str) -> Result<Config, ConfigError> {
    let raw = raw::read(text, name)?;
    check::check(raw, text, name)
}
