//! The libvirt definition of a testifying guest, as an admin would have written it.

use std::net::Ipv4Addr;

const TEMPLATE: &str = include_str!("../domain.xml");

/// What one guest differs in.
#[derive(Debug, Clone, PartialEq)]
pub struct Domain {
    /// The domain's name; its disk is `/var/lib/libvirt/images/NAME.raw`.
    pub name: String,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Its address on the guest LAN (/24).
    pub ip: Ipv4Addr,
    /// Dirtied memory from the start: MiB a second, MiB of working set.
    pub dirty: Option<(f64, u64)>,
    /// A versioned machine type: both hosts must have it.
    pub machine: String,
}

impl Domain {
    /// A guest of 192 MiB and one vCPU at 10.9.0.N that dirties 4 MiB/s of 16 MiB.
    pub fn new(name: &str, lan_host: u8) -> Domain {
        Domain {
            name: name.to_owned(),
            memory_mib: 192,
            vcpus: 1,
            ip: Ipv4Addr::new(10, 9, 0, lan_host),
            dirty: Some((4.0, 16)),
            machine: "pc-q35-10.0".to_owned(),
        }
    }

    /// The NIC's address: from QEMU's range, and different for every IP.
    pub fn mac(&self) -> String {
        let [.., b, c, d] = self.ip.octets();
        format!("52:54:00:{b:02x}:{c:02x}:{d:02x}")
    }

    /// The definition.
    pub fn xml(&self) -> String {
        let dirty = self.dirty.map_or(String::new(), |(rate, set)| {
            format!("havm.dirty={rate},{set}")
        });
        TEMPLATE
            .replace("@NAME@", &self.name)
            .replace("@MEMORY_MIB@", &self.memory_mib.to_string())
            .replace("@VCPUS@", &self.vcpus.to_string())
            .replace("@MACHINE@", &self.machine)
            .replace("@IP@", &self.ip.to_string())
            .replace("@CMDLINE@", &dirty)
            .replace("@MAC@", &self.mac())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A word that nobody fills in would reach libvirt as text.
    #[test]
    fn every_word_of_the_template_is_filled_in() {
        let xml = Domain::new("one", 10).xml();
        let body = &xml[xml.find("<domain").unwrap()..];
        assert!(!body.contains('@'), "{body}");
        assert!(
            body.contains("havm.ip=10.9.0.10/24 havm.dirty=4,16"),
            "{body}"
        );
    }
}
