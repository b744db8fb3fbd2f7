//! Two libvirt hosts, a witness box and an outside client on one machine, in namespaces.

pub mod place;
