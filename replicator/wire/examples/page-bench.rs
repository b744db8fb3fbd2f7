//! How fast and how small pages become: `cargo run --release -p havm-wire --example page-bench`.
//!
//! Prints one JSON line per kind of page, with a memcpy of the same bytes beside it as the floor.

use havm_wire::page::{PAGE_BYTES, Page, PageBatch, PageEncoder, entries};
use std::hint::black_box;
use std::time::{Duration, Instant};

const PAGES: usize = 8192;
/// About what fits a frame: the quickest such piece of all rounds counts.
const PAGES_AT_ONCE: usize = 32;
const ROUNDS: usize = 8;

fn noise(pages: &mut [Page], seed: u64) {
    let mut x = seed;
    for b in pages.iter_mut().flatten() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *b = x as u8;
    }
}

fn text(pages: &mut [Page]) {
    let words = [
        &b"epoch "[..],
        b"standby ",
        b"\0\0\0\0\0\0\0\0",
        b"commit;\n",
        b"\x7f\x45\x4c\x46\x02",
    ];
    let mut x = 7u64;
    for page in pages {
        let mut at = 0;
        while at < PAGE_BYTES {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let w = words[(x >> 60) as usize % words.len()];
            let n = w.len().min(PAGE_BYTES - at);
            page[at..at + n].copy_from_slice(&w[..n]);
            at += n;
        }
    }
}

/// A count and a checksum in each page, as the testifying guest writes them.
fn touch(pages: &mut [Page], round: u64) {
    for (i, p) in pages.iter_mut().enumerate() {
        p[..8].copy_from_slice(&(round * 31 + i as u64).to_le_bytes());
        p[PAGE_BYTES - 8..]
            .copy_from_slice(&(round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i as u64).to_le_bytes());
    }
}

fn run(name: &str, make: impl Fn(&mut [Page], usize)) {
    let mut pages = vec![[0u8; PAGE_BYTES]; PAGES];
    let mut image = vec![[0u8; PAGE_BYTES]; PAGES];
    let mut floor = vec![[0u8; PAGE_BYTES]; PAGES];
    let mut enc = PageEncoder::new(PageEncoder::DEFAULT_CACHE_MIB);
    let (mut encode, mut apply, mut copy) = (Duration::MAX, Duration::MAX, Duration::MAX);
    let mut bytes = 0;
    for round in 0..ROUNDS {
        make(&mut pages, round);
        bytes = 0;
        for (first, some) in pages.chunks(PAGES_AT_ONCE).enumerate() {
            let first = first * PAGES_AT_ONCE;
            let start = Instant::now();
            let mut batch = PageBatch::new(0);
            for (i, p) in some.iter().enumerate() {
                enc.push(&mut batch, (first + i) as u64, p);
            }
            encode = encode.min(start.elapsed());
            bytes += batch.bytes();
            let start = Instant::now();
            for e in entries(batch.entries()).flatten() {
                let _ = black_box(e.apply(&mut image[e.index as usize]));
            }
            apply = apply.min(start.elapsed());
            let start = Instant::now();
            floor[first..first + some.len()].copy_from_slice(black_box(some));
            copy = copy.min(start.elapsed());
        }
        assert!(image == pages, "the image differs");
    }
    let us = |d: Duration| d.as_secs_f64() * 1e6 / PAGES_AT_ONCE as f64;
    println!(
        "{{\"pages\":\"{name}\",\"encode_us\":{:.2},\"apply_us\":{:.2},\"memcpy_us\":{:.2},\"bytes_per_page\":{:.0}}}",
        us(encode),
        us(apply),
        us(copy),
        bytes as f64 / PAGES as f64
    );
}

fn main() {
    run("zero, unchanged", |_, _| ());
    run("noise, new", |p, r| noise(p, r as u64 + 1));
    run("text, new", |p, r| {
        text(p);
        p.rotate_left(r + 1);
    });
    run("counter and checksum changed", |p, r| {
        if r == 0 {
            noise(p, 3);
        }
        touch(p, r as u64);
    });
    run("every 64th byte changed", |p, r| {
        for b in p.iter_mut().flatten().step_by(64) {
            *b = b.wrapping_add(r as u8 + 1);
        }
    });
}
