//! The devices' state as bytes: QEMU writes it into a memory file of ours.
//!
//! `xen-save-devices-state` with `live: false` saves the devices and nothing else; every QEMU build
//! has it, Xen or not. The descriptor set that QEMU keeps shares its offset with ours, so the
//! offset is set to 0 before a save and tells the length after it.

use crate::error::CaptureError;
use havm_qmp::{Qmp, Ticket};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// How our descriptor set is labelled in QEMU.
const LABEL: &str = "havm-device-state";
/// The first bytes of each save: magic and version 3.
const MAGIC: [u8; 8] = [0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3];
/// More than any device state (a q35 guest's is 0.1 MB; each virtio queue adds little).
const MAX_BYTES: u64 = 256 << 20;

/// The memory file and QEMU's end of it.
pub(crate) struct DeviceState {
    /// Shares its offset with QEMU's descriptor; write-only.
    writer: File,
    reader: File,
    args: Value,
}

impl DeviceState {
    /// Makes the file and gives it to QEMU. Sets that a predecessor left are removed.
    pub(crate) fn new(qmp: &mut Qmp) -> Result<DeviceState, CaptureError> {
        let error = |what| move |source: io::Error| CaptureError::System { what, source };
        remove_old_sets(qmp)?;
        let memfd = memfd_create("havm-device-state", MFdFlags::MFD_CLOEXEC)
            .map_err(|e| error("make a memory file")(e.into()))?;
        let reader = File::from(memfd);
        // QEMU wants a descriptor whose mode is what it opens with, write-only; so a second one.
        let writer = OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{}", reader.as_raw_fd()))
            .map_err(error("open the memory file for writing"))?;
        let set = qmp.add_fd(&writer, LABEL)?;
        let args = json!({ "filename": format!("/dev/fdset/{set}"), "live": false });
        Ok(DeviceState {
            writer,
            reader,
            args,
        })
    }

    /// Sets back the file. Before `submit`, outside the pause.
    pub(crate) fn rewind(&mut self) -> Result<(), CaptureError> {
        self.writer
            .seek(SeekFrom::Start(0))
            .map(drop)
            .map_err(|source| CaptureError::System {
                what: "rewind the memory file",
                source,
            })
    }

    /// Orders the save.
    pub(crate) fn submit(&self, qmp: &mut Qmp) -> Result<Ticket, CaptureError> {
        Ok(qmp.submit("xen-save-devices-state", &self.args)?)
    }

    /// Reads what the last save wrote.
    pub(crate) fn read(&mut self, out: &mut Vec<u8>) -> Result<(), CaptureError> {
        let error = |source| CaptureError::System {
            what: "read the device state",
            source,
        };
        out.clear();
        let len = self.writer.stream_position().map_err(error)?;
        if len > MAX_BYTES {
            return Err(CaptureError::Answer(format!(
                "a device state of {len} bytes"
            )));
        }
        out.resize(len as usize, 0);
        self.reader.read_exact_at(out, 0).map_err(error)?;
        if !out.starts_with(&MAGIC) || out.last() != Some(&0) {
            return Err(CaptureError::Answer(
                "a device state without its magic or end mark".into(),
            ));
        }
        Ok(())
    }
}

fn remove_old_sets(qmp: &mut Qmp) -> Result<(), CaptureError> {
    let sets = qmp.execute("query-fdsets", Value::Null)?;
    for set in sets.as_array().into_iter().flatten() {
        let ours = set["fds"]
            .as_array()
            .is_some_and(|fds| fds.iter().any(|f| f["opaque"] == LABEL));
        if let (true, Some(id)) = (ours, set["fdset-id"].as_u64()) {
            qmp.remove_fd(id)?;
        }
    }
    Ok(())
}
