//! libvirt: definitions (pure), and the thread that talks to it.

pub mod conn;
mod devices;
pub mod refuse;
pub mod transform;
pub mod tree;
