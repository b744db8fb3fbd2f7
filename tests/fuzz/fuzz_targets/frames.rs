//! Whatever a connection brings: frames are decoded or refused; what was decoded encodes again to
//! something that decodes to the same.
#![no_main]

use havm_wire::back::Back;
use havm_wire::frame::Frame;
use havm_wire::hello::LinkFrame;
use havm_wire::raw::{Encoded, RawFrame, Splitter};
use libfuzzer_sys::fuzz_target;

fn raw(header: &[u8], payload: &[u8]) -> Option<RawFrame> {
    let mut out = None;
    let mut s = Splitter::default();
    s.push(header, |f| out = Some(f)).ok()?;
    s.push(payload, |f| out = Some(f)).ok()?;
    out
}

fn again(e: Encoded, seq: u64) -> RawFrame {
    raw(&e.header(seq), e.payload()).expect("what we encode is a frame")
}

/// A frame of any kind with right checksums, so that the fuzzer gets behind them.
fn forge(data: &[u8]) -> Option<RawFrame> {
    let (kind, payload) = data.split_first()?;
    let mut head = [0u8; 24];
    head[0] = *kind;
    head[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    head[16..20].copy_from_slice(&crc(payload).to_le_bytes());
    let c = crc(&head[..20]);
    head[20..].copy_from_slice(&c.to_le_bytes());
    raw(&head, payload)
}

fn crc(bytes: &[u8]) -> u32 {
    let mut c = !0u32;
    for b in bytes {
        c ^= u32::from(*b);
        for _ in 0..8 {
            c = if c & 1 == 1 {
                c >> 1 ^ 0xedb8_8320
            } else {
                c >> 1
            };
        }
    }
    !c
}

fuzz_target!(|data: &[u8]| {
    let _ = Splitter::default().push(data, |_| ());
    let Some(frame) = forge(data) else { return };
    if let Ok(f) = Frame::decode(&frame) {
        if let Ok(e) = f.encode() {
            assert_eq!(Frame::decode(&again(e, 1)).as_ref(), Ok(&f));
        }
    }
    if let Ok(b) = Back::decode(&frame) {
        if let Ok(e) = b.encode() {
            assert_eq!(Back::decode(&again(e, 1)).as_ref(), Ok(&b));
        }
    }
    if let Ok(l) = LinkFrame::decode(&frame) {
        if let Ok(e) = l.encode() {
            assert_eq!(LinkFrame::decode(&again(e, 0)).as_ref(), Ok(&l));
        }
    }
});
