//! What holds bytes: a raw file or a block device behind a small trait, so that the crash tests
//! can put a recording shim in its place.
//!
//! Reads and writes go through the page cache; `flush` is `fdatasync`. After a flush has failed
//! the kernel forgets which pages were bad, so a [`Store`] that failed once must not be trusted to
//! flush again: the callers here keep that verdict (`DiskError::Failed`).

use crate::blocks::MAX_DISK_BYTES;
use crate::error::{DiskError, Result};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::unistd::{Whence, lseek};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Random-access bytes that can be made durable.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Its size, bytes.
    fn size(&self) -> io::Result<u64>;
    /// Reads exactly `buf.len()` bytes; past the end is `UnexpectedEof`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeroes; with `punch` it may become a hole.
    fn zero_at(&self, offset: u64, len: u64, punch: bool) -> io::Result<()>;
    /// Changes the size. Only for metadata and journals.
    fn set_size(&self, len: u64) -> io::Result<()>;
    /// Makes room for `len` bytes, so that later writes cannot run out of space. The size grows.
    fn reserve(&self, len: u64) -> io::Result<()>;
    /// Makes every finished write durable.
    fn flush(&self) -> io::Result<()>;
    /// The first range at or after `from` (and before `end`) that may hold something but zeroes;
    /// none when all of it is a hole.
    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>>;
}

/// A file or block device, locked against a second user.
#[derive(Debug)]
pub struct FileStore {
    file: Flock<File>,
    block_device: bool,
}

impl FileStore {
    /// Opens an existing guest disk, raw file or block device, and takes its lock.
    pub fn open_disk(path: &Path) -> Result<Self> {
        let s = Self::open(path, false)?;
        let size = s
            .size()
            .map_err(DiskError::io(format!("size of {}", path.display())))?;
        let unsuitable = |why: String| DiskError::Unsuitable {
            path: path.to_owned(),
            why,
        };
        if size == 0 || !size.is_multiple_of(512) || size > MAX_DISK_BYTES {
            return Err(unsuitable(format!(
                "its size of {size} bytes is not 512 to {MAX_DISK_BYTES} in whole sectors of 512; enlarge it with qemu-img resize"
            )));
        }
        let mut head = [0u8; 8];
        s.read_at(0, &mut head)
            .map_err(DiskError::io(format!("reading {}", path.display())))?;
        if head[..4] == *b"QFI\xfb" {
            return Err(unsuitable(
                "it is a qcow2 image, only raw ones can be; convert it with qemu-img convert -O raw".into(),
            ));
        }
        Ok(s)
    }

    /// Opens a metadata or journal file and takes its lock.
    pub fn open_side(path: &Path, create: bool) -> Result<Self> {
        Self::open(path, create)
    }

    fn open(path: &Path, create: bool) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(DiskError::io(format!("opening {}", path.display())))?;
        let kind = file
            .metadata()
            .map_err(DiskError::io(format!("opening {}", path.display())))?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Unsuitable {
                path: path.to_owned(),
                why: "it is neither a file nor a block device".into(),
            });
        }
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
                Errno::EWOULDBLOCK => DiskError::InUse(path.to_owned()),
                e => DiskError::Io {
                    what: format!("locking {}", path.display()),
                    source: e.into(),
                },
            })?;
        Ok(FileStore {
            file,
            block_device: kind.is_block_device(),
        })
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
        while len > 0 {
            let n = len.min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..n as usize], offset)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }
}

impl Store for FileStore {
    fn size(&self) -> io::Result<u64> {
        if self.block_device {
            Ok(lseek(&*self.file, 0, Whence::SeekEnd)? as u64)
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero_at(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        // PUNCH_HOLE reads back as zeroes on files and on block devices (man 2 fallocate).
        let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE
            | if punch {
                FallocateFlags::FALLOC_FL_PUNCH_HOLE
            } else {
                FallocateFlags::FALLOC_FL_ZERO_RANGE
            };
        match fallocate(&*self.file, mode, offset as i64, len as i64) {
            Ok(()) => Ok(()),
            // File systems without it, and block devices asked for odd ranges.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                self.write_zeroes(offset, len)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn set_size(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn reserve(&self, len: u64) -> io::Result<()> {
        match fallocate(&*self.file, FallocateFlags::empty(), 0, len as i64) {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                let have = self.size()?;
                if have < len {
                    self.file.set_len(len)
                } else {
                    Ok(())
                }
            }
            Err(e) => Err(e.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        if from >= end {
            return Ok(None);
        }
        // The file offset that this moves is used by nobody: all IO is positioned.
        let start = match lseek(&*self.file, from as i64, Whence::SeekData) {
            Ok(s) => s as u64,
            Err(Errno::ENXIO) => return Ok(None),
            // A store that cannot tell holes (block devices).
            Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ESPIPE) => return Ok(Some(from..end)),
            Err(e) => return Err(e.into()),
        };
        if start >= end {
            return Ok(None);
        }
        let stop = lseek(&*self.file, start as i64, Whence::SeekHole).map_or(end, |s| s as u64);
        Ok(Some(start..stop.min(end)))
    }
}
