use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// A page made by a few edits of a base pattern: zero, text, noise.
fn page(base: u8, seed: u32, edits: &[(u16, u8)]) -> Box<Page> {
    let mut p = Box::new([0u8; PAGE_BYTES]);
    let mut x = seed | 1;
    for (i, b) in p.iter_mut().enumerate() {
        x = x.wrapping_mul(1664525).wrapping_add(1013904223);
        *b = match base % 3 {
            0 => 0,
            1 => (i % 7) as u8,
            _ => (x >> 24) as u8,
        };
    }
    edits
        .iter()
        .for_each(|(i, v)| p[usize::from(*i) % PAGE_BYTES] = *v);
    p
}

fn apply_all(payload: &[u8], image: &mut HashMap<u64, Box<Page>>) {
    for e in entries(&payload[2..]) {
        let e = e.unwrap();
        e.apply(
            image
                .entry(e.index)
                .or_insert_with(|| Box::new([0xEE; PAGE_BYTES])),
        )
        .unwrap();
    }
}

type Write = (u64, u8, u32, Vec<(u16, u8)>);

proptest! {
    /// The image at the receiver equals the sender's pages, whatever is written in whatever
    /// order, with a cache so small that slots are fought over, and also when an epoch's entries
    /// are applied twice (redo after a crash).
    #[test]
    fn the_receivers_image_is_the_senders(
        writes in prop::collection::vec(
            (0u64..600, any::<u8>(), 0u32..3, prop::collection::vec((any::<u16>(), any::<u8>()), 0..40)), 1..60),
        cache in 0usize..3,
    ) {
        let writes: Vec<Write> = writes;
        let mut enc = PageEncoder::new(cache);
        let (mut want, mut got) = (HashMap::new(), HashMap::new());
        for epoch in writes.chunks(7) {
            let mut batch = PageBatch::new(3);
            for (i, base, seed, edits) in epoch {
                let p = page(*base, *seed, edits);
                enc.push(&mut batch, *i, &p);
                want.insert(*i, p);
            }
            let e = batch.into_encoded().unwrap();
            apply_all(e.payload(), &mut got);
            apply_all(e.payload(), &mut got);
        }
        prop_assert!(got == want);
    }

    #[test]
    fn arbitrary_entries_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut p = [0; PAGE_BYTES];
        for e in entries(&bytes).flatten() {
            let _ = e.apply(&mut p);
        }
    }
}

#[test]
fn each_form_is_used_where_it_is_the_small_one() {
    let mut enc = PageEncoder::new(1);
    let mut b = PageBatch::new(0);
    let small = |s| matches!(s, Sent::Bytes(n) if n < 20);
    assert!(small(enc.push(&mut b, 0, &[0; PAGE_BYTES])), "zero");
    assert_eq!(enc.push(&mut b, 0, &[0; PAGE_BYTES]), Sent::Same);
    let noise = page(2, 5, &[]);
    assert!(
        matches!(enc.push(&mut b, 1, &noise), Sent::Bytes(n) if n >= PAGE_BYTES),
        "raw"
    );
    assert!(
        small(enc.push(&mut b, 1, &page(2, 5, &[(100, 1), (101, 2)]))),
        "delta"
    );
    assert!(
        matches!(enc.push(&mut b, 2, &page(1, 0, &[])), Sent::Bytes(n) if n < 100),
        "lz4"
    );
    enc.reset();
    assert!(
        matches!(enc.push(&mut b, 1, &noise), Sent::Bytes(n) if n >= PAGE_BYTES),
        "forgotten"
    );
}

#[test]
fn two_blocks_do_not_share_a_page() {
    let mut enc = PageEncoder::new(1);
    let (mut a, mut b) = (PageBatch::new(0), PageBatch::new(1));
    enc.push(&mut a, 5, &[1; PAGE_BYTES]);
    assert_ne!(enc.push(&mut b, 5, &[1; PAGE_BYTES]), Sent::Same);
}
