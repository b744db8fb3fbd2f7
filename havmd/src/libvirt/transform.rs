//! An ordinary domain becomes one that can be protected. Pure: definition in, definition out.
//!
//! ```text
//!   original ──protect──> definition ──(libvirt defines it on the home node, adds addresses)──> full
//!   full ──relocate──> the peer's definition           full ──standby──> the waiting QEMU's
//! ```
//! What each change is for stands beside it; the facts are those tried in the lab.

use super::devices::{disk, nic};
use super::refuse::{Found, Refusals, check};
use super::tree::Element;
use havm_core::ids::GuestName;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
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
    /// Every machine type and alias that this host's QEMU has.
    pub machines: BTreeSet<String>,
    /// The bridge of each libvirt network.
    pub network_bridges: BTreeMap<String, String>,
    /// The user and group that QEMU runs as.
    pub qemu_ids: (u32, u32),
}

impl Host {
    /// Whether a guest of this versioned type can run here.
    pub fn knows_machine(&self, full: &str) -> bool {
        self.machines.contains(full) || self.machine_aliases.values().any(|v| v == full)
    }
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

/// Whether the definition is one of ours already.
pub fn is_protected(domain: &Element) -> bool {
    domain.get("metadata").is_some_and(|m| {
        m.children
            .iter()
            .any(|c| c.attrs.iter().any(|(_, v)| v == HAVM_NS))
    })
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
        found.add(
            "it is protected already",
            "its definition is havm's",
            "havm unprotect it first",
        );
        return Err(Refusals(found.0));
    }
    check(original, &mut found);
    let mut d = original.clone();
    let mut notes = Vec::new();
    d.unset("id");
    let machine = machine(&mut d, host, &mut found);
    memory(&mut d, &mut notes);
    cpu(&mut d, &mut notes);
    for (tag, value) in [
        ("on_poweroff", "destroy"),
        ("on_reboot", "restart"),
        ("on_crash", "destroy"),
    ] {
        d.replace(Element::new(tag).text(value));
    }
    let boots_from_net = d
        .get("os")
        .is_some_and(|o| o.all("boot").any(|b| b.attr("dev") == Some("network")));
    let mut disks = Vec::new();
    let mut nics = Vec::new();
    let devices = d.ensure("devices");
    for dev in &mut devices.children {
        dev.remove("alias");
        match dev.name.as_str() {
            "disk" => disk(dev, guest_run_dir, &mut disks, &mut found),
            "interface" => nic(
                dev,
                guest,
                host,
                boots_from_net,
                &mut nics,
                &mut found,
                &mut notes,
            ),
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
    Ok(Plan {
        domain: d,
        machine,
        disks,
        nics,
        files,
        notes,
    })
}

/// A saved device state only loads into the same versioned machine type.
fn machine(d: &mut Element, host: &Host, found: &mut Found) -> String {
    let kind = d.ensure("os").ensure("type");
    let named = kind.attr("machine").unwrap_or("pc").to_owned();
    let full = host
        .machine_aliases
        .get(&named)
        .cloned()
        .unwrap_or_else(|| named.clone());
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
        c.get("model").is_some()
            && !matches!(
                c.attr("mode"),
                Some("host-model" | "host-passthrough" | "maximum")
            )
    });
    if named || d.attr("type") != Some("qemu") {
        return;
    }
    let mut new = Element::new("cpu")
        .with("mode", "custom")
        .with("match", "exact")
        .with("check", "none");
    new.children.push(
        Element::new("model")
            .with("fallback", "forbid")
            .text("qemu64"),
    );
    if let Some(t) = d.get("cpu").and_then(|c| c.get("topology")) {
        new.children.push(t.clone());
    }
    notes.push("the CPU model becomes qemu64, which every server can show".into());
    d.replace(new);
}

/// A balloon gives pages back without a write: write tracking does not see it.
fn balloon(devices: &mut Element, notes: &mut Vec<String>) {
    let none = devices
        .get("memballoon")
        .is_some_and(|b| b.attr("model") == Some("none"));
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
    // QEMU splits its options at commas; a doubled one is a comma.
    let socket = qmp_socket(run).to_string_lossy().replace(',', ",,");
    for a in [
        "-chardev".to_owned(),
        format!("socket,id={CHARDEV},path={socket},server=on,wait=off"),
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
    m.children
        .push(Element::new("havm:protected").with("xmlns:havm", HAVM_NS));
    // libvirt puts metadata behind the title; the order matters only for a readable difference.
    if let Some(i) = d.children.iter().position(|c| c.name == "metadata") {
        let m = d.children.remove(i);
        let after = ["name", "uuid", "genid", "title", "description"];
        let at = d
            .children
            .iter()
            .take_while(|c| after.contains(&c.name.as_str()))
            .count();
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
            out.extend(
                os.all(tag)
                    .filter(|e| !e.text.is_empty())
                    .map(|e| PathBuf::from(&e.text)),
            );
        }
    }
    out
}

/// The definition for a node whose guest folder is another one.
pub fn relocate(domain: &Element, guest_run_dir: &Path) -> Element {
    let mut d = domain.clone();
    let mut k = 0;
    for dev in d
        .ensure("devices")
        .children
        .iter_mut()
        .filter(|e| e.name == "disk")
    {
        if dev.attr("type") != Some("network") {
            continue;
        }
        if let Some(h) = dev
            .children
            .iter_mut()
            .find(|c| c.name == "source")
            .and_then(|s| s.children.first_mut())
        {
            h.set("socket", &nbd_socket(guest_run_dir, k).to_string_lossy());
        }
        k += 1;
    }
    let prefix = format!("socket,id={CHARDEV},");
    for a in &mut d.ensure("qemu:commandline").children {
        if a.attr("value").is_some_and(|v| v.starts_with(&prefix)) {
            a.set(
                "value",
                &format!(
                    "{prefix}path={},server=on,wait=off",
                    qmp_socket(guest_run_dir).display()
                ),
            );
        }
    }
    d
}

/// The definition of the waiting QEMU of a standby.
pub fn standby(full: &Element) -> Element {
    let mut d = full.clone();
    let c = d.ensure("qemu:commandline");
    c.children
        .push(Element::new("qemu:arg").with("value", "-incoming"));
    c.children
        .push(Element::new("qemu:arg").with("value", "defer"));
    d
}
