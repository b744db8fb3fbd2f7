//! An ordinary domain becomes one that can be protected. Pure: definition in, definition out.
//!
//! ```text
//!   original ──protect──> definition ──(libvirt defines it on the home node, adds addresses)──> full
//!   full ──relocate──> the peer's definition           full ──standby──> the waiting QEMU's
//! ```
//! What each change is for stands beside it; the facts are those tried in the lab.

use super::refuse::{Found, Refusals, check};
use super::tree::Element;
use havm_core::ids::GuestName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The namespace of libvirt's QEMU passthrough.
const QEMU_NS: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
/// The namespace of our own mark in `<metadata>`.
pub const HAVM_NS: &str = "urn:havm:domain:1";
/// The id of the second monitor's character device.
const CHARDEV: &str = "havm-qmp";

/// What the host knows and the definition does not say.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Machine type aliases and what they stand for: `q35` -> `pc-q35-10.0`.
    pub machine_aliases: BTreeMap<String, String>,
    /// The bridge of each libvirt network.
    pub network_bridges: BTreeMap<String, String>,
}

/// A disk of the original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDisk {
    /// The raw image or block device.
    pub path: PathBuf,
    /// `vda`.
    pub target: String,
    /// It is a block device.
    pub block: bool,
}

/// A NIC of the original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedNic {
    /// See [`havm_core::spec::NicSpec`].
    pub guest_tap: String,
    /// The same.
    pub bridge_tap: String,
    /// The same.
    pub bridge: String,
    /// The same.
    pub mac: String,
}

/// What a protectable definition needs around it.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The definition.
    pub domain: Element,
    /// The versioned machine type.
    pub machine: String,
    /// Disks in order.
    pub disks: Vec<PlannedDisk>,
    /// NICs in order.
    pub nics: Vec<PlannedNic>,
    /// Files named in the definition that both nodes must have, equal: kernel, initrd, emulator.
    pub files: Vec<PathBuf>,
    /// What is changed that the guest or the admin can notice.
    pub notes: Vec<String>,
}

/// The folder in which QEMU itself may make sockets.
pub fn qemu_dir(guest_run_dir: &Path) -> PathBuf {
    guest_run_dir.join("qemu")
}
/// The second monitor's socket.
pub fn qmp_socket(guest_run_dir: &Path) -> PathBuf {
    qemu_dir(guest_run_dir).join("qmp.sock")
}
/// The NBD server's socket of disk `k`.
pub fn nbd_socket(guest_run_dir: &Path, k: usize) -> PathBuf {
    guest_run_dir.join(format!("nbd-{k}.sock"))
}
/// The NBD export's name of disk `k`.
pub fn nbd_export(k: usize) -> String {
    format!("disk{k}")
}

/// A tap's name for a guest's NIC: equal on both nodes, at most 15 characters.
fn tap_name(prefix: &str, guest: &GuestName, k: usize) -> String {
    let h = blake3::hash(format!("{guest}/{k}").as_bytes()).to_hex();
    format!("{prefix}{}", &h[..10])
}

/// Whether the definition is one of ours already.
pub fn is_protected(domain: &Element) -> bool {
    domain
        .get("metadata")
        .is_some_and(|m| m.children.iter().any(|c| c.attrs.iter().any(|(_, v)| v == HAVM_NS)))
}

/// Makes a protectable definition of an ordinary one (libvirt's own, inactive form).
pub fn protect(
    original: &Element,
    guest: &GuestName,
    guest_run_dir: &Path,
    host: &Host,
) -> Result<Plan, Refusals> {
    let mut found = Found::default();
    if is_protected(original) {
        found.add("it is protected already", "its definition is havm's", "havm unprotect it first");
        return Err(Refusals(found.0));
    }
    check(original, &mut found);
    let mut d = original.clone();
    let mut notes = Vec::new();
    d.unset("id");
    let machine = machine(&mut d, host, &mut found);
    memory(&mut d, &mut notes);
    cpu(&mut d, &mut notes);
    for (tag, value) in [("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")]
    {
        d.replace(Element::new(tag).text(value));
    }
    let boots_from_net = d.get("os").is_some_and(|o| o.all("boot").any(|b| b.attr("dev") == Some("network")));
    let mut disks = Vec::new();
    let mut nics = Vec::new();
    let devices = d.ensure("devices");
    for dev in &mut devices.children {
        dev.remove("alias");
        match dev.name.as_str() {
            "disk" => disk(dev, guest_run_dir, &mut disks, &mut found),
            "interface" => nic(dev, guest, host, boots_from_net, &mut nics, &mut found, &mut notes),
            _ => {}
        }
    }
    balloon(devices, &mut notes);
    commandline(&mut d, guest_run_dir, &mut notes);
    mark(&mut d);
    if !found.0.is_empty() {
        return Err(Refusals(found.0));
    }
    let files = files(&d);
    Ok(Plan { domain: d, machine, disks, nics, files, notes })
}

/// A saved device state only loads into the same versioned machine type.
fn machine(d: &mut Element, host: &Host, found: &mut Found) -> String {
    let kind = d.ensure("os").ensure("type");
    let named = kind.attr("machine").unwrap_or("pc").to_owned();
    let full = host.machine_aliases.get(&named).cloned().unwrap_or_else(|| named.clone());
    if !full.bytes().any(|b| b.is_ascii_digit()) || full == "q35" {
        found.add(
            format!("machine type '{named}'"),
            "it is an alias, and this server's libvirt does not say what it stands for",
            "name a versioned type that both servers have, such as pc-q35-10.0 \
             (`qemu-system-x86_64 -machine help`)",
        );
    }
    kind.set("machine", &full);
    full
}

/// RAM is a named shared file: it can be mapped by the replicator and skipped by the restore stream.
fn memory(d: &mut Element, notes: &mut Vec<String>) {
    let backing = d.ensure("memoryBacking");
    backing.replace(Element::new("source").with("type", "file"));
    backing.replace(Element::new("access").with("mode", "shared"));
    let memory = d.get("memory").cloned();
    if let (Some(m), Some(c)) = (memory, d.get("currentMemory").cloned())
        && (m.text != c.text || m.attr("unit") != c.attr("unit"))
    {
        notes.push(format!(
            "the guest gets all of its {} {} from the start (no balloon)",
            m.text,
            m.attr("unit").unwrap_or("KiB")
        ));
        let mut same = m;
        same.name = "currentMemory".into();
        d.replace(same);
    }
}

/// Both servers must show the same CPU. Under TCG every host can show qemu64.
fn cpu(d: &mut Element, notes: &mut Vec<String>) {
    let named = d.get("cpu").is_some_and(|c| {
        c.get("model").is_some() && !matches!(c.attr("mode"), Some("host-model" | "host-passthrough" | "maximum"))
    });
    if named || d.attr("type") != Some("qemu") {
        return;
    }
    let mut new = Element::new("cpu").with("mode", "custom").with("match", "exact").with("check", "none");
    new.children.push(Element::new("model").with("fallback", "forbid").text("qemu64"));
    if let Some(t) = d.get("cpu").and_then(|c| c.get("topology")) {
        new.children.push(t.clone());
    }
    notes.push("the CPU model becomes qemu64, which every server can show".into());
    d.replace(new);
}

/// The disk becomes an NBD export of the replicator, which sees every write.
fn disk(dev: &mut Element, run: &Path, disks: &mut Vec<PlannedDisk>, found: &mut Found) {
    let target = dev.get("target").and_then(|t| t.attr("dev")).unwrap_or("?").to_owned();
    let what = format!("disk {target}");
    let source = dev.get("source").cloned();
    match dev.attr("device").unwrap_or("disk") {
        "disk" => {}
        kind @ ("cdrom" | "floppy") => {
            // An empty drive has no state worth the name.
            if source.is_some_and(|s| s.attrs.iter().any(|(n, _)| n != "index" && n != "startupPolicy")) {
                found.add(
                    format!("{kind} {target} with a medium"),
                    "the medium is not replicated",
                    "eject it (virsh change-media GUEST TARGET --eject), or remove the drive",
                );
            }
            return;
        }
        kind => {
            found.add(format!("{what}, device='{kind}'"), "only plain disks are replicated", "use device='disk'");
            return;
        }
    }
    for (tag, why) in [
        ("shareable", "a disk that others write too cannot be replicated by epochs"),
        ("transient", "a transient disk keeps its changes outside of the image"),
        ("encryption", "its key is not on the peer"),
        ("mirror", "a block job runs on it"),
    ] {
        if dev.get(tag).is_some() {
            found.add(format!("{what} is {tag}"), why, &format!("remove <{tag}>"));
        }
    }
    let (path, block) = match (dev.attr("type"), &source) {
        (Some("file"), Some(s)) if s.attr("file").is_some() => (s.attr("file").unwrap_or(""), false),
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
    let format = dev.get("driver").and_then(|d| d.attr("type")).unwrap_or("raw").to_owned();
    if format != "raw" {
        found.add(
            format!("{what} in format {format}"),
            "only raw disks are replicated block by block",
            &format!("shut the guest down, qemu-img convert -f {format} -O raw {path} NEW.img, and name NEW.img in its definition with type='raw'"),
        );
    }
    let k = disks.len();
    disks.push(PlannedDisk { path: PathBuf::from(path), target, block });
    dev.set("type", "network");
    let old = dev.get("driver").cloned().unwrap_or_default();
    let mut driver = Element::new("driver").with("name", "qemu").with("type", "raw");
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
fn nic(
    dev: &mut Element,
    guest: &GuestName,
    host: &Host,
    boots_from_net: bool,
    nics: &mut Vec<PlannedNic>,
    found: &mut Found,
    notes: &mut Vec<String>,
) {
    let mac = dev.get("mac").and_then(|m| m.attr("address")).unwrap_or("").to_owned();
    let what = format!("interface {}", if mac.is_empty() { "without a MAC address" } else { &mac });
    if mac.is_empty() {
        found.add(what.clone(), "both servers must give it the same address", "define the guest in libvirt once, which chooses one");
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
        found.add(what, "it names no bridge", "name one in <source bridge='…'/>");
        return;
    };
    let model = dev.get("model").and_then(|m| m.attr("type")).unwrap_or("rtl8139").to_owned();
    if !matches!(model.as_str(), "virtio" | "virtio-net-pci" | "virtio-transitional" | "virtio-non-transitional") {
        found.add(
            format!("{what}, model {model}"),
            "the gate passes frames with virtio's offloads only",
            "use <model type='virtio'/>",
        );
    }
    for (tag, why) in [
        ("virtualport", "Open vSwitch ports are not supported"),
        ("vlan", "the tag is set by the switch port, which is not the guest's any more"),
        ("filterref", "libvirt's filters work on the guest's own port, which the bridge does not see"),
        ("teaming", "teaming needs a passed-through device"),
    ] {
        if dev.get(tag).is_some() {
            found.add(format!("{what} with <{tag}>"), why, &format!("remove <{tag}>, do it on the bridge"));
        }
    }
    for tag in ["bandwidth", "coalesce", "mtu", "backend", "guest", "ip", "route", "script", "port"] {
        if dev.get(tag).is_some() {
            notes.push(format!("{what}: <{tag}> is not kept"));
            dev.remove(tag);
        }
    }
    let k = nics.len();
    let (guest_tap, bridge_tap) = (tap_name("hvg", guest, k), tap_name("hvb", guest, k));
    dev.set("type", "ethernet");
    dev.remove("source");
    dev.replace(Element::new("target").with("dev", &guest_tap).with("managed", "no"));
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
    nics.push(PlannedNic { guest_tap, bridge_tap, bridge, mac });
}

/// A balloon gives pages back without a write: write tracking does not see it.
fn balloon(devices: &mut Element, notes: &mut Vec<String>) {
    let none = devices.get("memballoon").is_some_and(|b| b.attr("model") == Some("none"));
    if !none {
        notes.push("the memory balloon goes (it discards memory unseen)".into());
        devices.replace(Element::new("memballoon").with("model", "none"));
    }
}

/// A monitor of our own, and no description at the end of device state.
fn commandline(d: &mut Element, run: &Path, notes: &mut Vec<String>) {
    d.set("xmlns:qemu", QEMU_NS);
    let c = d.ensure("qemu:commandline");
    if !c.children.is_empty() {
        notes.push("<qemu:commandline> is kept; havm does not check what it does".into());
    }
    let socket = qmp_socket(run);
    for a in [
        "-chardev".to_owned(),
        format!("socket,id={CHARDEV},path={},server=on,wait=off", socket.display()),
        "-mon".to_owned(),
        format!("chardev={CHARDEV},mode=control"),
        "-machine".to_owned(),
        "suppress-vmdesc=on".to_owned(),
    ] {
        c.children.push(Element::new("qemu:arg").with("value", &a));
    }
}

fn mark(d: &mut Element) {
    let m = d.ensure("metadata");
    m.children.push(Element::new("havm:protected").with("xmlns:havm", HAVM_NS));
    // libvirt puts metadata behind the title; the order matters only for a readable difference.
    if let Some(i) = d.children.iter().position(|c| c.name == "metadata") {
        let m = d.children.remove(i);
        let after = ["name", "uuid", "genid", "title", "description"];
        let at = d.children.iter().take_while(|c| after.contains(&c.name.as_str())).count();
        d.children.insert(at, m);
    }
    for late in ["memoryBacking"] {
        if let Some(i) = d.children.iter().position(|c| c.name == late) {
            let e = d.children.remove(i);
            let at = d
                .children
                .iter()
                .position(|c| c.name == "currentMemory")
                .or_else(|| d.children.iter().position(|c| c.name == "memory"))
                .map_or(i, |p| p + 1);
            d.children.insert(at, e);
        }
    }
}

fn files(d: &Element) -> Vec<PathBuf> {
    let mut out = Vec::new();
    if let Some(os) = d.get("os") {
        for tag in ["kernel", "initrd", "dtb", "loader"] {
            out.extend(os.all(tag).filter(|e| !e.text.is_empty()).map(|e| PathBuf::from(&e.text)));
        }
    }
    out
}

/// The definition for a node whose guest folder is another one.
pub fn relocate(domain: &Element, guest_run_dir: &Path) -> Element {
    let mut d = domain.clone();
    let mut k = 0;
    for dev in d.ensure("devices").children.iter_mut().filter(|e| e.name == "disk") {
        if dev.attr("type") != Some("network") {
            continue;
        }
        if let Some(h) = dev.children.iter_mut().find(|c| c.name == "source").and_then(|s| s.children.first_mut()) {
            h.set("socket", &nbd_socket(guest_run_dir, k).to_string_lossy());
        }
        k += 1;
    }
    let prefix = format!("socket,id={CHARDEV},");
    for a in &mut d.ensure("qemu:commandline").children {
        if a.attr("value").is_some_and(|v| v.starts_with(&prefix)) {
            a.set("value", &format!("{prefix}path={},server=on,wait=off", qmp_socket(guest_run_dir).display()));
        }
    }
    d
}

/// The definition of the waiting QEMU of a standby.
pub fn standby(full: &Element) -> Element {
    let mut d = full.clone();
    let c = d.ensure("qemu:commandline");
    c.children.push(Element::new("qemu:arg").with("value", "-incoming"));
    c.children.push(Element::new("qemu:arg").with("value", "defer"));
    d
}
