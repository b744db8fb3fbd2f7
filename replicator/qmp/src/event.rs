//! QEMU's asynchronous events, typed as far as havm acts on them.

use serde_json::Value;

/// One event and its place in the stream of everything the monitor said.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Number of this message on its connection; replies count too. An event belongs before a
    /// reply exactly if its number is below [`crate::Qmp::reply_seq`] right after that reply.
    pub seq: u64,
    /// QEMU's wall clock at the event, in microseconds since 1970; 0 where QEMU gave none.
    pub at_us: u64,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// The vCPUs stopped.
    Stop,
    /// The vCPUs run again. Inside an epoch's pause and not our doing: that epoch is void.
    Resume,
    /// The guest was shut down.
    Shutdown {
        /// By the guest itself (not by an admin or a signal).
        guest: bool,
        /// QEMU's word for it: `guest-shutdown`, `host-qmp-quit`, `host-signal`...
        reason: String,
    },
    /// The guest was reset.
    Reset {
        /// By the guest itself.
        guest: bool,
        /// QEMU's word for it.
        reason: String,
    },
    /// The guest was asked to power down.
    Powerdown,
    /// The guest kernel crashed and said so.
    GuestPanicked {
        /// What QEMU did: `pause`, `poweroff`, `run`.
        action: String,
    },
    /// The emulated watchdog fired.
    Watchdog {
        /// What QEMU did: `reset`, `shutdown`, `pause`...
        action: String,
    },
    /// A migration's state changed (only with the `events` capability set).
    Migration {
        /// The new state, such as `completed` or `failed`.
        status: String,
    },
    /// A disk request failed.
    BlockIoError {
        /// The drive or device; empty for nodes without one.
        device: String,
        /// The block node.
        node: String,
        /// `read` or `write`.
        operation: String,
        /// `stop` (the guest stands), `report` or `ignore`.
        action: String,
        /// The error in words, if QEMU gave it.
        reason: String,
    },
    /// Any other event.
    Other {
        /// Its QMP name.
        name: String,
        /// Its data.
        data: Value,
    },
}

fn text(data: &Value, key: &str) -> String {
    data.get(key)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

/// Reads one message with an `event` member; `None` if its name is not a string.
pub(crate) fn parse(seq: u64, msg: &mut Value) -> Option<Event> {
    let name = msg.get("event")?.as_str()?.to_owned();
    let stamp = |k: &str| {
        msg.get("timestamp")
            .and_then(|t| t.get(k))
            .and_then(Value::as_u64)
    };
    let at_us = stamp("seconds")
        .unwrap_or(0)
        .saturating_mul(1_000_000)
        .saturating_add(stamp("microseconds").unwrap_or(0));
    let data = msg.get_mut("data").map(Value::take).unwrap_or(Value::Null);
    let guest = data.get("guest").and_then(Value::as_bool).unwrap_or(false);
    let kind = match name.as_str() {
        "STOP" => EventKind::Stop,
        "RESUME" => EventKind::Resume,
        "SHUTDOWN" => EventKind::Shutdown {
            guest,
            reason: text(&data, "reason"),
        },
        "RESET" => EventKind::Reset {
            guest,
            reason: text(&data, "reason"),
        },
        "POWERDOWN" => EventKind::Powerdown,
        "GUEST_PANICKED" => EventKind::GuestPanicked {
            action: text(&data, "action"),
        },
        "WATCHDOG" => EventKind::Watchdog {
            action: text(&data, "action"),
        },
        "MIGRATION" => EventKind::Migration {
            status: text(&data, "status"),
        },
        "BLOCK_IO_ERROR" => EventKind::BlockIoError {
            device: text(&data, "device"),
            node: text(&data, "node-name"),
            operation: text(&data, "operation"),
            action: text(&data, "action"),
            reason: text(&data, "reason"),
        },
        _ => EventKind::Other { name, data },
    };
    Some(Event { seq, at_us, kind })
}
