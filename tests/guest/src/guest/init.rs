//! The first steps of a machine's only program.
//!
//! Reads `havm.ip=10.9.0.10/24` and `havm.dirty=MIB_PER_S,WORKING_MIB` from the kernel's command
//! line. Nothing here ends the guest: what fails is said on the console, and the rest goes on.

use super::{say, sys};
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Where the image builder puts the modules, and their order.
pub const MODULES_DIR: &str = "/modules";
const DISK: &str = "/dev/vda";

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Wanted {
    /// The NIC's address and prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Memory to dirty from the start: MiB a second, MiB of working set.
    pub dirty: Option<(f64, u64)>,
}

impl Wanted {
    /// From a kernel command line; words that are not ours are skipped.
    pub fn parse(line: &str) -> Wanted {
        let mut wanted = Wanted::default();
        for word in line.split_whitespace() {
            if let Some(v) = word.strip_prefix("havm.ip=") {
                wanted.address = v.split_once('/').and_then(|(ip, prefix)| {
                    let prefix = prefix.parse().ok().filter(|p| *p <= 32)?;
                    Some((ip.parse().ok()?, prefix))
                });
                if wanted.address.is_none() {
                    say(&format!("{word}: expected havm.ip=A.B.C.D/LEN"));
                }
            } else if let Some(v) = word.strip_prefix("havm.dirty=") {
                wanted.dirty = v
                    .split_once(',')
                    .and_then(|(rate, set)| Some((rate.parse().ok()?, set.parse().ok()?)));
                if wanted.dirty.is_none() {
                    say(&format!(
                        "{word}: expected havm.dirty=MIB_PER_S,WORKING_MIB"
                    ));
                }
            }
        }
        wanted
    }
}

/// Mounts, modules, network. Does nothing of it when not process 1 (a test on a normal machine).
pub fn start() -> Wanted {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        if let Err(e) = fs::create_dir_all(at).and_then(|()| sys::mount(kind, at)) {
            say(&format!("mount {at}: {e}"));
        }
    }
    load_modules();
    let wanted = Wanted::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    if let Err(e) = sys::set_address("lo", Some((Ipv4Addr::LOCALHOST, 8))) {
        say(&format!("lo: {e}"));
    }
    match (nic(), wanted.address) {
        (Some(name), Some((ip, prefix))) => match sys::set_address(&name, Some((ip, prefix))) {
            Ok(()) => say(&format!("{name} has {ip}/{prefix}")),
            Err(e) => say(&format!("{name}: {e}")),
        },
        (Some(name), None) => say(&format!("{name} has no address: no havm.ip= was given")),
        (None, _) => say("no network interface"),
    }
    wanted
}

fn load_modules() {
    let order = fs::read_to_string(format!("{MODULES_DIR}/order")).unwrap_or_default();
    for name in order
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
    {
        let loaded = File::open(format!("{MODULES_DIR}/{name}")).and_then(|f| sys::load_module(&f));
        if let Err(e) = loaded {
            say(&format!("module {name}: {e}"));
        }
    }
}

/// The first interface that is not the loopback; devices show up a moment after their driver.
fn nic() -> Option<String> {
    wait_for(|| {
        let names = fs::read_dir("/sys/class/net").ok()?;
        let mut names: Vec<String> = names
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| n.starts_with("eth") || n.starts_with("en"))
            .collect();
        names.sort();
        names.into_iter().next()
    })
}

/// The disk, once it is there; none where the guest has none.
pub fn disk() -> Option<&'static str> {
    wait_for(|| fs::exists(DISK).ok()?.then_some(DISK))
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + Duration::from_millis(500);
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() > until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Powers off when the power button is pressed (`virsh shutdown`).
pub fn obey_power_button() {
    use std::io::Read;
    const EVENT_BYTES: usize = 24; // struct input_event on 64 bit
    const KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let Ok(nodes) = fs::read_dir("/dev/input") else {
        return;
    };
    for node in nodes.filter_map(Result::ok) {
        let Ok(mut file) = File::open(node.path()) else {
            continue;
        };
        std::thread::spawn(move || {
            let mut event = [0u8; EVENT_BYTES];
            while file.read_exact(&mut event).is_ok() {
                let kind = u16::from_le_bytes([event[16], event[17]]);
                let code = u16::from_le_bytes([event[18], event[19]]);
                if (kind, code, event[20]) == (KEY, KEY_POWER, 1) {
                    say("power button");
                    end(sys::End::Poweroff);
                }
            }
        });
    }
}

/// Held for reading while a request is worked on, for writing once the machine ends: the disk goes
/// away then, and a service that ends in order does not write to it any more.
pub static AT_WORK: RwLock<()> = RwLock::new(());

/// Ends the machine; says so when that fails.
pub fn end(how: sys::End) {
    let _no_more_work = AT_WORK.write().unwrap_or_else(PoisonError::into_inner);
    say(match how {
        sys::End::Poweroff => "powering off",
        sys::End::Reboot => "rebooting",
    });
    let e = sys::end(how);
    say(&format!("{how:?} failed: {e}"));
}

/// Powers the machine off.
pub fn power_off() {
    end(sys::End::Poweroff);
}

/// Reboots the machine.
pub fn reboot() {
    end(sys::End::Reboot);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wrong word must not take the right ones with it.
    #[test]
    fn the_command_line_is_read_word_by_word() {
        let wanted = Wanted::parse("quiet havm.ip=10.9.0.10/24 x havm.dirty=2.5,16 console=ttyS0");
        assert_eq!(wanted.address, Some((Ipv4Addr::new(10, 9, 0, 10), 24)));
        assert_eq!(wanted.dirty, Some((2.5, 16)));
        let wanted = Wanted::parse("havm.ip=10.9.0.10 havm.dirty=4,8");
        assert_eq!(
            wanted,
            Wanted {
                address: None,
                dirty: Some((4.0, 8))
            }
        );
        assert_eq!(Wanted::parse("havm.ip=1.2.3.4/40").address, None);
    }
}
