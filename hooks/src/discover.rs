//! Which files of the folder are hooks.
//!
//! A hook runs with all our rights, so nobody but root (or the user that we run as) may have a say
//! in it: not in the file, and not in the folder.

use nix::unistd::geteuid;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The most entries of a folder that are looked at.
const MAX_ENTRIES: usize = 1000;

/// What a folder holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Found {
    /// The hooks, sorted by name.
    pub hooks: Vec<PathBuf>,
    /// What was skipped, and why.
    pub skipped: Vec<Skipped>,
}

/// Something in the folder that is no hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The file, or the folder itself.
    pub path: PathBuf,
    /// Why, and what to do.
    pub why: &'static str,
}

/// Reads the folder. One that does not exist is empty. Hidden files and editors' backups are passed
/// over without a word.
///
/// # Errors
/// Where the folder cannot be read.
pub fn discover(dir: &Path) -> io::Result<Found> {
    let mut found = Found::default();
    let meta = match fs::metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        r => r?,
    };
    if let Some(why) = untrusted(&meta) {
        found.skipped.push(Skipped {
            path: dir.to_owned(),
            why,
        });
        return Ok(found);
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir)?.take(MAX_ENTRIES) {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.starts_with(b".") || name.ends_with(b"~") {
            continue;
        }
        match unfit(&path) {
            None => found.hooks.push(path),
            Some(why) => found.skipped.push(Skipped { path, why }),
        }
    }
    Ok(found)
}

fn unfit(path: &Path) -> Option<&'static str> {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Some("it cannot be examined");
    };
    if !meta.is_file() {
        return Some("it is not a regular file (links are not followed: copy the file)");
    }
    if meta.mode() & 0o111 == 0 {
        return Some("it is not executable (chmod +x)");
    }
    untrusted(&meta)
}

fn untrusted(meta: &Metadata) -> Option<&'static str> {
    if meta.uid() != 0 && meta.uid() != geteuid().as_raw() {
        return Some("it does not belong to root (chown root)");
    }
    if meta.mode() & 0o002 != 0 {
        return Some("everybody may write it (chmod o-w)");
    }
    if meta.mode() & 0o020 != 0 && meta.gid() != 0 {
        return Some("a group other than root may write it (chmod g-w)");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    fn put(dir: &Path, name: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, "#!/bin/sh\n").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
        path
    }

    /// Only what root alone decides about is run.
    #[test]
    fn only_trusted_executables_in_order() {
        let dir = tempfile::tempdir().expect("a folder");
        let d = dir.path();
        let (b, a) = (put(d, "20-b", 0o755), put(d, "10-a", 0o700));
        put(d, ".hidden", 0o755);
        put(d, "10-a~", 0o755);
        put(d, "30-plain", 0o644);
        put(d, "40-open", 0o757);
        fs::create_dir(d.join("50-dir")).expect("a folder");
        symlink(&a, d.join("60-link")).expect("a link");
        let mut skipped = vec!["30-plain", "40-open", "50-dir", "60-link"];
        if geteuid().is_root() {
            chown(put(d, "70-foreign", 0o755), Some(12345), None).expect("chown");
            skipped.push("70-foreign");
        }
        let found = discover(d).expect("read");
        assert_eq!(found.hooks, [a, b]);
        let names: Vec<_> = found
            .skipped
            .iter()
            .map(|s| s.path.file_name().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, skipped);
    }

    #[test]
    fn a_folder_that_all_may_write_is_not_used_and_a_missing_one_is_empty() {
        let dir = tempfile::tempdir().expect("a folder");
        put(dir.path(), "a", 0o755);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("mode");
        let found = discover(dir.path()).expect("read");
        assert!(found.hooks.is_empty() && found.skipped.len() == 1);
        assert_eq!(
            discover(&dir.path().join("none")).expect("read"),
            Found::default()
        );
    }
}
