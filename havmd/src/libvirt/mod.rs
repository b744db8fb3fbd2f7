//! libvirt: definitions (pure), and the thread that talks to it.

mod devices;
pub mod refuse;
pub mod transform;
pub mod tree;
