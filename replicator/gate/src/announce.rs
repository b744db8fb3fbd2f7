//! The frame that tells switches where a MAC now lives: a reverse ARP request, as QEMU's
//! `announce-self` sends it. It needs no IP address, which we do not know.

/// Bytes of the frame: the Ethernet minimum without checksum.
pub(crate) const LEN: usize = 60;

/// The frame for `mac`.
pub(crate) fn frame(mac: [u8; 6]) -> [u8; LEN] {
    let mut f = [0u8; LEN];
    f[0..6].fill(0xff);
    f[6..12].copy_from_slice(&mac);
    f[12..14].copy_from_slice(&0x8035u16.to_be_bytes()); // RARP
    f[14..16].copy_from_slice(&1u16.to_be_bytes()); // Ethernet
    f[16..18].copy_from_slice(&0x0800u16.to_be_bytes()); // IPv4
    f[18] = 6;
    f[19] = 4;
    f[20..22].copy_from_slice(&3u16.to_be_bytes()); // request reverse
    f[22..28].copy_from_slice(&mac);
    f[32..38].copy_from_slice(&mac);
    f
}
