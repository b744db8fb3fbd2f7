//! What the figures were measured on: a figure without it says nothing.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::process::Command;

/// The machine, as the report tells it.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// In a few words: how guests are run, and how many cores there are.
    pub class: String,
    /// Cores.
    pub cores: usize,
    /// What the first core calls itself.
    pub cpu: String,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// The kernel.
    pub kernel: String,
    /// QEMU, as it introduces itself.
    pub qemu: String,
    /// Seconds since 1970, UTC, at the start.
    pub started_unix_s: u64,
    /// Load averages (1, 5, 15 minutes) at the start: the others on this machine.
    pub load: [f64; 3],
}

/// Looks at this machine.
///
/// # Errors
/// No /proc, or no QEMU.
pub fn describe() -> Result<Machine> {
    let cores = std::thread::available_parallelism()?.get();
    let cpuinfo = read("/proc/cpuinfo")?;
    let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name"));
    let cpu = cpu.map_or("unknown", |l| l.trim_start_matches([' ', '\t', ':']));
    let qemu = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .context("qemu-system-x86_64 is not installed: run scripts/deps.sh")?;
    let qemu = String::from_utf8_lossy(&qemu.stdout);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(Machine {
        // The bench's own guests ask for TCG, so that machines with and without KVM compare.
        class: format!("QEMU TCG (no KVM), {cores} cores"),
        cores,
        cpu: cpu.to_owned(),
        memory_mib: meminfo_mib("MemTotal")?,
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        qemu: qemu.lines().next().unwrap_or("unknown").to_owned(),
        started_unix_s: now.as_secs(),
        load: load()?,
    })
}

/// Load averages of 1, 5 and 15 minutes.
///
/// # Errors
/// No /proc.
pub fn load() -> Result<[f64; 3]> {
    let text = read("/proc/loadavg")?;
    let v: Vec<f64> = text
        .split(' ')
        .take(3)
        .map_while(|w| w.parse().ok())
        .collect();
    match v[..] {
        [a, b, c] => Ok([a, b, c]),
        _ => bail!("/proc/loadavg says {text:?}"),
    }
}

/// Fails unless so much memory is free: a machine that swaps measures its disk.
///
/// # Errors
/// It is not.
pub fn need_memory(mib: u64) -> Result<()> {
    let free = meminfo_mib("MemAvailable")?;
    if free < mib {
        bail!("needs {mib} MiB of free memory, there are {free}");
    }
    Ok(())
}

fn meminfo_mib(key: &str) -> Result<u64> {
    let text = read("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map(|k| k / 1024)
        .with_context(|| format!("/proc/meminfo has no {key}"))
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {path}"))
}
