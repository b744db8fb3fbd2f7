//! Puts a VLAN tag back into a frame.
//!
//! The kernel takes an 802.1Q tag out of a frame before an AF_PACKET socket sees it, and tells it
//! beside the data (packet(7), PACKET_AUXDATA). The guest sent it, so it must go back in.

/// Bytes of a tag.
pub(crate) const TAG_LEN: usize = 4;
/// Bytes of both addresses, after which the tag stands.
const ADDRESSES: usize = 12;
const FLAG_NEEDS_CSUM: u8 = 1;

/// `room` is `TAG_LEN` free bytes, then a virtio-net header of `hdr_len` bytes (0 or 10), then the
/// frame. Moves header and addresses down over the free bytes and writes the tag. False where the
/// frame is too short to have one.
pub(crate) fn insert(room: &mut [u8], hdr_len: usize, tpid: u16, tci: u16) -> bool {
    let head = hdr_len + ADDRESSES;
    if room.len() < TAG_LEN + head {
        return false;
    }
    room.copy_within(TAG_LEN..TAG_LEN + head, 0);
    room[head..head + 2].copy_from_slice(&tpid.to_be_bytes());
    room[head + 2..head + 4].copy_from_slice(&tci.to_be_bytes());
    if hdr_len >= 10 {
        // struct virtio_net_hdr: flags, gso_type, hdr_len (2), gso_size (2), csum_start (4).. offsets
        // of a frame that is now four bytes longer.
        if room[1] != 0 {
            bump(&mut room[2..4]);
        }
        if room[0] & FLAG_NEEDS_CSUM != 0 {
            bump(&mut room[6..8]);
        }
    }
    true
}

fn bump(field: &mut [u8]) {
    let v = u16::from_le_bytes([field[0], field[1]]).saturating_add(TAG_LEN as u16);
    field.copy_from_slice(&v.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_stands_after_the_addresses_and_offsets_move() {
        let mut room = vec![0u8; 4];
        // needs csum, TCPv4, hdr_len 54, gso_size 1448, csum_start 34, csum_offset 16
        room.extend([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
        room.extend([0xaa; 6]);
        room.extend([0xbb; 6]);
        room.extend([0x08, 0x00, 1, 2, 3]);
        assert!(insert(&mut room, 10, 0x8100, 0x0123));
        assert_eq!(room[..10], [1, 1, 58, 0, 0xa8, 5, 38, 0, 16, 0]);
        assert_eq!(room[10..16], [0xaa; 6]);
        assert_eq!(room[16..22], [0xbb; 6]);
        assert_eq!(room[22..], [0x81, 0x00, 0x01, 0x23, 0x08, 0x00, 1, 2, 3]);
    }

    #[test]
    fn too_short_a_frame_is_refused() {
        assert!(!insert(&mut [0u8; 20], 10, 0x8100, 1));
    }
}
