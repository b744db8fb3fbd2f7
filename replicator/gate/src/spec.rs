//! What a gate is told when it is made.

use crate::error::GateError;

/// One NIC of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicSpec {
    /// The tap that QEMU opens by name; made where it is missing, and left behind.
    pub guest_tap: String,
    /// The tap in the bridge; lives as long as the [`Gate`].
    pub bridge_tap: String,
    /// The bridge, which must exist.
    pub bridge: String,
    /// The guest's address on this NIC.
    pub mac: [u8; 6],
    /// The user that may open the guest's tap beside root.
    pub owner_uid: Option<u32>,
    /// MTU of both taps, bytes.
    pub mtu: u32,
}

impl NicSpec {
    /// From the replicator's spec file.
    ///
    /// # Errors
    /// [`GateError::Mac`] where the address is not six hexadecimal bytes.
    pub fn from_spec(
        nic: &havm_core::spec::NicSpec,
        owner_uid: u32,
        mtu: u32,
    ) -> Result<NicSpec, GateError> {
        Ok(NicSpec {
            guest_tap: nic.guest_tap.clone(),
            bridge_tap: nic.bridge_tap.clone(),
            bridge: nic.bridge.clone(),
            mac: parse_mac(&nic.mac).ok_or_else(|| GateError::Mac(nic.mac.clone()))?,
            owner_uid: Some(owner_uid),
            mtu,
        })
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|p| p.len() == 2 && !p.starts_with('+'))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// Bounds of one gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory for held frames, bytes; allocated at once, touched as needed. At least 256 KiB.
    pub held_bytes: usize,
    /// Held frames.
    pub held_frames: usize,
    /// Use virtio-net headers (offloads). Turn off only to measure.
    pub vnet_hdr: bool,
    /// Give input to the guest inside the kernel where it can. Turn off only to measure.
    pub shortcut: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            held_bytes: 16 << 20,
            held_frames: 16384,
            vnet_hdr: true,
            shortcut: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::parse_mac;

    #[test]
    fn addresses() {
        assert_eq!(
            parse_mac("52:54:00:ab:CD:01"),
            Some([0x52, 0x54, 0, 0xab, 0xcd, 1])
        );
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:01:02",
            "52:54:00:ab:cd:0g",
            "5:254:00:ab:00:01",
            "52:54:00:+a:00:01",
            "+1:2",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
