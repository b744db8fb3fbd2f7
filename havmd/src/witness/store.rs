//! The book on disk: one file, replaced and synced before every answer that rests on it.
//!
//! One copy, not two: falling back to an older copy is what a witness must never do. A damaged
//! book is not believed; the operator makes a new one (another incarnation) and enrols again.

use super::register::Book;
use crate::durable;
use crate::identity_store::{Myself, StoreError, file_error};
use crate::random::RandomId;
use havm_core::ids::Incarnation;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"HAVM-WIT";
const VERSION: u32 = 1;
const REMEDY: &str = "let `havm witness --reset` make a new one, then enrol both nodes again (`havm pair --witness`)";

/// The book, and the right to write it.
#[derive(Debug)]
pub struct BookStore {
    path: PathBuf,
    book: Book,
    broken: bool,
    _lock: Flock<File>,
}

impl BookStore {
    /// Opens the book in a folder, or makes an empty one with a new incarnation.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let lock = lock(dir)?;
        let path = dir.join("book");
        let max = durable::MAX_PAYLOAD_BYTES + 1024;
        let bytes = durable::read_bounded(&path, max).map_err(file_error("read", &path))?;
        let damaged = |why: String| StoreError::Damaged {
            path: path.clone(),
            why,
            remedy: REMEDY,
        };
        let book = match bytes {
            None => Book::new(Incarnation::random().map_err(file_error("make", &path))?),
            Some(bytes) => {
                let (_, payload) = durable::unseal(MAGIC, VERSION, &bytes).map_err(damaged)?;
                serde_json::from_slice(&payload).map_err(|e| damaged(e.to_string()))?
            }
        };
        let store = BookStore {
            path,
            book,
            broken: false,
            _lock: lock,
        };
        // What is believed must be durable, also where an earlier sync failed.
        let book = store.book.clone();
        store
            .keep(&book)
            .map_err(file_error("write", &store.path))?;
        Ok(store)
    }

    /// Throws the book away: the next start has a new incarnation and knows nobody.
    pub fn reset(dir: &Path) -> Result<(), StoreError> {
        let _lock = lock(dir)?;
        let path = dir.join("book");
        durable::remove(&path).map_err(file_error("remove", &path))
    }

    /// The book as it is on disk.
    pub fn book(&self) -> &Book {
        &self.book
    }

    /// Changes the book; what `change` returns may be spoken when this returns `Ok`. After a
    /// write that failed nothing is known of the file, so nothing more is answered until a restart.
    pub fn update<T>(&mut self, change: impl FnOnce(&mut Book) -> T) -> io::Result<T> {
        if self.broken {
            return Err(io::Error::other(
                "an earlier write of the book failed; restart the witness when its disk works again",
            ));
        }
        let mut book = self.book.clone();
        let out = change(&mut book);
        if book != self.book {
            if let Err(e) = self.keep(&book) {
                self.broken = true;
                return Err(e);
            }
            self.book = book;
        }
        Ok(out)
    }

    fn keep(&self, book: &Book) -> io::Result<()> {
        let payload = serde_json::to_vec(book)?;
        if payload.len() > durable::MAX_PAYLOAD_BYTES {
            return Err(io::Error::other("the book is too large"));
        }
        durable::replace(
            &self.path,
            &durable::seal(MAGIC, VERSION, book.version, &payload),
        )
    }
}

/// The witness's own key and certificate live in its state folder like a node's.
pub fn identity(dir: &Path) -> Result<Myself, StoreError> {
    Myself::load_or_create(dir)
}

fn lock(dir: &Path) -> Result<Flock<File>, StoreError> {
    durable::make_folder(dir).map_err(file_error("make", dir))?;
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(file_error("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
        let source = match e {
            nix::errno::Errno::EWOULDBLOCK => {
                io::Error::other("another witness uses this folder; stop it first")
            }
            e => e.into(),
        };
        file_error("lock", &path)(source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_book_lasts_and_two_witnesses_cannot_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = BookStore::open(dir.path()).unwrap();
        let incarnation = s.book().incarnation;
        s.update(|b| b.version = 7).unwrap();
        let e = BookStore::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("another witness"), "{e}");
        drop(s);
        let s = BookStore::open(dir.path()).unwrap();
        assert_eq!((s.book().incarnation, s.book().version), (incarnation, 7));
        drop(s);
        BookStore::reset(dir.path()).unwrap();
        let s = BookStore::open(dir.path()).unwrap();
        assert_ne!(s.book().incarnation, incarnation);
    }

    #[test]
    fn a_damaged_book_is_not_replaced_by_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        drop(BookStore::open(dir.path()).unwrap());
        let path = dir.path().join("book");
        let mut bytes = fs::read(&path).unwrap();
        bytes[40] ^= 1;
        fs::write(&path, bytes).unwrap();
        let e = BookStore::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("damaged") && e.contains("--reset"), "{e}");
    }

    /// A grant that could not be made durable is not spoken of, and neither is anything after it.
    #[test]
    fn after_a_failed_write_nothing_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = BookStore::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join("book.tmp")).unwrap();
        s.update(|b| b.version = 7).unwrap_err();
        fs::remove_dir(dir.path().join("book.tmp")).unwrap();
        assert_eq!(s.book().version, 0);
        let e = s.update(|b| b.version).unwrap_err().to_string();
        assert!(e.contains("restart"), "{e}");
    }
}
