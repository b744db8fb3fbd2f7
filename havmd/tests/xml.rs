//! Domain XML: what a definition becomes, pinned by golden files, and what is refused.

use havm_core::ids::GuestName;
use havm_daemon::libvirt::transform::{Host, is_protected, protect, relocate, standby};
use havm_daemon::libvirt::tree::{Element, unified_diff};
use std::path::Path;

const PLAIN: &str = include_str!("samples/plain.xml");
const REFUSED: &str = include_str!("samples/refused.xml");

fn guest(name: &str) -> GuestName {
    name.parse().expect("a guest name")
}

fn plan() -> havm_daemon::libvirt::transform::Plan {
    let original = Element::parse(PLAIN).expect("sample");
    protect(
        &original,
        &guest("plain"),
        Path::new("/run/havm/g/plain"),
        &Host::default(),
    )
    .expect("the plain guest can be protected")
}

/// The whole difference that `havm protect` shows for an ordinary guest.
#[test]
fn the_difference_of_a_plain_guest() {
    let plan = plan();
    let before = Element::parse(PLAIN).expect("sample").to_xml();
    insta::assert_snapshot!(unified_diff(
        &before,
        &plan.domain.to_xml(),
        "plain",
        "protected"
    ));
    insta::assert_snapshot!(plan.notes.join("\n"));
    assert_eq!(plan.machine, "pc-q35-10.0");
    assert_eq!(
        plan.disks[0].path,
        Path::new("/var/lib/libvirt/images/plain.img")
    );
    assert_eq!(plan.nics[0].bridge, "br0");
    assert!(plan.nics[0].guest_tap.len() <= 15 && plan.nics[0].bridge_tap.len() <= 15);
    assert_ne!(plan.nics[0].guest_tap, plan.nics[0].bridge_tap);
}

/// Both sides must give the guest the same devices: only paths and `-incoming` may differ.
#[test]
fn the_standby_differs_only_in_paths_and_incoming() {
    let full = plan().domain;
    let there = relocate(&full, Path::new("/elsewhere/g/plain"));
    let waiting = standby(&there);
    insta::assert_snapshot!(unified_diff(
        &full.to_xml(),
        &waiting.to_xml(),
        "primary",
        "standby"
    ));
    assert_eq!(relocate(&there, Path::new("/run/havm/g/plain")), full);
}

/// Protecting what is protected would lose the original definition.
#[test]
fn a_protected_definition_is_not_protected_twice() {
    let full = plan().domain;
    assert!(is_protected(&full));
    assert!(!is_protected(&Element::parse(PLAIN).expect("sample")));
    let e = protect(&full, &guest("plain"), Path::new("/run"), &Host::default()).unwrap_err();
    assert!(e.to_string().contains("unprotect"), "{e}");
}

/// Everything that stands in the way is said at once, each with its remedy.
#[test]
fn all_reasons_are_told_together() {
    let d = Element::parse(REFUSED).expect("sample");
    let e = protect(
        &d,
        &guest("everything"),
        Path::new("/run"),
        &Host::default(),
    )
    .unwrap_err();
    insta::assert_snapshot!(e.to_string());
    for r in &e.0 {
        assert!(!r.remedy.is_empty() && !r.why.is_empty(), "{r:?}");
    }
}

/// An alias is resolved by what the host says; the result is versioned.
#[test]
fn a_machine_alias_is_resolved() {
    let mut d = Element::parse(PLAIN).expect("sample");
    d.ensure("os").ensure("type").set("machine", "q35");
    let host = Host {
        machine_aliases: [("q35".to_owned(), "pc-q35-10.0".to_owned())].into(),
        ..Host::default()
    };
    let p = protect(&d, &guest("plain"), Path::new("/run"), &host).expect("resolved");
    assert_eq!(p.machine, "pc-q35-10.0");
    assert!(protect(&d, &guest("plain"), Path::new("/run"), &Host::default()).is_err());
}

/// A libvirt network becomes its bridge.
#[test]
fn a_network_becomes_its_bridge() {
    let mut d = Element::parse(PLAIN).expect("sample");
    for e in &mut d.ensure("devices").children {
        if e.name == "interface" {
            e.set("type", "network");
            e.replace(Element::new("source").with("network", "default"));
        }
    }
    let host = Host {
        network_bridges: [("default".to_owned(), "virbr0".to_owned())].into(),
        ..Host::default()
    };
    let p = protect(&d, &guest("plain"), Path::new("/run"), &host).expect("resolved");
    assert_eq!(p.nics[0].bridge, "virbr0");
}
