//! Small requests about network interfaces: flags, MTU, address, bridge port, sysctl.
//!
//! By ioctl rather than netlink: each is one call, and answers at once. All of `unsafe` here is the
//! `ioctl` call on a fully written `ifreq`.

use crate::error::{GateError, last};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A checked interface name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IfName(String);

impl IfName {
    pub fn new(name: &str) -> Result<Self, GateError> {
        let ok = (1..=15).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%')
            && name != "."
            && name != "..";
        if ok {
            Ok(IfName(name.to_owned()))
        } else {
            Err(GateError::Name(name.to_owned()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its index; none where there is no such interface in this network namespace.
    pub fn index(&self) -> Option<i32> {
        let c = CString::new(self.0.as_str()).ok()?;
        // SAFETY: `c` is a NUL-terminated string that lives over the call.
        let i = unsafe { libc::if_nametoindex(c.as_ptr()) };
        i32::try_from(i).ok().filter(|i| *i > 0)
    }

    /// An `ifreq` that names it, all else zero.
    pub fn ifreq(&self) -> libc::ifreq {
        // SAFETY: ifreq is plain data, for which all zeroes is valid.
        let mut r: libc::ifreq = unsafe { std::mem::zeroed() };
        for (d, s) in r.ifr_name.iter_mut().zip(self.0.bytes()) {
            *d = s as libc::c_char;
        }
        r
    }
}

/// A socket to ask by.
pub(crate) struct Asker(OwnedFd);

impl Asker {
    pub fn new() -> Result<Self, GateError> {
        // SAFETY: plain system call; its result is checked before it is owned.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(last("open a socket", "-"));
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(Asker(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn ask(
        &self,
        what: &'static str,
        dev: &IfName,
        request: libc::Ioctl,
        r: &mut libc::ifreq,
    ) -> Result<(), GateError> {
        // SAFETY: every request used here reads and writes one `ifreq`, which `r` is.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), request, r as *mut libc::ifreq) } < 0 {
            return Err(last(what, dev.as_str()));
        }
        Ok(())
    }

    /// Sets and clears flags (IFF_…).
    pub fn flags(&self, dev: &IfName, set: i32, clear: i32) -> Result<(), GateError> {
        let mut r = dev.ifreq();
        self.ask("read the flags", dev, libc::SIOCGIFFLAGS, &mut r)?;
        // SAFETY: SIOCGIFFLAGS has just written this member.
        let had = i32::from(unsafe { r.ifr_ifru.ifru_flags });
        let want = (had | set) & !clear;
        if want != had {
            r.ifr_ifru.ifru_flags = want as libc::c_short;
            self.ask("set the flags", dev, libc::SIOCSIFFLAGS, &mut r)?;
        }
        Ok(())
    }

    /// Sets the MTU, bytes.
    pub fn mtu(&self, dev: &IfName, mtu: u32) -> Result<(), GateError> {
        let mut r = dev.ifreq();
        self.ask("read the MTU", dev, libc::SIOCGIFMTU, &mut r)?;
        let want = i32::try_from(mtu).unwrap_or(i32::MAX);
        // SAFETY: SIOCGIFMTU has just written this member.
        if unsafe { r.ifr_ifru.ifru_mtu } != want {
            r.ifr_ifru.ifru_mtu = want;
            self.ask("set the MTU", dev, libc::SIOCSIFMTU, &mut r)?;
        }
        Ok(())
    }

    /// Sets how many frames wait in it at most.
    pub fn queue_len(&self, dev: &IfName, frames: i32) -> Result<(), GateError> {
        const SIOCSIFTXQLEN: libc::Ioctl = 0x8943;
        let mut r = dev.ifreq();
        r.ifr_ifru.ifru_metric = frames; // ifr_qlen is the same member of the union
        self.ask("set the queue length", dev, SIOCSIFTXQLEN, &mut r)
    }

    /// Sets the hardware address.
    pub fn mac(&self, dev: &IfName, mac: [u8; 6]) -> Result<(), GateError> {
        let mut r = dev.ifreq();
        // SAFETY: all zeroes is a valid sockaddr, and it is the member that the request reads.
        let addr = unsafe { &mut r.ifr_ifru.ifru_hwaddr };
        addr.sa_family = libc::ARPHRD_ETHER;
        for (d, s) in addr.sa_data.iter_mut().zip(mac) {
            *d = s as libc::c_char;
        }
        self.ask("set the hardware address", dev, libc::SIOCSIFHWADDR, &mut r)
    }

    /// Makes `dev` a port of `bridge`.
    pub fn bridge_port(&self, bridge: &IfName, dev: &IfName) -> Result<(), GateError> {
        const SIOCBRADDIF: libc::Ioctl = 0x89a2;
        let index = dev
            .index()
            .ok_or_else(|| last("find the interface", dev.as_str()))?;
        let mut r = bridge.ifreq();
        r.ifr_ifru.ifru_ifindex = index;
        self.ask("add a port to the bridge", bridge, SIOCBRADDIF, &mut r)
    }
}

/// Whether the interface is a port of something, where sysfs shows this network namespace.
pub(crate) fn has_master(dev: &IfName) -> bool {
    fs::symlink_metadata(format!("/sys/class/net/{}/master", dev.as_str())).is_ok()
}

/// Sets a sysctl of an interface, where it exists.
pub(crate) fn sysctl(family: &str, dev: &IfName, key: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/net/{family}/conf/{}/{key}", dev.as_str());
    match fs::write(&path, value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()), // that family is not built in
        r => r,
    }
}

/// Keeps the host's own stack from speaking on, or answering at, an interface that is not its own.
pub(crate) fn silence(dev: &IfName) {
    for (family, key, value) in [
        ("ipv6", "disable_ipv6", "1"),
        ("ipv6", "addr_gen_mode", "1"),
        ("ipv4", "arp_ignore", "8"),
        ("ipv4", "rp_filter", "1"),
        ("ipv4", "forwarding", "0"),
    ] {
        if let Err(e) = sysctl(family, dev, key, value) {
            tracing::warn!(dev = dev.as_str(), key, %e, "could not silence the host on this interface");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_path_or_a_field_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "sixteen-letters-",
            "a b",
            "tap%d",
            "a:0",
            "é",
        ] {
            assert!(IfName::new(bad).is_err(), "{bad}");
        }
        assert!(IfName::new("hvg12").is_ok());
    }
}
