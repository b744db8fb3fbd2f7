//! The two taps: a persistent one that QEMU opens by name, and one in the bridge that is ours.
//!
//! Requests and flags: linux/if_tun.h.

use crate::error::{GateError, last};
use crate::iface::IfName;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const TUNSETOWNER: libc::Ioctl = 0x4004_54cc;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const IFF_TUN_EXCL: i32 = 0x8000;

const F_CSUM: libc::c_ulong = 0x01;
const F_TSO4: libc::c_ulong = 0x02;
const F_TSO6: libc::c_ulong = 0x04;
const F_TSO_ECN: libc::c_ulong = 0x08;
const F_USO4: libc::c_ulong = 0x20;
const F_USO6: libc::c_ulong = 0x40;

/// An open tap; reads and writes are whole frames and never block.
pub(crate) struct Tap(File);

fn number(
    file: &File,
    what: &'static str,
    dev: &IfName,
    request: libc::Ioctl,
    value: libc::c_ulong,
) -> Result<(), GateError> {
    // SAFETY: the requests given here take their argument by value.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, value) } < 0 {
        return Err(last(what, dev.as_str()));
    }
    Ok(())
}

/// Opens (and so makes, where it is missing) the tap `dev`.
fn open(dev: &IfName, flags: i32) -> Result<File, GateError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| GateError::Sys {
            what: "open /dev/net/tun",
            dev: dev.as_str().to_owned(),
            source,
        })?;
    let mut r = dev.ifreq();
    r.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | flags) as u16 as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut r as *mut libc::ifreq) } < 0 {
        let e = io::Error::last_os_error();
        if e.raw_os_error() == Some(libc::EBUSY) {
            return Err(GateError::Busy(dev.as_str().to_owned()));
        }
        let dev = dev.as_str().to_owned();
        return Err(GateError::Sys {
            what: "make the tap",
            dev,
            source: e,
        });
    }
    Ok(file)
}

/// Makes the guest's tap unless an interface of that name is there (QEMU may hold it already; a
/// veth will do too). Says whether it was made.
pub(crate) fn make_guest_tap(
    dev: &IfName,
    owner: Option<u32>,
    vnet: bool,
) -> Result<bool, GateError> {
    if dev.index().is_some() {
        return Ok(false);
    }
    let file = open(dev, if vnet { libc::IFF_VNET_HDR } else { 0 })?;
    if let Some(uid) = owner {
        number(
            &file,
            "give the tap to QEMU's user",
            dev,
            TUNSETOWNER,
            libc::c_ulong::from(uid),
        )?;
    }
    number(&file, "make the tap persistent", dev, TUNSETPERSIST, 1)?;
    Ok(true)
}

/// Deletes a guest's tap once its QEMU is gone. A tap that does not exist is no error.
///
/// # Errors
/// [`GateError::Busy`] while a QEMU holds it; else the kernel's refusal (it is no tap, no right).
pub fn remove_guest_tap(name: &str) -> Result<(), GateError> {
    let dev = IfName::new(name)?;
    if dev.index().is_none() {
        return Ok(());
    }
    let file = open(&dev, libc::IFF_VNET_HDR)?;
    number(&file, "delete the tap", &dev, TUNSETPERSIST, 0)
}

impl Tap {
    /// Makes the bridge's tap: it lives as long as this value.
    pub fn bridge_side(dev: &IfName, vnet: bool) -> Result<Tap, GateError> {
        let file = open(
            dev,
            IFF_TUN_EXCL | if vnet { libc::IFF_VNET_HDR } else { 0 },
        )?;
        let tcp = F_CSUM | F_TSO4 | F_TSO6 | F_TSO_ECN;
        // What the bridge may hand us unsegmented. We send it on through the guest's tap, where the
        // kernel segments for a guest that cannot take it. UDP since Linux 6.2.
        let offloads = if vnet { tcp | F_USO4 | F_USO6 } else { 0 };
        if number(&file, "set offloads", dev, TUNSETOFFLOAD, offloads).is_err() {
            number(
                &file,
                "set offloads",
                dev,
                TUNSETOFFLOAD,
                if vnet { tcp } else { 0 },
            )?;
        }
        Ok(Tap(file))
    }

    /// One frame from the bridge, with its virtio-net header; `WouldBlock` where there is none.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &self.0, buf)
    }

    /// One frame into the bridge, with its virtio-net header.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        io::Write::write(&mut &self.0, frame).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
