//! Guests that cannot be captured faithfully, each with its reason and a remedy.
//!
//! Write tracking sees what goes through QEMU's page table. It does not see memory that another process
//! maps, that a device writes by itself, or that the kernel writes through pages it holds pinned: a page
//! may be scanned and protected between the pinning and the write. Nor does it see a page that is
//! thrown away without a write (balloon).

use crate::blocks::{PAGE_BYTES, RamBlock};
use crate::error::CaptureError;
use havm_qmp::{Qmp, QmpError};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt;

/// One thing about a guest that capture cannot follow.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    /// The device or setting, as QEMU names it.
    pub what: String,
    /// Why it cannot be captured.
    pub reason: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.what, self.reason, self.remedy)
    }
}

struct Rule {
    /// What the name begins with.
    prefix: &'static str,
    reason: &'static str,
    remedy: &'static str,
}

const HARDWARE: &str = "real hardware writes guest memory unseen, and is not at the other host";
const EMULATED: &str = "use an emulated or virtio device";
const OTHER_PROCESS: &str = "another process writes guest memory, unseen by write tracking";
const DISCARDS: &str = "it throws pages away without a write, unseen by write tracking";
const THREE_D: &str = "its state is in the host's graphics card and cannot be saved";
const KERNEL_VHOST: &str = "a kernel thread does the guest's IO, past havm's barrier";

/// Device types, by QOM name.
const DEVICES: &[Rule] = &[
    Rule {
        prefix: "vfio",
        reason: HARDWARE,
        remedy: EMULATED,
    },
    Rule {
        prefix: "usb-host",
        reason: HARDWARE,
        remedy: EMULATED,
    },
    Rule {
        prefix: "scsi-generic",
        reason: HARDWARE,
        remedy: "use a disk that havm serves",
    },
    Rule {
        prefix: "scsi-block",
        reason: HARDWARE,
        remedy: "use a disk that havm serves",
    },
    Rule {
        prefix: "vhost-user",
        reason: OTHER_PROCESS,
        remedy: "use the plain virtio device",
    },
    Rule {
        prefix: "vhost-scsi",
        reason: KERNEL_VHOST,
        remedy: "use virtio-scsi with disks that havm serves",
    },
    Rule {
        prefix: "vhost-vsock",
        reason: KERNEL_VHOST,
        remedy: "remove the <vsock> device",
    },
    Rule {
        prefix: "vhost-vdpa",
        reason: HARDWARE,
        remedy: EMULATED,
    },
    Rule {
        prefix: "virtio-9p",
        reason: "files of this host are not at the other one",
        remedy: "remove the <filesystem> device",
    },
    Rule {
        prefix: "virtio-balloon",
        reason: DISCARDS,
        remedy: "set <memballoon model='none'/>",
    },
    Rule {
        prefix: "virtio-mem",
        reason: DISCARDS,
        remedy: "give the guest its memory at start",
    },
    Rule {
        prefix: "virtio-pmem",
        reason: "its file is not replicated",
        remedy: "use a disk that havm serves",
    },
    Rule {
        prefix: "nvdimm",
        reason: "its file is not replicated",
        remedy: "use a disk that havm serves",
    },
    Rule {
        prefix: "ivshmem",
        reason: OTHER_PROCESS,
        remedy: "remove the <shmem> device",
    },
    Rule {
        prefix: "virtio-gpu-gl",
        reason: THREE_D,
        remedy: "set <acceleration accel3d='no'/>",
    },
    Rule {
        prefix: "virtio-vga-gl",
        reason: THREE_D,
        remedy: "set <acceleration accel3d='no'/>",
    },
    Rule {
        prefix: "virtio-gpu-rutabaga",
        reason: THREE_D,
        remedy: "use <model type='virtio'/> without 3D",
    },
    Rule {
        prefix: "virtio-vga-rutabaga",
        reason: THREE_D,
        remedy: "use <model type='virtio'/> without 3D",
    },
];

/// Files that QEMU holds open. They show backends whose device has an ordinary name.
const OPEN_FILES: &[Rule] = &[
    Rule {
        prefix: "/dev/vfio/",
        reason: HARDWARE,
        remedy: EMULATED,
    },
    // Its worker writes through QEMU's page table, so tracking should see it; what was queued at a barrier
    // is not proven, and no test machine had it.
    Rule {
        prefix: "/dev/vhost-net",
        reason: KERNEL_VHOST,
        remedy: "set <driver name='qemu'/> for the interface",
    },
    Rule {
        prefix: "/dev/vhost-scsi",
        reason: KERNEL_VHOST,
        remedy: "use virtio-scsi with disks that havm serves",
    },
    Rule {
        prefix: "/dev/vhost-vsock",
        reason: KERNEL_VHOST,
        remedy: "remove the <vsock> device",
    },
    Rule {
        prefix: "/dev/vhost-vdpa",
        reason: HARDWARE,
        remedy: EMULATED,
    },
    Rule {
        prefix: "/dev/sev",
        reason: ENCRYPTED,
        remedy: "remove <launchSecurity>",
    },
];

const ENCRYPTED: &str = "the guest's memory is encrypted and cannot be copied";

/// More devices than any guest has.
const MAX_DEVICES: usize = 4096;

/// Everything about the guest behind `qmp` that capture cannot follow, sorted; empty for a good one.
///
/// # Errors
/// The monitor fails.
pub fn refusals(qmp: &mut Qmp) -> Result<Vec<Refusal>, CaptureError> {
    let blocks = crate::blocks::ram_blocks(qmp)?;
    check(qmp, &blocks)
}

pub(crate) fn check(qmp: &mut Qmp, blocks: &[RamBlock]) -> Result<Vec<Refusal>, CaptureError> {
    let mut found = BTreeSet::new();
    for (path, kind) in devices(qmp)? {
        if let Some(rule) = matching(DEVICES, &kind) {
            found.insert(rule.refuse(&kind));
        }
        let may_blob = kind.starts_with("virtio-gpu") || kind.starts_with("virtio-vga");
        if may_blob && property(qmp, &path, "blob")? == Value::Bool(true) {
            found.insert(Refusal {
                what: format!("{kind},blob=on"),
                reason: OTHER_PROCESS,
                remedy: "set blob='off' in the <video> model",
            });
        }
    }
    let confidential = property(qmp, "/machine", "confidential-guest-support")?;
    if confidential.as_str().is_some_and(|s| !s.is_empty()) {
        found.insert(Refusal {
            what: "confidential-guest-support".into(),
            reason: ENCRYPTED,
            remedy: "remove <launchSecurity>",
        });
    }
    for target in open_files(qmp.peer_pid())? {
        if let Some(rule) = matching(OPEN_FILES, &target) {
            found.insert(rule.refuse(&target));
        }
    }
    found.extend(disks(qmp)?);
    found.extend(memory(blocks));
    Ok(found.into_iter().collect())
}

impl Rule {
    fn refuse(&self, what: &str) -> Refusal {
        Refusal {
            what: what.to_owned(),
            reason: self.reason,
            remedy: self.remedy,
        }
    }
}

fn matching<'a>(rules: &'a [Rule], name: &str) -> Option<&'a Rule> {
    rules.iter().find(|r| name.starts_with(r.prefix))
}

/// Path and type of every device.
fn devices(qmp: &mut Qmp) -> Result<Vec<(String, String)>, CaptureError> {
    let mut all = Vec::new();
    for folder in [
        "/machine/peripheral",
        "/machine/peripheral-anon",
        "/machine/unattached",
    ] {
        let list = match qmp.execute("qom-list", json!({ "path": folder })) {
            Ok(list) => list,
            Err(QmpError::Command { .. }) => continue,
            Err(e) => return Err(e.into()),
        };
        for entry in list.as_array().into_iter().flatten().take(MAX_DEVICES) {
            let text = |k: &str| entry[k].as_str().unwrap_or_default();
            let kind = text("type")
                .strip_prefix("child<")
                .and_then(|t| t.strip_suffix('>'));
            if let Some(kind) = kind {
                all.push((format!("{folder}/{}", text("name")), kind.to_owned()));
            }
        }
    }
    Ok(all)
}

/// A property; null where there is none.
fn property(qmp: &mut Qmp, path: &str, name: &str) -> Result<Value, CaptureError> {
    match qmp.execute("qom-get", json!({ "path": path, "property": name })) {
        Ok(value) => Ok(value),
        Err(QmpError::Command { .. }) => Ok(Value::Null),
        Err(e) => Err(e.into()),
    }
}

fn open_files(pid: u32) -> Result<Vec<String>, CaptureError> {
    let dir =
        std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(|source| CaptureError::System {
            what: "list QEMU's open files",
            source,
        })?;
    let targets = dir
        .flatten()
        .filter_map(|e| std::fs::read_link(e.path()).ok());
    Ok(targets.map(|t| t.to_string_lossy().into_owned()).collect())
}

/// Disks that the host kernel reads straight into guest memory.
fn disks(qmp: &mut Qmp) -> Result<Vec<Refusal>, CaptureError> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let direct = nodes.as_array().into_iter().flatten().filter(|node| {
        let local = matches!(
            node["drv"].as_str(),
            Some("file" | "host_device" | "host_cdrom")
        );
        local && node["cache"]["direct"] == true
    });
    Ok(direct
        .map(|node| Refusal {
            what: format!(
                "disk {} (cache.direct=on)",
                node["file"].as_str().unwrap_or("?")
            ),
            reason: "the host kernel reads it into pinned guest pages, unseen by write tracking",
            remedy: "let havm serve the disk, or set cache='writeback'",
        })
        .collect())
}

/// Main memory that no shared file holds, or that is made of huge pages.
fn memory(blocks: &[RamBlock]) -> Vec<Refusal> {
    let mut found = Vec::new();
    if let Some(main) = blocks
        .iter()
        .max_by_key(|b| b.len)
        .filter(|b| !b.shared_file)
    {
        found.push(Refusal {
            what: format!("memory {}", main.name),
            reason: "the guest's RAM is not in a shared file, which a standby cannot be loaded from",
            remedy: "set <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>",
        });
    }
    for block in blocks.iter().filter(|b| b.page_bytes > PAGE_BYTES as u64) {
        found.push(Refusal {
            what: format!(
                "memory {} with pages of {} KiB",
                block.name,
                block.page_bytes / 1024
            ),
            reason: "one written byte would replicate the whole huge page",
            remedy: "remove <hugepages/> from <memoryBacking>",
        });
    }
    found
}

/// Whether the process runs its guest with KVM.
pub(crate) fn uses_kvm(pid: u32) -> bool {
    open_files(pid).is_ok_and(|all| all.iter().any(|t| t == "anon_inode:kvm-vm"))
}
