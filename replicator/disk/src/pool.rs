//! Large buffers are used again. A megabyte kept for an epoch is otherwise memory that the system
//! hands out page by page, zeroing each: that costs more than the copy of the data itself.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Smaller ones are the allocator's business.
const LARGE: usize = 128 * 1024;
/// How much unused memory is kept.
const KEEP_BYTES: usize = 64 << 20;

#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Mutex<(usize, Vec<Vec<u8>>)>,
}

impl Pool {
    /// An empty vector with room for `len` bytes.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        if len >= LARGE {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            // Not a huge one for a small need: it would be kept for as long as the epoch is.
            let fits = |v: &Vec<u8>| (len..=2 * len).contains(&v.capacity());
            if let Some(i) = free.1.iter().rposition(fits) {
                let v = free.1.swap_remove(i);
                free.0 -= v.capacity();
                return v;
            }
        }
        Vec::with_capacity(len)
    }

    /// The vector as shared bytes; its memory comes back when the last owner lets go.
    pub(crate) fn share(self: &Arc<Self>, buf: Vec<u8>) -> Bytes {
        if buf.capacity() < LARGE {
            return Bytes::from(buf);
        }
        Bytes::from_owner(Pooled {
            buf,
            pool: self.clone(),
        })
    }
}

struct Pooled {
    buf: Vec<u8>,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.buf
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let mut buf = std::mem::take(&mut self.buf);
        buf.clear();
        let mut free = self
            .pool
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if free.0 + buf.capacity() <= KEEP_BYTES {
            free.0 += buf.capacity();
            free.1.push(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The same memory again, and only after the last owner has let go of it.
    #[test]
    fn comes_back_after_the_last_owner() {
        let p = Arc::<Pool>::default();
        let mut v = p.take(LARGE);
        v.resize(LARGE, 7);
        let at = v.as_ptr();
        let a = p.share(v);
        let b = a.slice(10..20);
        drop(a);
        let other = p.take(LARGE);
        assert_ne!(other.as_ptr(), at);
        assert_eq!(b[..], [7; 10]);
        drop(b);
        let again = p.take(LARGE);
        assert_eq!(again.as_ptr(), at);
        assert_eq!(p.free.lock().unwrap().0, 0);
    }
}
