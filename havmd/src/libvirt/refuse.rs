//! Which guests cannot be protected, why, and what the admin can do about it. All reasons at once.

use super::tree::Element;
use std::fmt;

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusal {
    /// What is in the definition.
    pub what: String,
    /// Why it cannot be protected.
    pub why: String,
    /// What to do.
    pub remedy: String,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusals(pub Vec<Refusal>);

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0.len();
        writeln!(
            f,
            "this guest cannot be protected as it is ({n} reason{}):",
            if n == 1 { "" } else { "s" }
        )?;
        for r in &self.0 {
            writeln!(f, "  - {}: {}", r.what, r.why)?;
            writeln!(f, "    remedy: {}", r.remedy)?;
        }
        Ok(())
    }
}
impl std::error::Error for Refusals {}

/// Collects what is found.
#[derive(Default)]
pub(super) struct Found(pub Vec<Refusal>);

impl Found {
    pub fn add(&mut self, what: impl Into<String>, why: &str, remedy: &str) {
        self.0.push(Refusal {
            what: what.into(),
            why: why.to_owned(),
            remedy: remedy.to_owned(),
        });
    }
}

/// Devices that are refused wherever they stand: tag below `<devices>`, why, remedy.
const DEVICES: &[(&str, &str, &str)] = &[
    (
        "hostdev",
        "a passed-through device writes guest memory unseen and has state that cannot be saved",
        "remove it (virsh detach-device), or use a virtio device instead",
    ),
    (
        "filesystem",
        "virtio-fs and 9p keep state in a process outside QEMU, and their files are not replicated",
        "remove it and use a network file system or a disk",
    ),
    (
        "shmem",
        "shared memory is written by other processes, unseen by write tracking",
        "remove it",
    ),
    (
        "tpm",
        "the TPM's state lives in a process outside QEMU and is not replicated",
        "remove the tpm device",
    ),
    (
        "redirdev",
        "a redirected USB device cannot follow the guest",
        "remove it",
    ),
    (
        "smartcard",
        "a smart card cannot follow the guest",
        "remove it",
    ),
    (
        "vsock",
        "vhost-vsock keeps its state in the host's kernel",
        "remove it and use a TCP connection or the guest agent's channel",
    ),
    (
        "crypto",
        "virtio-crypto cannot be saved and restored",
        "remove it",
    ),
    (
        "memory",
        "memory modules (dimm, nvdimm, virtio-mem) are not captured",
        "remove them and give the guest its memory in <memory>",
    ),
];

/// Looks for everything that a transformation cannot mend.
pub(super) fn check(domain: &Element, found: &mut Found) {
    match domain.attr("type") {
        Some("kvm" | "qemu") => {}
        t => found.add(
            format!("<domain type='{}'>", t.unwrap_or("")),
            "only QEMU guests (kvm or qemu) can be protected",
            "use type='kvm', or type='qemu' where the server has no KVM",
        ),
    }
    check_os(domain, found);
    check_memory(domain, found);
    check_cpu(domain, found);
    let empty = Element::new("devices");
    let devices = domain.get("devices").unwrap_or(&empty);
    for (tag, why, remedy) in DEVICES {
        for d in devices.all(tag) {
            let model = d
                .attr("type")
                .or(d.attr("model"))
                .map(|t| format!(" '{t}'"));
            found.add(format!("<{tag}>{}", model.unwrap_or_default()), why, remedy);
        }
    }
    for v in devices.all("video") {
        let model = v.get("model");
        let kind = model.and_then(|m| m.attr("type")).unwrap_or("default");
        let accel = model
            .and_then(|m| m.get("acceleration"))
            .is_some_and(|a| a.attr("accel3d") == Some("yes"));
        if accel || matches!(kind, "qxl" | "vmvga" | "xen" | "gop" | "parallels") {
            found.add(
                format!(
                    "<video> model '{kind}'{}",
                    if accel { " with 3D acceleration" } else { "" }
                ),
                "its memory is written or kept outside of what can be captured",
                "use <model type='vga'/>, or <model type='none'/> with a serial console",
            );
        }
    }
    for g in devices.all("graphics") {
        let gl = g.get("gl").is_some_and(|x| x.attr("enable") == Some("yes"));
        if gl || g.attr("type") == Some("egl-headless") {
            found.add(
                "<graphics> with OpenGL",
                "its state is in the host's GPU",
                "turn gl off",
            );
        }
    }
    for c in devices.all("controller") {
        if c.attr("model") == Some("vhost-scsi") {
            found.add(
                "vhost-scsi controller",
                "the host kernel writes guest memory unseen",
                "use virtio-scsi",
            );
        }
    }
}

fn check_os(domain: &Element, found: &mut Found) {
    let Some(os) = domain.get("os") else { return };
    match os.get("type").and_then(|t| t.attr("arch")) {
        Some("x86_64") | None => {}
        Some(a) => found.add(
            format!("architecture {a}"),
            "capture is written for x86_64",
            "there is none on other machines yet",
        ),
    }
    let pflash = os
        .get("loader")
        .is_some_and(|l| l.attr("type") == Some("pflash"));
    if pflash || os.get("nvram").is_some() || os.attr("firmware") == Some("efi") {
        found.add(
            "UEFI firmware with an NVRAM file",
            "the NVRAM file is written by QEMU and is not replicated",
            "boot with BIOS (remove <loader>, <nvram> and firmware='efi')",
        );
    }
}

fn check_memory(domain: &Element, found: &mut Found) {
    if domain.get("maxMemory").is_some() {
        found.add(
            "<maxMemory>",
            "hot-plugged memory is not captured",
            "remove <maxMemory>",
        );
    }
    if domain.at(&["memoryBacking", "hugepages"]).is_some() {
        let memfd = domain
            .at(&["memoryBacking", "source"])
            .is_some_and(|s| s.attr("type") == Some("memfd"));
        found.add(
            format!("<hugepages>{}", if memfd { " as memfd" } else { "" }),
            "written pages would be seen as 2 MiB at a time, and a memfd has no name to map",
            "remove <hugepages>; transparent huge pages stay possible",
        );
    }
    if domain.get("launchSecurity").is_some() {
        found.add(
            "<launchSecurity>",
            "encrypted guest memory cannot be read from outside",
            "remove <launchSecurity>",
        );
    }
    let cells = domain
        .at(&["cpu", "numa"])
        .map_or(0, |n| n.all("cell").count());
    if cells > 1 {
        found.add(
            format!("{cells} NUMA cells"),
            "only one memory block is captured as guest RAM",
            "remove <numa> from <cpu>",
        );
    }
}

fn check_cpu(domain: &Element, found: &mut Found) {
    let mode = domain.get("cpu").and_then(|c| c.attr("mode"));
    if domain.attr("type") == Some("kvm")
        && let Some(m @ ("host-passthrough" | "host-model" | "maximum")) = mode
    {
        found.add(
            format!("<cpu mode='{m}'>"),
            "the guest would see another CPU on the other server",
            "name a model that both servers can run (`virsh domcapabilities` on both lists them), \
             for example <cpu mode='custom' match='exact'><model>x86-64-v2</model></cpu>",
        );
    }
}
