//! Files that survive a kill at any point: replace one atomically, or keep two copies of it.
//!
//! ```text
//!   replace:    tmp ─write─fsync─> rename over the old one ─> fsync the folder
//!   TwoCopies:  replace(a), then replace(b); each = magic, version, counter, payload, checksum
//! ```
//!
//! Nothing is spoken before *both* copies are durable, so each single copy is always good enough
//! to fall back to: when `a` is lost, `b` holds the last value that was spoken of, or the one that
//! `a` held. Opening heals: the value that is believed stands in both copies before it is used.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The largest payload that is written or read, bytes.
pub const MAX_PAYLOAD_BYTES: usize = 4 * 1024 * 1024;

const HEAD_BYTES: usize = 8 + 4 + 8 + 4;
const SUM_BYTES: usize = 32;

/// The steps of [`replace`], for tests that stop before any one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Make the file aside.
    Create,
    /// Write it (a kill here may leave a part of it).
    Write,
    /// fsync it.
    SyncFile,
    /// Rename it over the old one.
    Rename,
    /// fsync the folder.
    SyncFolder,
}

/// Asked before each step; an error ends the work there as a failing disk would.
pub type Probe = fn(Step) -> io::Result<()>;

fn go_on(_: Step) -> io::Result<()> {
    Ok(())
}

/// Replaces `path` with `bytes`, mode 0600: after `Ok` the new content is durable, after `Err`
/// or a kill it is the old or the new one, never a mixture. The folder must exist.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_probed(path, bytes, go_on)
}

fn replace_probed(path: &Path, bytes: &[u8], probe: Probe) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut aside = path.as_os_str().to_owned();
    aside.push(".tmp");
    let aside = PathBuf::from(aside);
    probe(Step::Create)?;
    // A stale one may have another owner or mode: never write into it.
    remove_if_there(&aside)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)?;
    if let Err(e) = probe(Step::Write) {
        file.write_all(&bytes[..bytes.len() / 2])?;
        return Err(e);
    }
    file.write_all(bytes)?;
    probe(Step::SyncFile)?;
    file.sync_all()?;
    probe(Step::Rename)?;
    fs::rename(&aside, path)?;
    probe(Step::SyncFolder)?;
    sync_folder(folder)
}

/// Removes a file durably; it need not be there.
pub fn remove(path: &Path) -> io::Result<()> {
    remove_if_there(path)?;
    path.parent().map_or(Ok(()), sync_folder)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Makes a folder (mode 0700) and its parents; what was made is durable.
pub fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_folder(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    path.parent().map_or(Ok(()), sync_folder)
}

/// Reads a whole file of at most `max` bytes; `None` where there is none.
pub fn read_bounded(path: &Path, max: usize) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut bytes = Vec::new();
    file.take(max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > max {
        let why = format!("larger than {max} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(Some(bytes))
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    File::open(path)?.sync_all()
}

/// A payload with its kind, format, number and checksum around it, as it stands in a file.
pub fn seal(magic: [u8; 8], version: u32, counter: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + payload.len() + SUM_BYTES);
    bytes.extend(magic);
    bytes.extend(version.to_le_bytes());
    bytes.extend(counter.to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    bytes.extend(blake3::hash(&bytes).as_bytes());
    bytes
}

/// Takes apart what [`seal`] made: the number and the payload, or why it is not believed.
pub fn unseal(magic: [u8; 8], version: u32, bytes: &[u8]) -> Result<(u64, Vec<u8>), String> {
    let short = || "too short: cut off".to_owned();
    let (body, sum) = bytes.split_last_chunk::<SUM_BYTES>().ok_or_else(short)?;
    let (found_magic, rest) = body.split_first_chunk::<8>().ok_or_else(short)?;
    if *found_magic != magic {
        return Err("not the file that havm keeps here".into());
    }
    if blake3::hash(body) != *sum {
        return Err("its checksum is wrong: damaged".into());
    }
    let (found_version, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let found_version = u32::from_le_bytes(*found_version);
    if found_version != version {
        return Err(format!(
            "format {found_version}, this havm knows format {version}: another version wrote it"
        ));
    }
    let (counter, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (len, payload) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    if u32::from_le_bytes(*len) as usize != payload.len() {
        return Err("its length is wrong: damaged".into());
    }
    Ok((u64::from_le_bytes(*counter), payload.to_vec()))
}

/// What two copies say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// There is no copy.
    Absent,
    /// The newest good payload, which both copies hold now.
    Good {
        /// As it was written.
        payload: Vec<u8>,
        /// What was wrong with a copy, for a person. Healed.
        warnings: Vec<String>,
    },
    /// There is something, and none of it can be believed.
    Bad {
        /// For a person.
        why: String,
    },
}

/// A value kept in two files.
#[derive(Debug)]
pub struct TwoCopies {
    paths: [PathBuf; 2],
    magic: [u8; 8],
    version: u32,
    counter: u64,
    probe: Probe,
}

enum Copy {
    Absent,
    Good { counter: u64, payload: Vec<u8> },
    Bad(String),
}

impl TwoCopies {
    /// Opens `folder/a.EXT` and `folder/b.EXT`, and heals what one of them lost. An error means
    /// that a believed value could not be written back: nothing may be claimed by it.
    pub fn open(
        folder: &Path,
        ext: &str,
        magic: [u8; 8],
        version: u32,
    ) -> io::Result<(Self, Loaded)> {
        let mut store = TwoCopies {
            paths: ["a", "b"].map(|n| folder.join(format!("{n}.{ext}"))),
            magic,
            version,
            counter: 0,
            probe: go_on,
        };
        let loaded = store.load()?;
        Ok((store, loaded))
    }

    /// How often the value was written, failures included; grows for ever.
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// Writes both copies. After an error nothing is known but that a later load finds this
    /// payload or the one before.
    pub fn store(&mut self, payload: &[u8]) -> io::Result<()> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            let why = format!("{} bytes are too many to keep", payload.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        // Counted before the attempt: a failed one may have left its number in a copy.
        self.counter += 1;
        let bytes = seal(self.magic, self.version, self.counter, payload);
        for path in &self.paths {
            replace_probed(path, &bytes, self.probe)?;
        }
        Ok(())
    }

    /// Removes both copies, durably.
    pub fn clear(&mut self) -> io::Result<()> {
        // The first copy goes last: it is never the older one.
        remove(&self.paths[1])?;
        remove(&self.paths[0])
    }

    fn load(&mut self) -> io::Result<Loaded> {
        let copies = [self.read(0), self.read(1)];
        let mut warnings = Vec::new();
        for (path, copy) in self.paths.iter().zip(&copies) {
            if let Copy::Bad(why) = copy {
                warnings.push(format!("{}: {why}", path.display()));
            }
        }
        use Copy::{Absent, Bad, Good};
        let (counter, payload, heal) = match copies {
            [Absent, Absent] => return Ok(Loaded::Absent),
            [Bad(_), Bad(_) | Absent] | [Absent, Bad(_)] => {
                return Ok(Loaded::Bad {
                    why: warnings.join("; "),
                });
            }
            [
                Good {
                    counter: x,
                    payload: p,
                },
                Good {
                    counter: y,
                    payload: q,
                },
            ] => {
                if x == y && p != q {
                    return Ok(Loaded::Bad {
                        why: format!(
                            "{} and its second copy have the same number {x} and different contents",
                            self.paths[0].display()
                        ),
                    });
                }
                // One step apart is what a kill between both copies leaves; more is a lost write.
                if x.abs_diff(y) > 1 {
                    warnings.push(format!(
                        "{}: the copies are {} writes apart: this disk lost writes, or a copy was put back by hand; the newer one is used",
                        self.paths[0].display(),
                        x.abs_diff(y)
                    ));
                }
                if x >= y { (x, p, x != y) } else { (y, q, true) }
            }
            [Good { counter, payload }, other] | [other, Good { counter, payload }] => {
                // A kill in the very first write leaves one copy: that is no fault.
                if matches!(other, Absent) && counter > 1 {
                    warnings.push(format!(
                        "{}: one of both copies is gone; the other one is used",
                        self.paths[0].display()
                    ));
                }
                (counter, payload, true)
            }
        };
        self.counter = counter;
        if heal {
            self.store(&payload)?;
        }
        Ok(Loaded::Good { payload, warnings })
    }

    fn read(&self, which: usize) -> Copy {
        let max = HEAD_BYTES + MAX_PAYLOAD_BYTES + SUM_BYTES;
        match read_bounded(&self.paths[which], max) {
            Ok(None) => Copy::Absent,
            Ok(Some(bytes)) => match unseal(self.magic, self.version, &bytes) {
                Ok((counter, payload)) => Copy::Good { counter, payload },
                Err(why) => Copy::Bad(why),
            },
            Err(e) => Copy::Bad(format!("cannot be read: {e}")),
        }
    }
}

#[cfg(test)]
impl TwoCopies {
    pub(crate) fn set_probe(&mut self, probe: Probe) {
        self.probe = probe;
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Stops a store before its n-th step, as a kill or a failing disk would.
    use super::*;
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<u32> = const { Cell::new(u32::MAX) };
    }

    /// The next writes of this thread end before step number `n` (from 0).
    pub(crate) fn stop_at(n: u32) {
        LEFT.set(n);
    }

    pub(crate) fn probe(_: Step) -> io::Result<()> {
        match LEFT.get() {
            0 => Err(io::Error::other("stopped by the test")),
            u32::MAX => Ok(()),
            n => {
                LEFT.set(n - 1);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: [u8; 8] = *b"HAVMTEST";

    fn open(dir: &Path) -> (TwoCopies, Loaded) {
        TwoCopies::open(dir, "x", MAGIC, 1).unwrap()
    }

    fn payload(l: &Loaded) -> &[u8] {
        match l {
            Loaded::Good { payload, .. } => payload,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_stop_before_any_step_leaves_the_old_or_the_new_value() {
        let mut finished = false;
        for n in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            let (mut s, l) = open(dir.path());
            assert_eq!(l, Loaded::Absent);
            s.store(b"old").unwrap();
            s.set_probe(testing::probe);
            testing::stop_at(n);
            let result = s.store(b"new value");
            testing::stop_at(u32::MAX);
            let (mut s, l) = open(dir.path());
            if result.is_ok() {
                assert_eq!(payload(&l), b"new value");
                finished = true;
            } else {
                assert!(
                    [&b"old"[..], b"new value"].contains(&payload(&l)),
                    "step {n}"
                );
            }
            // What was loaded stands in both copies: losing either one changes nothing.
            let was = payload(&l).to_vec();
            for copy in ["a.x", "b.x"] {
                fs::write(dir.path().join(copy), b"garbage").unwrap();
                assert_eq!(payload(&open(dir.path()).1), was, "step {n}, {copy}");
            }
            s.store(b"next").unwrap();
            assert_eq!(payload(&open(dir.path()).1), b"next");
        }
        assert!(finished, "20 steps were not enough for one write");
    }

    #[test]
    fn the_first_write_stopped_early_leaves_nothing_or_the_value() {
        for n in 0..10 {
            let dir = tempfile::tempdir().unwrap();
            let (mut s, _) = open(dir.path());
            s.set_probe(testing::probe);
            testing::stop_at(n);
            s.store(b"first").unwrap_err();
            testing::stop_at(u32::MAX);
            match open(dir.path()).1 {
                Loaded::Absent => {}
                l => {
                    assert_eq!(payload(&l), b"first");
                    assert!(matches!(l, Loaded::Good { warnings, .. } if warnings.is_empty()));
                }
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut s, _) = open(dir.path());
        s.store(b"value").unwrap();
        let good = fs::read(dir.path().join("a.x")).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal(MAGIC, 1, &bytes).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(unseal(MAGIC, 1, &good[..len]).is_err(), "length {len}");
        }
    }

    #[test]
    fn a_damaged_copy_is_named_and_two_are_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut s, _) = open(dir.path());
        s.store(b"value").unwrap();
        fs::write(
            dir.path().join("a.x"),
            b"HAVMTESTgarbage, long enough to be looked at in full",
        )
        .unwrap();
        let Loaded::Good { payload, warnings } = open(dir.path()).1 else {
            panic!("one copy is good")
        };
        assert_eq!(payload, b"value");
        assert!(warnings[0].contains("a.x: its checksum"), "{warnings:?}");
        for f in ["a.x", "b.x"] {
            fs::write(dir.path().join(f), b"").unwrap();
        }
        assert!(matches!(open(dir.path()).1, Loaded::Bad { why } if why.contains("cut off")));
        fs::remove_file(dir.path().join("b.x")).unwrap();
        assert!(matches!(open(dir.path()).1, Loaded::Bad { .. }));
    }

    #[test]
    fn the_newer_copy_counts_and_a_large_distance_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (mut s, _) = open(dir.path());
        s.store(b"one").unwrap();
        let old = fs::read(dir.path().join("a.x")).unwrap();
        s.store(b"two").unwrap();
        s.store(b"three").unwrap();
        fs::write(dir.path().join("a.x"), old).unwrap();
        let Loaded::Good { payload, warnings } = open(dir.path()).1 else {
            panic!("both copies are good")
        };
        assert_eq!(payload, b"three");
        assert!(warnings[0].contains("2 writes apart"), "{warnings:?}");
    }

    #[test]
    fn another_format_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let (mut s, _) = TwoCopies::open(dir.path(), "x", MAGIC, 2).unwrap();
        s.store(b"value").unwrap();
        let Loaded::Bad { why } = open(dir.path()).1 else {
            panic!("a later format must not be read")
        };
        assert!(why.contains("format 2"), "{why}");
    }
}
