//! A guest in the daemon: its engine and its hands, and what is found of it at start.

use super::Input;
use super::shared::Shared;
use crate::driver::qemu::Qemu;
use crate::driver::{Driver, Outside};
use crate::guests::{GuestFile, make_run_folders};
use crate::identity_store::Myself;
use crate::libvirt::conn::Libvirt;
use crate::record::RecordStore;
use crate::replicators::{Place, Replicator};
use havm_core::engine::{Engine, Identity};
use havm_core::event::{Event, Started, WitnessReply};
use havm_core::ids::GuestName;
use havm_core::spec::Spec;
use std::sync::Arc;
use std::time::Duration;

/// How long the witness may take to answer a request; the engine asks again after less.
const WITNESS: Duration = Duration::from_millis(1000);

/// A guest in the loop.
pub struct Running {
    /// Decides.
    pub engine: Engine,
    /// Acts.
    pub driver: Driver,
}

/// A guest that is about to be in the loop, and what its engine hears first.
pub struct Born {
    /// Which.
    pub guest: GuestName,
    /// Or why it cannot be.
    pub parts: Result<(Running, Started), String>,
}

/// Looks for what outlived the last daemon, and posts [`Input::Born`].
pub fn look_for(shared: Arc<Shared>, guest: GuestName) {
    tokio::spawn(async move {
        let parts = build(&shared, &guest).await;
        let _ = shared
            .inputs
            .send(Input::Born(Box::new(Born { guest, parts })));
    });
}

async fn build(shared: &Arc<Shared>, guest: &GuestName) -> Result<(Running, Started), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let file = GuestFile::load(&shared.paths, guest)
        .map_err(|e| text(&e))?
        .ok_or_else(|| format!("guest {guest} has no guest.json in the state folder"))?;
    make_run_folders(&shared.paths, guest, shared.qemu_ids)
        .map_err(|e| format!("the run folder of guest {guest}: {e}"))?;
    let post = shared.post(guest);
    let libvirt =
        Libvirt::start(&shared.config.libvirt.uri, guest.as_str()).map_err(|e| text(&e))?;
    let qemu = Qemu::new(
        guest.clone(),
        shared.paths.clone(),
        libvirt,
        shared.qemu_ids,
        post.clone(),
    );
    let replicator = Replicator::new(Place {
        program: shared.replicator.clone(),
        run_dir: shared.paths.run(guest),
        unit: format!("havm-replicator-{guest}"),
    });
    let (store, opened) = RecordStore::open(&shared.paths.state_dir, guest, shared.me.node);
    for w in opened.warnings {
        shared.say(Some(guest), havm_core::command::Severity::Warning, w);
    }
    // QEMU first: an adopted replicator's reports must find its engine knowing of the process.
    let outlived = qemu.outlived().await;
    let replica = replicator.adopt(&post).await;
    let started = Started {
        record: opened.found,
        replica,
        life: outlived.life,
        waiting: outlived.waiting,
        ended_on_purpose: outlived.ended_on_purpose,
    };
    let policy = file.policy(&shared.config);
    let identity = Identity {
        me: shared.me.node,
        peer: shared.pair.peer,
        guest: guest.clone(),
        at_home: policy.home == shared.config.node.name,
    };
    let engine = Engine::new(identity, shared.engine_settings(&policy));
    let driver = Driver::new(
        guest.clone(),
        store,
        replicator,
        qemu,
        outside(shared),
        shared.events.clone(),
        post,
    );
    Ok((Running { engine, driver }, started))
}

fn outside(shared: &Arc<Shared>) -> Outside {
    let (peer, witness, spec) = (shared.peer.clone(), shared.clone(), shared.clone());
    Outside {
        send: Arc::new(move |envelope| {
            // Lost where no link is up: the engine repeats what it needs.
            let _ = peer.send(envelope);
        }),
        witness: Arc::new(move |guest, request, post| {
            let (witness, guest) = (witness.clone(), guest.clone());
            tokio::spawn(async move {
                let reply = match witness.witness() {
                    Some(w) => w.request(&guest, request, WITNESS).await,
                    None => WitnessReply::NotDelivered,
                };
                post(Event::Witness(reply));
            });
        }),
        write_spec: Arc::new(move |guest| write_spec(&spec, guest)),
    }
}

fn write_spec(shared: &Shared, guest: &GuestName) -> std::io::Result<()> {
    let file = GuestFile::load(&shared.paths, guest)?.ok_or(std::io::ErrorKind::NotFound)?;
    make_run_folders(&shared.paths, guest, shared.qemu_ids)?;
    let spec = file.spec(
        &shared.paths,
        &shared.config,
        &Myself::identity_dir(&shared.config.node.state_dir),
        &shared.pair.peer_fingerprint.to_string(),
        shared.qemu_ids,
    );
    let path = Spec::path(&shared.paths.run(guest));
    let aside = path.with_extension("json.tmp");
    std::fs::write(&aside, serde_json::to_vec_pretty(&spec)?)?;
    std::fs::rename(aside, path)
}
