//! What both nodes of a pair must have in common, key by key, so that a difference can be named.

use crate::model::Config;
use havm_core::spec::Ack;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// The common part of a config, in words that are the same on both nodes. Exchanged by the
/// daemons when they meet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Agreement(BTreeMap<String, String>);

/// One key that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The key, as in the config.
    pub key: String,
    /// Here; none where this config does not have it.
    pub here: Option<String>,
    /// At the peer.
    pub there: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let say = |v: &Option<String>| v.clone().unwrap_or_else(|| "not there".into());
        write!(
            f,
            "{}: here {}, at the peer {}",
            self.key,
            say(&self.here),
            say(&self.there)
        )
    }
}

impl Agreement {
    /// Every key that differs from the peer's; empty when both agree.
    pub fn differences(&self, peer: &Agreement) -> Vec<Difference> {
        let keys: std::collections::BTreeSet<&String> =
            self.0.keys().chain(peer.0.keys()).collect();
        keys.into_iter()
            .filter(|k| self.0.get(*k) != peer.0.get(*k))
            .map(|k| Difference {
                key: k.chars().take(120).collect(),
                here: self.0.get(k).cloned(),
                there: peer.0.get(k).map(|v| v.chars().take(200).collect()),
            })
            .collect()
    }

    /// 64 hexadecimal digits (BLAKE3) that are equal when nothing differs.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for (k, v) in &self.0 {
            for part in [k, v] {
                hash.update(&(part.len() as u64).to_le_bytes());
                hash.update(part.as_bytes());
            }
        }
        hash.finalize().to_hex().to_string()
    }
}

impl Config {
    /// What the peer's config must say too.
    pub fn agreement(&self) -> Agreement {
        let mut m = BTreeMap::new();
        let mut put = |k: String, v: String| {
            m.insert(k, v);
        };
        let mut names = [self.node.name.as_str(), self.peer.name.as_str()];
        names.sort_unstable();
        put("the names in [node] and [peer]".into(), names.join(" and "));
        for (i, l) in self.peer.links.iter().enumerate() {
            let mut ends = [l.local, l.peer];
            ends.sort_unstable();
            put(
                format!("peer.link {} ({})", i + 1, l.name),
                format!("{} to {}", ends[0], ends[1]),
            );
        }
        put("peer.beat_port".into(), self.peer.beat_port.to_string());
        put("peer.peer_port".into(), self.peer.peer_port.to_string());
        put(
            "detection.beat_ms".into(),
            self.detection.beat_ms.to_string(),
        );
        put(
            "detection.lost_ms".into(),
            self.detection.lost_ms.to_string(),
        );
        put("witness.kind".into(), self.witness.kind().into());
        // One witness may have another address on each side: only its kind is compared here, its
        // incarnation by the protocol (rule 13).
        for g in &self.guests {
            let key = |k: &str| format!("guest {:?} {k}", g.name.as_str());
            put(key("home"), g.home.clone());
            put(key("policy"), g.policy.word().into());
            put(
                key("failback"),
                format!(
                    "{} after {} s, at most {} in {} s",
                    g.failback.policy.word(),
                    g.failback.stability_s,
                    g.failback.flap_max,
                    g.failback.flap_window_s
                ),
            );
            let ack = match g.replication.ack {
                Ack::Memory => "memory",
                Ack::Disk => "disk",
            };
            put(key("replication.ack"), ack.into());
        }
        Agreement(m)
    }

    /// Short for `agreement().fingerprint()`.
    pub fn fingerprint(&self) -> String {
        self.agreement().fingerprint()
    }
}
