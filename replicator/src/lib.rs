//! The data plane of one guest on one host: a process that outlives its daemon.
//!
//! `machine` takes orders and holds the role; `primary` is the guest's thread (capture, epochs, sync);
//! `acks` hears the standby and opens the gate; `standby` receives, acks and commits.

pub mod acks;
pub mod control;
pub mod disks;
pub mod input;
pub mod machine;
pub mod nics;
pub mod pacing;
pub mod primary;
pub mod standby;
pub mod standing;
pub mod start;
pub mod stats;

use anyhow::{Context, Result};
use control::Reports;
use havm_core::order::Report;
use havm_core::spec::Spec;
use machine::{Env, Machine};
use std::sync::mpsc::channel;

/// Runs a replicator until it is told to leave.
///
/// # Errors
/// It cannot start (the text names the remedy), or its copy of the guest is spoilt.
pub fn run(spec: Spec) -> Result<()> {
    let run_dir = spec.run_dir.clone();
    let (env, warnings) = Env::open(spec)?;
    let (inputs, inbox) = channel();
    // A QEMU that outlived an earlier replicator would write at once: it waits for the first order.
    if !env.has_guest() {
        env.serve()?;
    }
    let reports = Reports::default();
    start::write_pid_file(&run_dir)?;
    let socket = Spec::control_socket(&run_dir);
    control::serve(&socket, reports.clone(), inputs.clone())
        .with_context(|| format!("listen at {}", socket.display()))?;
    tracing::info!(socket = %socket.display(), "ready for orders");
    let mut machine = Machine::new(env, reports, inputs, inbox);
    for text in warnings {
        tracing::warn!(text);
        machine.warn(Report::Warning { text });
    }
    let result = machine.run();
    let _ = std::fs::remove_file(&socket);
    result
}
