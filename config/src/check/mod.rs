//! From what the file says to what is true: ranges, uniqueness, references. All that is wrong is
//! found in one pass, so that a person need not mend one error at a time.

mod guest;
mod pair;

use crate::diagnostic::{ConfigError, Diagnostic};
use crate::model::*;
use crate::raw::*;
use crate::suggest;
use havm_core::spec::Ack;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use toml::Spanned;

/// The most guests of one pair.
const MAX_GUESTS: usize = 256;
/// The most links of one pair.
const MAX_LINKS: usize = 8;

struct Checker<'a> {
    text: &'a str,
    file: &'a str,
    errors: Vec<(usize, Diagnostic)>,
}

pub fn check(raw: Raw, text: &str, file: &str) -> Result<Config, ConfigError> {
    let mut c = Checker {
        text,
        file,
        errors: Vec::new(),
    };
    let node = c.node(raw.node);
    let peer = c.peer(raw.peer, &node);
    let detection = c.detection(&raw.detection);
    let witness = c.witness(raw.witness);
    let failback = c.failback(&raw.failback);
    let replication = c.replication(&raw.replication, Replication::default());
    let libvirt = Libvirt {
        uri: c.text(&raw.libvirt.uri, "libvirt.uri", &Libvirt::default().uri),
    };
    let hooks = Hooks {
        dir: c.path(
            &raw.hooks.dir,
            "hooks.dir",
            &Hooks::default().dir.to_string_lossy(),
        ),
        timeout_s: c.int(
            &raw.hooks.timeout_s,
            "timeout_s",
            Hooks::default().timeout_s,
            1..=600,
        ),
    };
    let mut guests = Vec::new();
    let mut seen = BTreeMap::new();
    if let Some(g) = raw.guest.get(MAX_GUESTS) {
        c.bad(
            g.span(),
            format!("more than {MAX_GUESTS} guests"),
            "spread them over several pairs",
        );
    }
    for g in raw.guest.into_iter().take(MAX_GUESTS) {
        guests.extend(c.guest(g, &node, &peer, failback, replication, &mut seen));
    }
    c.errors.sort_by_key(|(at, _)| *at);
    if c.errors.is_empty() {
        Ok(Config {
            node,
            peer,
            detection,
            witness,
            failback,
            replication,
            libvirt,
            hooks,
            guests,
        })
    } else {
        Err(ConfigError {
            diagnostics: c.errors.into_iter().map(|(_, d)| d).collect(),
        })
    }
}

impl Checker<'_> {
    fn bad(&mut self, span: Range<usize>, message: impl Into<String>, help: impl Into<String>) {
        let at = span.start;
        let d = Diagnostic::new(self.file, self.text, span, message, help);
        self.errors.push((at, d));
    }

    fn int(
        &mut self,
        v: &Option<Spanned<i64>>,
        key: &str,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u64 {
        let Some(v) = v else { return default };
        match u64::try_from(*v.get_ref()) {
            Ok(n) if range.contains(&n) => n,
            _ => {
                self.bad(
                    v.span(),
                    format!("`{key}` is out of range"),
                    format!(
                        "from {} to {}; the default is {default}",
                        range.start(),
                        range.end()
                    ),
                );
                default
            }
        }
    }

    fn port(&mut self, v: &Option<Spanned<i64>>, key: &str, default: u16) -> u16 {
        let n = self.int(v, key, u64::from(default), 1..=65535);
        u16::try_from(n).unwrap_or(default)
    }

    fn text(&mut self, v: &Option<Spanned<String>>, key: &str, default: &str) -> String {
        match v {
            None => default.to_owned(),
            Some(v) if v.get_ref().trim().is_empty() => {
                self.bad(
                    v.span(),
                    format!("`{key}` is empty"),
                    format!("leave it out for {default:?}"),
                );
                default.to_owned()
            }
            Some(v) => v.get_ref().clone(),
        }
    }

    fn path(&mut self, v: &Option<Spanned<String>>, key: &str, default: &str) -> PathBuf {
        let path = PathBuf::from(self.text(v, key, default));
        if let Some(v) = v
            && !path.is_absolute()
        {
            self.bad(
                v.span(),
                format!("`{key}` must be an absolute path"),
                format!("start it with `/`, like {default:?}"),
            );
        }
        path
    }

    /// One of some words.
    fn word<T: Copy>(
        &mut self,
        v: &Option<Spanned<String>>,
        key: &str,
        known: &[(&str, T)],
        default: T,
    ) -> T {
        let Some(v) = v else { return default };
        if let Some((_, t)) = known.iter().find(|(w, _)| *w == v.get_ref()) {
            return *t;
        }
        let words: Vec<&str> = known.iter().map(|(w, _)| *w).collect();
        let help = match suggest::nearest(v.get_ref(), &words) {
            Some(w) => format!("did you mean \"{w}\"?"),
            None => format!("known: \"{}\"", words.join("\", \"")),
        };
        self.bad(
            v.span(),
            format!("{:?} is not a `{key}`", v.get_ref()),
            help,
        );
        default
    }

    /// A node's or link's name that must be there.
    fn name(&mut self, v: &Option<Spanned<String>>, key: &str, section: Range<usize>) -> String {
        let Some(v) = v else {
            self.bad(
                section,
                format!("`{key}` is missing here"),
                format!("add `{key} = \"...\"` to this section"),
            );
            return String::new();
        };
        let s = v.get_ref();
        let ok = (1..=50).contains(&s.len())
            && s.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if !ok {
            self.bad(
                v.span(),
                format!("{s:?} is not usable as `{key}`"),
                "1 to 50 of a-z A-Z 0-9 _ . -",
            );
        }
        s.clone()
    }

    fn detection(&mut self, raw: &RawDetection) -> Detection {
        let d = Detection::default();
        let beat_ms = self.int(&raw.beat_ms, "beat_ms", d.beat_ms, 1..=1000);
        let lost_ms = self.int(&raw.lost_ms, "lost_ms", d.lost_ms, 3..=60_000);
        if lost_ms < 3 * beat_ms {
            let at = raw.lost_ms.as_ref().or(raw.beat_ms.as_ref());
            self.bad(
                at.map_or(0..0, Spanned::span),
                format!("`lost_ms` {lost_ms} is less than three beats of {beat_ms} ms"),
                format!(
                    "one late beat would be a failover: set `lost_ms` to {} or more, or `beat_ms` lower",
                    3 * beat_ms
                ),
            );
        }
        Detection {
            beat_ms,
            lost_ms,
            stream_silent_ms: self.int(
                &raw.stream_silent_ms,
                "stream_silent_ms",
                d.stream_silent_ms,
                20..=60_000,
            ),
        }
    }

    fn witness(&mut self, raw: Option<Spanned<RawWitness>>) -> Witness {
        let Some(raw) = raw else {
            self.bad(
                0..0,
                "the section [witness] is missing",
                "add:  [witness]  kind = \"builtin\"  address = [\"IP:PORT\"]   or kind = \"none\", which means: no failover when the peer falls silent",
            );
            return Witness::None;
        };
        let span = raw.span();
        let raw = raw.into_inner();
        let kind_span = raw.kind.as_ref().map_or(span, Spanned::span);
        let builtin = self.word(
            &raw.kind,
            "kind",
            &[("builtin", true), ("none", false)],
            true,
        );
        if !builtin {
            if let Some(a) = raw.address.first() {
                self.bad(
                    a.span(),
                    "`address` means nothing with kind = \"none\"",
                    "remove it, or set kind = \"builtin\"",
                );
            }
            return Witness::None;
        }
        if raw.address.is_empty() && raw.kind.as_ref().is_none_or(|k| k.get_ref() == "builtin") {
            self.bad(
                kind_span,
                "the built-in witness has no `address`",
                "add address = [\"IP:PORT\"] of the box where `havm witness` runs",
            );
        }
        let addresses = raw.address.iter().take(8).filter_map(|a| self.socket(a));
        Witness::Builtin {
            addresses: addresses.collect(),
        }
    }

    fn socket(&mut self, v: &Spanned<String>) -> Option<SocketAddr> {
        let s = v.get_ref();
        let parsed = s.parse::<SocketAddr>().ok();
        let parsed = parsed.or_else(|| Some(SocketAddr::new(s.parse().ok()?, WITNESS_PORT)));
        match parsed {
            Some(a) if a.port() != 0 && !a.ip().is_unspecified() => Some(a),
            _ => {
                self.bad(
                    v.span(),
                    format!("{s:?} is not an address"),
                    format!("write it like \"10.9.0.9:{WITNESS_PORT}\" or \"[fd00::9]:{WITNESS_PORT}\": no host name (names may not resolve when they are needed most)"),
                );
                None
            }
        }
    }

    fn failback(&mut self, raw: &RawFailback) -> Failback {
        let d = Failback::default();
        let flap_max = self.int(&raw.flap_max, "flap_max", u64::from(d.flap_max), 1..=1000);
        Failback {
            policy: self.word(&raw.policy, "policy", FAILBACK_WORDS, d.policy),
            stability_s: self.int(&raw.stability_s, "stability_s", d.stability_s, 0..=86_400),
            flap_max: u32::try_from(flap_max).unwrap_or(d.flap_max),
            flap_window_s: self.int(
                &raw.flap_window_s,
                "flap_window_s",
                d.flap_window_s,
                1..=604_800,
            ),
        }
    }

    fn replication(&mut self, raw: &RawReplication, d: Replication) -> Replication {
        let max = self.int(
            &raw.max_interval_ms,
            "max_interval_ms",
            d.max_interval_ms,
            1..=10_000,
        );
        let min = self.int(
            &raw.min_interval_ms,
            "min_interval_ms",
            d.min_interval_ms,
            1..=10_000,
        );
        if min > max {
            let at = raw
                .min_interval_ms
                .as_ref()
                .or(raw.max_interval_ms.as_ref());
            self.bad(
                at.map_or(0..0, Spanned::span),
                format!("`min_interval_ms` {min} is more than `max_interval_ms` {max}"),
                "the shortest distance of two epochs cannot exceed the longest",
            );
        }
        Replication {
            max_interval_ms: max,
            min_interval_ms: min,
            ack: self.word(
                &raw.ack,
                "ack",
                &[("memory", Ack::Memory), ("disk", Ack::Disk)],
                d.ack,
            ),
            delta_cache_mib: self.int(
                &raw.delta_cache_mib,
                "delta_cache_mib",
                d.delta_cache_mib,
                0..=65_536,
            ),
            output_limit_mib: self.int(
                &raw.output_limit_mib,
                "output_limit_mib",
                d.output_limit_mib,
                1..=4096,
            ),
        }
    }
}

const FAILBACK_WORDS: &[(&str, FailbackPolicy)] = &[
    ("automatic", FailbackPolicy::Automatic),
    ("manual", FailbackPolicy::Manual),
];
