//! Page entries from anywhere never leave their page; what the encoder makes gives the page back.
#![no_main]

use havm_wire::page::{PAGE_BYTES, PageBatch, PageEncoder, entries};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut page = [0u8; PAGE_BYTES];
    for e in entries(data).flatten() {
        let _ = e.apply(&mut page);
    }
    // The same bytes as edits: (place, value) pairs on one page, a new version every 16 edits.
    let mut enc = PageEncoder::new(1);
    let (mut new, mut image) = ([0u8; PAGE_BYTES], [0u8; PAGE_BYTES]);
    for edits in data.chunks(48) {
        for e in edits.chunks_exact(3) {
            new[usize::from(u16::from_le_bytes([e[0], e[1]])) % PAGE_BYTES] = e[2];
        }
        let mut batch = PageBatch::new(0);
        enc.push(&mut batch, 5, &new);
        for e in entries(batch.entries()) {
            e.expect("our own entry")
                .apply(&mut image)
                .expect("our own entry");
        }
        assert!(image == new);
    }
});
