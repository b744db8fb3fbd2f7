//! What changed between two versions of the same bytes: runs of (skip, length, new bytes).
//!
//! The runs carry the new content itself, not its XOR with the old: applying them twice, or again
//! after a crash in the middle, gives the same result. Redo after a crash depends on that.

use crate::codec::{DecodeError, Get, Put};

/// Equal bytes that end a run; fewer are cheaper to repeat than to skip.
const GAP_BYTES: usize = 4;

/// Appends the delta from `old` to `new` (of the same length) to `out`. False, with `out`
/// undefined beyond its former end, where it takes more than `max` bytes.
pub(crate) fn encode(old: &[u8], new: &[u8], max: usize, out: &mut Vec<u8>) -> bool {
    let (n, start_len) = (new.len().min(old.len()), out.len());
    let (mut i, mut done) = (0, 0);
    loop {
        while i + 8 <= n && old[i..i + 8] == new[i..i + 8] {
            i += 8;
        }
        while i < n && old[i] == new[i] {
            i += 1;
        }
        if i >= n {
            return true;
        }
        let start = i;
        let end = loop {
            // `i` differs; look for the next stretch that is equal for long enough.
            let after = i + 1;
            let same = (after..n)
                .take(GAP_BYTES)
                .take_while(|&j| old[j] == new[j])
                .count();
            if same == GAP_BYTES || after + same >= n {
                break after;
            }
            i = after + same;
            if i - start > max {
                return false;
            }
        };
        out.varint((start - done) as u64);
        out.varint((end - start) as u64);
        out.extend_from_slice(&new[start..end]);
        if out.len() - start_len > max {
            return false;
        }
        (i, done) = (end, end);
    }
}

/// Calls `run(at, bytes)` for each run; fails for a delta that leaves `len` bytes.
pub(crate) fn runs(
    delta: &[u8],
    len: usize,
    mut run: impl FnMut(usize, &[u8]),
) -> Result<(), DecodeError> {
    let mut g = Get::new("page delta", delta);
    let mut at = 0usize;
    while g.left() > 0 {
        let (skip, n) = (g.varint()?, g.varint()?);
        let start = usize::try_from(skip).ok().and_then(|s| at.checked_add(s));
        let end = start.and_then(|s| usize::try_from(n).ok().and_then(|n| s.checked_add(n)));
        match (start, end) {
            (Some(start), Some(end)) if end <= len && end > start => {
                run(start, g.take(end - start)?);
                at = end;
            }
            _ => return Err(g.bad(format!("a run of {n} bytes, {skip} after {at}, of {len}"))),
        }
    }
    Ok(())
}

/// Applies a delta.
pub(crate) fn apply(delta: &[u8], to: &mut [u8]) -> Result<(), DecodeError> {
    runs(delta, to.len(), |_, _| ())?;
    runs(delta, to.len(), |at, bytes| {
        to[at..at + bytes.len()].copy_from_slice(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_delta_turns_old_into_new_even_when_applied_again(
            old in prop::collection::vec(any::<u8>(), 300),
            edits in prop::collection::vec((0usize..300, any::<u8>()), 0..80),
        ) {
            let mut new = old.clone();
            edits.iter().for_each(|(i, v)| new[*i] = *v);
            let mut d = Vec::new();
            prop_assert!(encode(&old, &new, 1000, &mut d));
            let mut page = old.clone();
            apply(&d, &mut page).unwrap();
            prop_assert_eq!(&page, &new);
            apply(&d, &mut page).unwrap();
            prop_assert_eq!(page, new);
        }

        #[test]
        fn arbitrary_deltas_never_panic(d: Vec<u8>) {
            let mut page = [0; 64];
            let _ = apply(&d, &mut page);
        }
    }

    #[test]
    fn a_delta_over_its_bound_is_given_up() {
        assert!(!encode(&[0; 4096], &[1; 4096], 100, &mut Vec::new()));
    }
}
