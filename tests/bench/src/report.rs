//! The targets, and the report: figures beside their floors.

use crate::machine::Machine;
use crate::stats::round;
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    /// The target is the most that is good.
    AtMost,
    /// The target is the least that is good.
    AtLeast,
}

/// What must be reached.
#[derive(Debug)]
pub struct Target {
    /// The figure's name in the report.
    pub name: &'static str,
    /// The measurement that gives it.
    pub measurement: &'static str,
    /// In words.
    pub what: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Which way is better.
    pub want: Want,
    /// The value to reach.
    pub target: f64,
    /// What its floor is: the same without havm, or what physics asks for.
    pub floor: &'static str,
}

macro_rules! targets {
    ($($measurement:literal { $($name:literal $want:ident $target:literal $unit:literal, $what:literal, floor $floor:literal;)* })*) => {
        /// Every figure, in the order of the report.
        pub const TARGETS: &[Target] = &[$($(Target {
            name: $name,
            measurement: $measurement,
            what: $what,
            unit: $unit,
            want: Want::$want,
            target: $target,
            floor: $floor,
        },)*)*];
    };
}

targets! {
    "pause" {
        "pause_idle_256_mib" AtMost 1.6 "ms", "pause of an epoch, p50, idle guest of 256 MiB",
            floor "bare stop, save, cont + memcpy of the bytes copied in the pause";
        "pause_idle_4_gib" AtMost 3.0 "ms", "pause of an epoch, p50, idle guest of 4 GiB that has used its memory",
            floor "bare stop, save, cont + memcpy of the bytes copied in the pause";
        "pause_1_gib_dirty_11_mib" AtMost 3.5 "ms", "pause of an epoch, p50, 1 GiB guest that dirties 11 MiB an epoch",
            floor "bare stop, save, cont + memcpy of the bytes dirtied in the epoch";
    }
    "promotion" {
        "promotion_256_mib" AtMost 50.0 "ms", "from a 256 MiB image to running vCPUs, median",
            floor "QEMU loads a stream that QEMU wrote of the same guest, and runs";
        "promotion_4_gib" AtMost 50.0 "ms", "from a 4 GiB image to running vCPUs, median",
            floor "QEMU loads a stream that QEMU wrote of the same guest, and runs";
        "promotion_4_gib_over_256_mib" AtMost 1.5 "ratio", "promotion of 4 GiB over promotion of 256 MiB",
            floor "the same ratio of the floors";
    }
    "gate" {
        "gate_throughput_ratio" AtLeast 0.6 "ratio", "TCP out of the guest through the open gate, over a plain bridge",
            floor "the plain bridge, Gbit/s";
    }
    "beats" {
        "false_alarms" AtMost 0.0 "alarms", "false alarms of both nodes in 120 s with four busy loops, default detection",
            floor "alarms that must be";
        "detection" AtMost 150.0 "ms", "from a node's last sign to the verdict under that load, median",
            floor "lost_ms of the default configuration";
    }
    "demo" {
        "failover_outage_over_detection" AtMost 100.0 "ms", "client's outage at failover less the detection",
            floor "the promotion in the same run, ms";
        "failback_outage" AtMost 100.0 "ms", "client's outage at the planned move home",
            floor "the pause of an epoch in the same run, p50, ms";
"resync_bytes_over_allowed" AtMost 1.0 "ratio", "bytes sent to bring the repaired host up to date, over 1.2 times the disk bytes that differ plus RAM",
            floor "each differing byte of the disk once, over the same";
        "wire_bytes_per_dirty_byte" AtMost 0.6 "ratio", "bytes on the wire over dirty bytes, testifying guest",
            floor "one: each dirty byte as it is";
    }
}

/// One value with its floor; or why there is none though the measurement ran.
#[derive(Debug, Clone)]
pub enum Value1 {
    /// It was measured.
    Seen {
        /// The value.
        value: f64,
        /// The floor.
        floor: f64,
    },
    /// It could not be seen.
    Unseen(String),
}

/// What a measurement gives.
#[derive(Debug, Default)]
pub struct Found {
    values: BTreeMap<&'static str, Value1>,
    /// All that was seen on the way.
    pub detail: Value,
}

impl Found {
    /// A figure was measured.
    pub fn seen(&mut self, name: &'static str, value: f64, floor: f64) {
        self.values.insert(name, Value1::Seen { value, floor });
    }

    /// A figure could not be seen, and why.
    pub fn unseen(&mut self, name: &'static str, why: impl Into<String>) {
        self.values.insert(name, Value1::Unseen(why.into()));
    }
}

/// Measures; a panic is an error too: the guests and namespaces of the tests panic where they cannot be made.
///
/// # Errors
/// Those of `measure`, or what it said when it panicked.
pub fn attempt<T>(measure: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(measure)).unwrap_or_else(|p| {
        let text = p.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| p.downcast_ref::<&str>().copied());
        Err(anyhow!("{}", text.unwrap_or("it panicked without words")))
    })
}

/// A figure of the report.
#[derive(Debug, Serialize)]
pub struct Figure {
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    value: Option<f64>,
    want: Want,
    target: f64,
    reached: bool,
    floor: Option<f64>,
    floor_is: &'static str,
    over_floor: Option<f64>,
    why: Option<String>,
    load: [f64; 3],
    /// There is no value.
    #[serde(skip)]
    pub failed: bool,
}

impl Figure {
    /// From what its measurement found.
    pub fn new(
        t: &'static Target,
        found: Result<&Found, &anyhow::Error>,
        load: [f64; 3],
    ) -> Figure {
        let value = match found {
            Ok(f) => f.values.get(t.name).cloned().unwrap_or_else(|| {
                Value1::Unseen(format!(
                    "the measurement {} does not give it",
                    t.measurement
                ))
            }),
            Err(e) => Value1::Unseen(format!("{e:#}")),
        };
        let (value, floor, why) = match value {
            Value1::Seen { value, floor } => (Some(value), Some(floor), None),
            Value1::Unseen(why) => (None, None, Some(why)),
        };
        let reached = value.is_some_and(|v| match t.want {
            Want::AtMost => v <= t.target,
            Want::AtLeast => v >= t.target,
        });
        let over = |(v, f): (f64, f64)| (f > 0.0).then(|| round(v / f));
        Figure {
            name: t.name,
            what: t.what,
            unit: t.unit,
            value: value.map(round),
            want: t.want,
            target: t.target,
            reached,
            floor: floor.map(round),
            floor_is: t.floor,
            over_floor: value.zip(floor).and_then(over),
            why,
            load,
            failed: value.is_none(),
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.want == Want::AtMost {
            "<="
        } else {
            ">="
        };
        let Some(value) = self.value else {
            let why = self.why.as_deref().unwrap_or("no reason is known");
            return write!(f, "FAILED   {}: {why}", self.name);
        };
        let word = if self.reached { "reached" } else { "MISSED " };
        write!(
            f,
            "{word}  {} {value} {} ({sign} {}",
            self.name, self.unit, self.target
        )?;
        match self.floor {
            Some(floor) => write!(f, "; floor {floor})"),
            None => write!(f, ")"),
        }
    }
}

/// The file.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: Machine,
    /// What was asked for.
    pub figures: Vec<Figure>,
    /// By measurement: all that was seen on the way.
    pub details: BTreeMap<String, Value>,
}

impl Report {
    /// Empty.
    pub fn new(machine: Machine) -> Report {
        Report {
            machine,
            figures: Vec::new(),
            details: BTreeMap::new(),
        }
    }

    /// Writes it in one step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let aside = path.with_extension("new");
        let mut text = serde_json::to_string_pretty(self).context("the report")?;
        text.push('\n');
        std::fs::write(&aside, text)
            .and_then(|()| std::fs::rename(&aside, path))
            .with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(name: &str) -> &'static Target {
        TARGETS.iter().find(|t| t.name == name).unwrap()
    }

    /// A figure that was not measured must never look like one that was reached.
    #[test]
    fn a_missing_figure_is_null_with_its_reason_and_not_reached() {
        let t = target("pause_idle_256_mib");
        let found = Found::default();
        let error = anyhow::anyhow!("no QEMU");
        for f in [
            Figure::new(t, Err(&error), [0.0; 3]),
            Figure::new(t, Ok(&found), [0.0; 3]),
        ] {
            assert!(
                f.failed && !f.reached && f.value.is_none() && f.why.is_some(),
                "{f:?}"
            );
            assert!(f.to_string().starts_with("FAILED"), "{f}");
        }
    }

    #[test]
    fn a_target_is_met_from_its_good_side() {
        let mut found = Found::default();
        found.seen("gate_throughput_ratio", 0.59, 10.0);
        found.seen("pause_idle_256_mib", 1.6, 0.8);
        let gate = Figure::new(target("gate_throughput_ratio"), Ok(&found), [0.0; 3]);
        assert!(
            !gate.reached && gate.to_string().starts_with("MISSED"),
            "{gate}"
        );
        let pause = Figure::new(target("pause_idle_256_mib"), Ok(&found), [0.0; 3]);
        assert!(pause.reached && pause.over_floor == Some(2.0), "{pause:?}");
    }
}
