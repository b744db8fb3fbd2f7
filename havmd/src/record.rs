//! The durable record of a guest on disk: `STATE_DIR/guests/GUEST/{a,b}.rec`.
//!
//! [`RecordStore::persist`] returns when both copies are durable, and only then may the daemon do
//! what the record justifies. What is found at start is a [`Found`]: a record that cannot be
//! believed (damaged, another node's, another guest's, of another format) is told as such and
//! never taken for "there is none".

use crate::durable::{self, Loaded, TwoCopies};
use havm_core::event::Found;
use havm_core::ids::{GuestName, NodeId, Term};
use havm_core::record::Record;
use std::io;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"HAVM-REC";
/// Changes whenever an older havm would misread what this one writes.
const VERSION: u32 = 1;

/// A record could not be made durable. Nothing may be done or said on its strength.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot write the record of guest {guest} in {}: {source}; nothing is done on its strength until the disk works again",
    folder.display()
)]
pub struct RecordError {
    /// The guest.
    pub guest: GuestName,
    /// Where its record lives.
    pub folder: PathBuf,
    /// The system's reason.
    pub source: io::Error,
}

/// What was found at start.
#[derive(Debug, Clone, PartialEq)]
pub struct Opened {
    /// For the engine.
    pub found: Found,
    /// Damage of one copy that was healed from the other; for a person.
    pub warnings: Vec<String>,
}

/// The record of one guest. One daemon at a time has it open.
#[derive(Debug)]
pub struct RecordStore {
    guest: GuestName,
    folder: PathBuf,
    copies: Option<TwoCopies>,
}

impl RecordStore {
    /// The folder of a guest's lasting state; [`RecordStore::open`] makes it.
    pub fn folder(state_dir: &Path, guest: &GuestName) -> PathBuf {
        state_dir.join("guests").join(guest.as_str())
    }

    /// Opens a guest's record; `owner` is this node's id.
    pub fn open(state_dir: &Path, guest: &GuestName, owner: NodeId) -> (Self, Opened) {
        let folder = Self::folder(state_dir, guest);
        let opened = durable::make_folder(&folder)
            .and_then(|()| TwoCopies::open(&folder, "rec", MAGIC, VERSION));
        let mut store = RecordStore {
            guest: guest.clone(),
            folder,
            copies: None,
        };
        let unusable = |term, why: String| Found::Unusable {
            term,
            why: format!(
                "the record of guest {guest} in {} cannot be believed: {why}; this node makes no claim and waits for the peer to be primary",
                Self::folder(state_dir, guest).display()
            ),
        };
        let (copies, loaded) = match opened {
            Ok(x) => x,
            Err(e) => {
                let found = unusable(Term(0), format!("it could not be read or healed: {e}"));
                return (
                    store,
                    Opened {
                        found,
                        warnings: Vec::new(),
                    },
                );
            }
        };
        store.copies = Some(copies);
        let (found, warnings) = match loaded {
            Loaded::Absent => (Found::Absent, Vec::new()),
            Loaded::Bad { why } => (unusable(Term(0), why), Vec::new()),
            Loaded::Good { payload, warnings } => {
                match serde_json::from_slice::<Record>(&payload) {
                    Err(e) => (
                        unusable(Term(0), format!("its content is not a record: {e}")),
                        warnings,
                    ),
                    Ok(r) => {
                        let found = match fault(&r, guest, owner) {
                            Some(why) => unusable(r.term, why),
                            None => Found::Loaded(r),
                        };
                        (found, warnings)
                    }
                }
            }
        };
        (store, Opened { found, warnings })
    }

    /// Makes a record durable in both copies.
    pub fn persist(&mut self, record: &Record) -> Result<(), RecordError> {
        self.try_persist(record)
            .map_err(|source| self.error(source))
    }

    fn try_persist(&mut self, record: &Record) -> io::Result<()> {
        let payload = serde_json::to_vec(record)?;
        self.copies()?.store(&payload)
    }

    /// Removes the record: the guest is no longer protected. The folder stays, with what others
    /// keep in it.
    pub fn forget(&mut self) -> Result<(), RecordError> {
        self.copies()
            .and_then(TwoCopies::clear)
            .map_err(|source| self.error(source))
    }

    /// Opens again where the folder could not be used at start. What is in the files by then is
    /// not believed any more than before; only the numbers go on from there.
    fn copies(&mut self) -> io::Result<&mut TwoCopies> {
        if self.copies.is_none() {
            durable::make_folder(&self.folder)?;
            self.copies = Some(TwoCopies::open(&self.folder, "rec", MAGIC, VERSION)?.0);
        }
        self.copies
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn error(&self, source: io::Error) -> RecordError {
        RecordError {
            guest: self.guest.clone(),
            folder: self.folder.clone(),
            source,
        }
    }
}

/// Why a readable record is not obeyed.
fn fault(r: &Record, guest: &GuestName, owner: NodeId) -> Option<String> {
    if r.owner != owner {
        Some(format!(
            "node {} wrote it, this is node {owner}: a disk or folder was moved or restored from another machine",
            r.owner
        ))
    } else if r.guest != *guest {
        Some(format!("it is the record of guest {}", r.guest))
    } else if r.basis > r.term {
        Some(format!(
            "its basis {} is above its term {}",
            r.basis, r.term
        ))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use havm_core::ids::{GenId, LifeId, Lives};
    use havm_core::record::{Arbiter, Generation, Intent, Role, RoleStatus};
    use std::fs;

    const ME: NodeId = NodeId([7; 16]);

    fn guest() -> GuestName {
        "web".parse().unwrap()
    }

    fn record(term: u64) -> Record {
        Record {
            guest: guest(),
            owner: ME,
            term: Term(term),
            basis: Term(term),
            role: Role::Protected,
            status: RoleStatus::Active,
            arbiter: Arbiter::Fence,
            lives: Some(Lives {
                mine: LifeId([1; 16]),
                peer: LifeId([2; 16]),
            }),
            generation: Generation {
                current: GenId([3; 16]),
                parent: GenId([4; 16]),
            },
            cold: false,
            valid: true,
            intent: Intent::Run,
        }
    }

    #[test]
    fn what_was_persisted_is_found_and_what_was_forgotten_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let (mut s, o) = RecordStore::open(dir.path(), &guest(), ME);
        assert_eq!(o.found, Found::Absent);
        for t in 1..4 {
            s.persist(&record(t)).unwrap();
        }
        let (mut s, o) = RecordStore::open(dir.path(), &guest(), ME);
        assert_eq!(
            o,
            Opened {
                found: Found::Loaded(record(3)),
                warnings: vec![]
            }
        );
        s.forget().unwrap();
        assert_eq!(
            RecordStore::open(dir.path(), &guest(), ME).1.found,
            Found::Absent
        );
    }

    #[test]
    fn a_persist_stopped_anywhere_never_forgets_what_was_promised_before() {
        for n in 0..10 {
            let dir = tempfile::tempdir().unwrap();
            let (mut s, _) = RecordStore::open(dir.path(), &guest(), ME);
            s.persist(&record(1)).unwrap();
            s.copies
                .as_mut()
                .unwrap()
                .set_probe(durable::testing::probe);
            durable::testing::stop_at(n);
            s.persist(&record(2)).unwrap_err();
            // A failed one may be followed by another attempt before any restart.
            durable::testing::stop_at(u32::MAX);
            if n % 2 == 0 {
                s.persist(&record(3)).unwrap();
            }
            let (_, o) = RecordStore::open(dir.path(), &guest(), ME);
            let Found::Loaded(r) = o.found else {
                panic!("step {n}: {:?}", o.found)
            };
            if n % 2 == 0 {
                assert_eq!(r, record(3));
            } else {
                assert!(r == record(1) || r == record(2), "step {n}");
            }
        }
    }

    #[test]
    fn a_foreign_or_damaged_record_makes_no_claim_and_tells_the_term_where_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let (mut s, _) = RecordStore::open(dir.path(), &guest(), ME);
        s.persist(&record(5)).unwrap();
        let (_, o) = RecordStore::open(dir.path(), &guest(), NodeId([8; 16]));
        assert!(
            matches!(&o.found, Found::Unusable { term: Term(5), why } if why.contains("moved or restored")),
            "{o:?}"
        );
        for f in ["a.rec", "b.rec"] {
            fs::write(RecordStore::folder(dir.path(), &guest()).join(f), b"\0\0\0").unwrap();
        }
        let (mut s, o) = RecordStore::open(dir.path(), &guest(), ME);
        assert!(
            matches!(&o.found, Found::Unusable { term: Term(0), .. }),
            "{o:?}"
        );
        // Once it has rejoined, its new record is good again.
        s.persist(&record(6)).unwrap();
        let (_, o) = RecordStore::open(dir.path(), &guest(), ME);
        assert_eq!(o.found, Found::Loaded(record(6)));
    }

    #[test]
    fn an_unwritable_folder_is_an_error_not_an_absent_record() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("guests"),
            b"a file where a folder should be",
        )
        .unwrap();
        let (mut s, o) = RecordStore::open(dir.path(), &guest(), ME);
        assert!(matches!(o.found, Found::Unusable { .. }), "{o:?}");
        let e = s.persist(&record(1)).unwrap_err().to_string();
        assert!(e.contains("cannot write the record of guest web"), "{e}");
    }
}
