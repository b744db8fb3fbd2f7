//! Random bytes from the kernel: ids, nonces, keys. Only this module draws them.

use havm_core::ids::{GenId, Incarnation, LifeId, NodeId, StreamId};
use std::io;

/// `N` random bytes.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut out = [0; N];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut out)
        .map_err(|_| io::Error::other("the kernel gives no random numbers"))?;
    Ok(out)
}

/// An id of 128 random bits.
pub trait RandomId: Sized {
    /// A new one.
    fn random() -> io::Result<Self>;
}

macro_rules! random_id {
    ($($t:ident)*) => {$(
        impl RandomId for $t {
            fn random() -> io::Result<Self> { bytes().map($t) }
        }
    )*};
}
random_id!(NodeId LifeId StreamId GenId Incarnation);
