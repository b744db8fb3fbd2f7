//! What happened, for people: the log, `havm events`, and hooks.
//!
//! A bounded ring in memory, and an append-only file of JSON lines that is rotated by size. Losing
//! an event costs an explanation, never safety: a full disk is logged and forgotten.

use havm_core::command::{Notice, NoticeKind, Severity};
use havm_core::ids::{GuestName, Term};
use havm_hooks::Runner;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// Events kept in memory.
const RING: usize = 2000;
/// Size at which the file is moved aside; one old file is kept.
const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts up from the daemon's start.
    pub seq: u64,
    /// Milliseconds since 1970, UTC.
    pub at_ms: u64,
    /// The guest; none for the host's own.
    pub guest: Option<GuestName>,
    /// What: a name of the hooks' catalogue.
    pub kind: String,
    /// How much it matters.
    pub severity: Severity,
    /// The term when it happened.
    pub term: Term,
    /// Plain words.
    pub text: String,
}

/// The log of events.
pub struct EventLog {
    ring: VecDeque<Entry>,
    next: u64,
    file: Option<PathBuf>,
    live: broadcast::Sender<Entry>,
    hooks: Option<Runner>,
}

impl EventLog {
    /// With this file; its last events are read back into the ring.
    pub fn open(file: Option<PathBuf>) -> EventLog {
        let mut ring = VecDeque::new();
        let text = file
            .as_ref()
            .and_then(|f| {
                crate::durable::read_bounded(f, 2 * MAX_FILE_BYTES as usize)
                    .ok()
                    .flatten()
            })
            .unwrap_or_default();
        for line in text.split(|b| *b == b'\n').rev().take(RING) {
            // A torn last line is what a power cut leaves.
            if let Ok(e) = serde_json::from_slice::<Entry>(line) {
                ring.push_front(e);
            }
        }
        if let (Some(f), Some(last)) = (&file, text.last())
            && *last != b'\n'
            && let Err(e) = OpenOptions::new()
                .append(true)
                .open(f)
                .and_then(|mut f| f.write_all(b"\n"))
        {
            tracing::warn!(error = %e, "a torn line in the event file could not be ended");
        }
        let next = ring.back().map_or(1, |e| e.seq + 1);
        EventLog {
            ring,
            next,
            file,
            live: broadcast::channel(256).0,
            hooks: None,
        }
    }

    /// Gives every event from now on to these hooks.
    pub fn set_hooks(&mut self, hooks: Runner) {
        self.hooks = Some(hooks);
    }

    /// Takes an engine's notice.
    pub fn add(&mut self, guest: Option<&GuestName>, n: &Notice) -> Entry {
        self.put(guest, kind_name(n.kind), n.severity, n.term, &n.text)
    }

    /// Takes an event: log, ring, file, followers, hooks.
    pub fn put(
        &mut self,
        guest: Option<&GuestName>,
        kind: String,
        severity: Severity,
        term: Term,
        text: &str,
    ) -> Entry {
        let who = guest.map_or("-", GuestName::as_str);
        match severity {
            Severity::Info => tracing::info!(guest = who, term = term.0, kind, "{text}"),
            Severity::Warning => tracing::warn!(guest = who, term = term.0, kind, "{text}"),
            Severity::Alarm => tracing::error!(guest = who, term = term.0, kind, "{text}"),
        }
        let entry = Entry {
            seq: self.next,
            at_ms: wall_ms(),
            guest: guest.cloned(),
            kind,
            severity,
            term,
            text: text.to_owned(),
        };
        self.next += 1;
        if self.ring.len() == RING {
            self.ring.pop_front();
        }
        self.ring.push_back(entry.clone());
        if let Err(e) = self.write(&entry) {
            tracing::warn!(error = %e, "an event could not be kept on disk");
        }
        if let (Some(hooks), Ok(json)) = (&self.hooks, serde_json::to_value(&entry)) {
            hooks.fire(&entry.kind, guest.map(GuestName::as_str), &json);
        }
        // Nobody may be following.
        let _ = self.live.send(entry.clone());
        entry
    }

    /// The last `n`, oldest first, of one guest or of all.
    pub fn last(&self, n: usize, guest: Option<&GuestName>) -> Vec<Entry> {
        let mut v: Vec<Entry> = self
            .ring
            .iter()
            .rev()
            .filter(|e| guest.is_none() || e.guest.as_ref() == guest)
            .take(n)
            .cloned()
            .collect();
        v.reverse();
        v
    }

    /// Events as they come. A slow follower loses the oldest.
    pub fn follow(&self) -> broadcast::Receiver<Entry> {
        self.live.subscribe()
    }

    fn write(&self, entry: &Entry) -> std::io::Result<()> {
        let Some(path) = &self.file else {
            return Ok(());
        };
        if std::fs::metadata(path).is_ok_and(|m| m.len() > MAX_FILE_BYTES) {
            std::fs::rename(path, path.with_extension("jsonl.1"))?;
        }
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)?
            .write_all(&line)
    }
}

/// The stable name of a kind.
fn kind_name(kind: NoticeKind) -> String {
    let name = serde_json::to_value(kind).ok();
    name.and_then(|v| v.as_str().map(str::to_owned))
        .unwrap_or_else(|| "warning".into())
}

/// Milliseconds since 1970.
pub fn wall_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(text: &str) -> Notice {
        Notice {
            kind: NoticeKind::Solo,
            severity: Severity::Info,
            term: Term(1),
            text: text.into(),
        }
    }

    /// Events survive a restart, also behind a torn line, and numbers go on.
    #[test]
    fn events_survive_a_restart() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("events.jsonl");
        let web: GuestName = "web".parse().expect("name");
        let mut log = EventLog::open(Some(file.clone()));
        log.add(Some(&web), &notice("one"));
        log.add(None, &notice("two"));
        let mut f = OpenOptions::new().append(true).open(&file).expect("open");
        f.write_all(b"{\"seq\":3,\"at").expect("torn");
        drop(f);
        let mut log = EventLog::open(Some(file.clone()));
        assert_eq!(log.add(None, &notice("three")).seq, 3);
        let log = EventLog::open(Some(file));
        let texts: Vec<_> = log.last(10, None).into_iter().map(|e| e.text).collect();
        assert_eq!(texts, ["one", "two", "three"]);
        assert_eq!(log.last(10, Some(&web)).len(), 1);
    }

    /// The ring and a slow follower are bounded.
    #[test]
    fn memory_is_bounded() {
        let mut log = EventLog::open(None);
        let _slow = log.follow();
        for i in 0..RING + 50 {
            log.add(None, &notice(&i.to_string()));
        }
        assert_eq!(log.last(usize::MAX, None).len(), RING);
        assert_eq!(log.last(1, None)[0].text, (RING + 49).to_string());
    }
}
