//! The system calls that an init needs and std does not have. All `unsafe` of the guest is here.

use std::ffi::{CString, c_int, c_ulong};
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "NUL in a name"))
}

/// Mounts a file system that needs no device and no options.
pub fn mount(kind: &str, at: &str) -> io::Result<()> {
    let (kind, at) = (c_string(kind)?, c_string(at)?);
    // SAFETY: three NUL-terminated strings that outlive the call; data may be null.
    check(unsafe {
        libc::mount(
            kind.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    })?;
    Ok(())
}

/// Loads a kernel module.
pub fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: an open fd, an empty NUL-terminated parameter string, no flags.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// How the guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Power off.
    Poweroff,
    /// Reboot.
    Reboot,
}

/// Flushes what is dirty and ends the machine. Returns only on failure.
pub fn end(how: End) -> io::Error {
    let what = match how {
        End::Poweroff => libc::RB_POWER_OFF,
        End::Reboot => libc::RB_AUTOBOOT,
    };
    // SAFETY: neither call takes memory of ours.
    unsafe {
        libc::sync();
        libc::reboot(what);
    }
    io::Error::last_os_error()
}

/// Gives an interface its address and brings it up.
pub fn set_address(name: &str, address: Option<(Ipv4Addr, u8)>) -> io::Result<()> {
    // SAFETY: no memory is passed; the fd is ours alone.
    let socket = unsafe {
        let fd = check(libc::socket(
            libc::AF_INET,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            0,
        ))?;
        OwnedFd::from_raw_fd(fd)
    };
    if let Some((ip, prefix)) = address {
        interface_call(&socket, name, libc::SIOCSIFADDR, |r| {
            r.ifr_ifru.ifru_addr = inet(ip)
        })?;
        let mask = u32::MAX
            .checked_shl(32 - u32::from(prefix.min(32)))
            .unwrap_or(0);
        interface_call(&socket, name, libc::SIOCSIFNETMASK, |r| {
            r.ifr_ifru.ifru_netmask = inet(Ipv4Addr::from(mask));
        })?;
    }
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    interface_call(&socket, name, libc::SIOCSIFFLAGS, |r| {
        r.ifr_ifru.ifru_flags = flags
    })
}

fn interface_call(
    socket: &OwnedFd,
    name: &str,
    call: c_ulong,
    fill: impl FnOnce(&mut libc::ifreq),
) -> io::Result<()> {
    // SAFETY: ifreq is plain bytes, all zeros is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "interface name is too long",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    fill(&mut request);
    // SAFETY: the calls used here read and write one ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), call as _, &mut request) })?;
    Ok(())
}

fn inet(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0 as libc::c_char; 14];
    for (to, from) in data[2..6].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

/// Nanoseconds of the monotonic clock.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills one timespec; it cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The size of a logical block of a block device, bytes; 512 for anything else.
pub fn logical_block_bytes(device: &File) -> u32 {
    const BLKSSZGET: c_ulong = 0x1268;
    let mut bytes: c_int = 0;
    // SAFETY: the call writes one int; on other files it fails and leaves it alone.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKSSZGET as _, &mut bytes) };
    if result == 0 && bytes > 0 {
        bytes as u32
    } else {
        512
    }
}
