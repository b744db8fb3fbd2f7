//! Disks and NICs of a guest, made replicable.

use super::refuse::Found;
use super::transform::{Host, PlannedDisk, PlannedNic, nbd_export, nbd_socket};
use super::tree::Element;
use havm_core::ids::GuestName;
use std::path::{Path, PathBuf};

/// A tap's name for a guest's NIC: equal on both nodes, at most 15 characters.
fn tap_name(prefix: &str, guest: &GuestName, k: usize) -> String {
    let h = blake3::hash(format!("{guest}/{k}").as_bytes()).to_hex();
    format!("{prefix}{}", &h[..10])
}

/// The disk becomes an NBD export of the replicator, which sees every write.
pub(super) fn disk(dev: &mut Element, run: &Path, disks: &mut Vec<PlannedDisk>, found: &mut Found) {
    let target = dev
        .get("target")
        .and_then(|t| t.attr("dev"))
        .unwrap_or("?")
        .to_owned();
    let what = format!("disk {target}");
    let source = dev.get("source").cloned();
    match dev.attr("device").unwrap_or("disk") {
        "disk" => {}
        kind @ ("cdrom" | "floppy") => {
            // An empty drive has no state worth the name.
            if source.is_some_and(|s| {
                s.attrs
                    .iter()
                    .any(|(n, _)| n != "index" && n != "startupPolicy")
            }) {
                found.add(
                    format!("{kind} {target} with a medium"),
                    "the medium is not replicated",
                    "eject it (virsh change-media GUEST TARGET --eject), or remove the drive",
                );
            }
            return;
        }
        kind => {
            found.add(
                format!("{what}, device='{kind}'"),
                "only plain disks are replicated",
                "use device='disk'",
            );
            return;
        }
    }
    for (tag, why) in [
        (
            "shareable",
            "a disk that others write too cannot be replicated by epochs",
        ),
        (
            "transient",
            "a transient disk keeps its changes outside of the image",
        ),
        ("encryption", "its key is not on the peer"),
        ("mirror", "a block job runs on it"),
    ] {
        if dev.get(tag).is_some() {
            found.add(format!("{what} is {tag}"), why, &format!("remove <{tag}>"));
        }
    }
    let (path, block) = match (dev.attr("type"), &source) {
        (Some("file"), Some(s)) if s.attr("file").is_some() => {
            (s.attr("file").unwrap_or(""), false)
        }
        (Some("block"), Some(s)) if s.attr("dev").is_some() => (s.attr("dev").unwrap_or(""), true),
        (kind, _) => {
            found.add(
                format!("{what}, type='{}'", kind.unwrap_or("")),
                "only raw image files and block devices of this server are replicated",
                "move it to a raw file: qemu-img convert -O raw OLD NEW.img",
            );
            return;
        }
    };
    let format = dev
        .get("driver")
        .and_then(|d| d.attr("type"))
        .unwrap_or("raw")
        .to_owned();
    if format != "raw" {
        found.add(
            format!("{what} in format {format}"),
            "only raw disks are replicated block by block",
            &format!("shut the guest down, qemu-img convert -f {format} -O raw {path} NEW.img, and name NEW.img in its definition with type='raw'"),
        );
    }
    let k = disks.len();
    disks.push(PlannedDisk {
        path: PathBuf::from(path),
        target,
        block,
    });
    dev.set("type", "network");
    let old = dev.get("driver").cloned().unwrap_or_default();
    let mut driver = Element::new("driver")
        .with("name", "qemu")
        .with("type", "raw");
    for (n, v) in [
        ("cache", "none"),
        // A write that meets an error must wait, not be lost: havm decides what happens next.
        ("error_policy", "stop"),
        ("rerror_policy", "stop"),
        ("discard", "unmap"),
        ("detect_zeroes", "unmap"),
    ] {
        driver.set(n, v);
    }
    for keep in ["iothread", "queues", "queue_size", "packed", "iommu", "ats"] {
        if let Some(v) = old.attr(keep) {
            driver.set(keep, v);
        }
    }
    dev.replace(driver);
    dev.remove("backingStore");
    dev.replace(
        Element::new("source")
            .with("protocol", "nbd")
            .with("name", &nbd_export(k))
            .child(
                Element::new("host")
                    .with("transport", "unix")
                    .with("socket", &nbd_socket(run, k).to_string_lossy()),
            )
            .child(Element::new("reconnect").with("delay", "10")),
    );
}

/// The NIC becomes a tap in no bridge; the gate forwards between it and one in the bridge.
pub(super) fn nic(
    dev: &mut Element,
    guest: &GuestName,
    host: &Host,
    boots_from_net: bool,
    nics: &mut Vec<PlannedNic>,
    found: &mut Found,
    notes: &mut Vec<String>,
) {
    let mac = dev
        .get("mac")
        .and_then(|m| m.attr("address"))
        .unwrap_or("")
        .to_owned();
    let what = format!(
        "interface {}",
        if mac.is_empty() {
            "without a MAC address"
        } else {
            &mac
        }
    );
    if mac.is_empty() {
        found.add(
            what.clone(),
            "both servers must give it the same address",
            "define the guest in libvirt once, which chooses one",
        );
    }
    let source = dev.get("source").cloned().unwrap_or_default();
    let bridge = match dev.attr("type") {
        Some("bridge") => source.attr("bridge").map(str::to_owned),
        Some("network") => {
            let net = source.attr("network").unwrap_or("");
            let b = host.network_bridges.get(net).cloned();
            if b.is_none() {
                found.add(
                    format!("{what} on network '{net}'"),
                    "this network has no bridge on this server (or is not started)",
                    "virsh net-start it, or use <interface type='bridge'>",
                );
                return;
            }
            b
        }
        kind => {
            found.add(
                format!("{what}, type='{}'", kind.unwrap_or("")),
                "its frames cannot be held until the standby has the epoch",
                "use <interface type='bridge'> on a host bridge that exists on both servers",
            );
            return;
        }
    };
    let Some(bridge) = bridge.filter(|b| !b.is_empty() && b.len() <= 15) else {
        found.add(
            what,
            "it names no bridge",
            "name one in <source bridge='…'/>",
        );
        return;
    };
    let model = dev
        .get("model")
        .and_then(|m| m.attr("type"))
        .unwrap_or("rtl8139")
        .to_owned();
    if !matches!(
        model.as_str(),
        "virtio" | "virtio-net-pci" | "virtio-transitional" | "virtio-non-transitional"
    ) {
        found.add(
            format!("{what}, model {model}"),
            "the gate passes frames with virtio's offloads only",
            "use <model type='virtio'/>",
        );
    }
    for (tag, why) in [
        ("virtualport", "Open vSwitch ports are not supported"),
        (
            "vlan",
            "the tag is set by the switch port, which is not the guest's any more",
        ),
        (
            "filterref",
            "libvirt's filters work on the guest's own port, which the bridge does not see",
        ),
        ("teaming", "teaming needs a passed-through device"),
    ] {
        if dev.get(tag).is_some() {
            found.add(
                format!("{what} with <{tag}>"),
                why,
                &format!("remove <{tag}>, do it on the bridge"),
            );
        }
    }
    for tag in [
        "bandwidth",
        "coalesce",
        "mtu",
        "backend",
        "guest",
        "ip",
        "route",
        "script",
        "port",
    ] {
        if dev.get(tag).is_some() {
            notes.push(format!("{what}: <{tag}> is not kept"));
            dev.remove(tag);
        }
    }
    let k = nics.len();
    let (guest_tap, bridge_tap) = (tap_name("hvg", guest, k), tap_name("hvb", guest, k));
    dev.set("type", "ethernet");
    dev.remove("source");
    dev.replace(
        Element::new("target")
            .with("dev", &guest_tap)
            .with("managed", "no"),
    );
    // Not vhost: its queues would be read by the kernel while QEMU stands.
    let mut driver = Element::new("driver").with("name", "qemu");
    if let Some(rings) = dev.get("driver") {
        for keep in ["rx_queue_size", "tx_queue_size"] {
            if let Some(v) = rings.attr(keep) {
                driver.set(keep, v);
            }
        }
        if rings.attr("queues").is_some_and(|q| q != "1") {
            notes.push(format!("{what}: one queue"));
        }
    }
    dev.replace(driver);
    if boots_from_net || dev.get("boot").is_some() {
        notes.push(format!("{what}: its boot ROM stays"));
    } else {
        dev.replace(Element::new("rom").with("enabled", "no"));
    }
    nics.push(PlannedNic {
        guest_tap,
        bridge_tap,
        bridge,
        mac,
    });
}
