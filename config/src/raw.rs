//! What the file says, before it is believed: every value with its place in the text.

use crate::diagnostic::{ConfigError, Diagnostic};
use crate::suggest;
use serde::Deserialize;
use toml::Spanned;

type S<T> = Option<Spanned<T>>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    pub node: S<RawNode>,
    pub peer: S<RawPeer>,
    #[serde(default)]
    pub detection: RawDetection,
    pub witness: S<RawWitness>,
    #[serde(default)]
    pub failback: RawFailback,
    #[serde(default)]
    pub replication: RawReplication,
    #[serde(default)]
    pub libvirt: RawLibvirt,
    #[serde(default)]
    pub hooks: RawHooks,
    #[serde(default)]
    pub guest: Vec<Spanned<RawGuest>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawNode {
    pub name: S<String>,
    pub state_dir: S<String>,
    pub run_dir: S<String>,
    pub log: S<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPeer {
    pub name: S<String>,
    pub beat_port: S<i64>,
    pub peer_port: S<i64>,
    pub replication_ports: S<Vec<i64>>,
    #[serde(default)]
    pub link: Vec<Spanned<RawLink>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawLink {
    pub name: S<String>,
    pub local: S<String>,
    pub peer: S<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawDetection {
    pub beat_ms: S<i64>,
    pub lost_ms: S<i64>,
    pub stream_silent_ms: S<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawWitness {
    pub kind: S<String>,
    #[serde(default)]
    pub address: Vec<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawFailback {
    pub policy: S<String>,
    pub stability_s: S<i64>,
    pub flap_max: S<i64>,
    pub flap_window_s: S<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawReplication {
    pub max_interval_ms: S<i64>,
    pub min_interval_ms: S<i64>,
    pub ack: S<String>,
    pub delta_cache_mib: S<i64>,
    pub output_limit_mib: S<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawLibvirt {
    pub uri: S<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHooks {
    pub dir: S<String>,
    pub timeout_s: S<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawGuest {
    pub name: S<String>,
    pub home: S<String>,
    pub policy: S<String>,
    pub failback: S<String>,
    #[serde(default)]
    pub replication: RawReplication,
}

/// Reads the text; TOML's own errors get a place and a remedy here.
pub fn read(text: &str, name: &str) -> Result<Raw, ConfigError> {
    toml::from_str::<Raw>(text).map_err(|e| {
        let (message, help) = explain(e.message());
        ConfigError::from(Diagnostic::new(
            name,
            text,
            e.span().unwrap_or(0..0),
            message,
            help,
        ))
    })
}

/// TOML's words in ours. Where the words are not known they are passed on.
fn explain(words: &str) -> (String, String) {
    if let Some(rest) = words.strip_prefix("unknown field ") {
        let names: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
        if let Some((key, known)) = names.split_first() {
            let help = match suggest::nearest(key, known) {
                Some(n) => format!("did you mean `{n}`?"),
                None => format!("known here: {}", known.join(", ")),
            };
            return (format!("unknown key `{key}`"), help);
        }
    }
    if let Some(rest) = words
        .strip_prefix("invalid type: ")
        .or_else(|| words.strip_prefix("invalid value: "))
        && let Some((found, expected)) = rest.split_once(", expected ")
    {
        let (expected, example) = match expected {
            "i64" => (
                "a whole number",
                "write it without quotes and unit: the unit is in the key's name",
            ),
            "a string" => ("a text", "put it in double quotes"),
            "a sequence" => ("a list", "put it in square brackets: [ \"...\" ]"),
            e if e.starts_with("struct Raw") => {
                ("a section", "write it as [section] with its keys below")
            }
            e if e.contains("borrowed string") => ("a text", "put it in double quotes"),
            e => (
                e,
                "`havm config --defaults` shows every key with an example",
            ),
        };
        return (
            format!("expected {expected}, found {found}"),
            example.into(),
        );
    }
    if let Some(key) = words.strip_prefix("duplicate key") {
        let key = key.trim().trim_matches('`');
        let what = if key.is_empty() {
            "this key or section".to_owned()
        } else {
            format!("`{key}`")
        };
        return (
            format!("{what} is given twice"),
            "keep one of them; several guests or links are written as [[guest]], [[peer.link]]"
                .into(),
        );
    }
    (
        words.trim_end().replace('\n', ", "),
        "this is not TOML: `havm config --defaults` prints a file that is".into(),
    )
}
