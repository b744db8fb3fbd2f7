//! `havm protect` and `unprotect`: the steps that turn an ordinary domain into a protected pair of
//! definitions, and back.
//!
//! ```text
//!   look:   definition -> plan (or refusals) -> peer prepares (obstacles) -> difference shown
//!   do:     guest off -> define here -> witness key -> peer installs (its engine: InitStandby)
//!           -> files here -> InitPrimary: the engine starts the guest and goes on from there
//! ```
//! Everything before the last two steps is undone where a later one fails.

use super::remote::{Ask, SameFile, Told, hash_of, size_of};
use super::shared::Shared;
use crate::control::Answers;
use crate::guests::{self, GUEST_VERSION, GuestDisk, GuestFile, MAX_GUESTS};
use crate::libvirt::conn::DomState;
use crate::libvirt::transform::{Plan, protect};
use crate::libvirt::tree::{Element, unified_diff};
use havm_core::event::Operator;
use havm_core::ids::{GuestName, Term};
use havm_core::record::Role;
use havm_core::status::Safety;
use std::time::Duration;

/// How long a clean shutdown may take.
const SHUTDOWN: Duration = Duration::from_secs(90);
/// Between two looks whether it is off.
const LOOK: Duration = Duration::from_millis(200);
/// The power button is pressed every so many looks.
const PRESS_EVERY_LOOKS: u32 = 25;
/// How long the peer may take for a step.
const PEER: Duration = Duration::from_secs(60);
/// How long the peer may take to tell its config: nothing is done before.
const AGREEMENT: Duration = Duration::from_secs(5);
/// How long the witness may take.
const WITNESS: Duration = Duration::from_secs(3);

/// What `protect` was asked for.
pub struct Wish {
    /// Which guest.
    pub guest: GuestName,
    /// Only look.
    pub dry_run: bool,
    /// Its home.
    pub home: Option<String>,
    /// It may be shut down.
    pub restart: bool,
}

struct Look {
    original: String,
    plan: Plan,
    file: GuestFile,
    running: bool,
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

impl Shared {
    /// `havm protect`; the text is for the person who asked.
    pub async fn protect(&self, wish: &Wish, say: &Answers) -> Result<String, String> {
        let guest = &wish.guest;
        let look = self.look(wish, say).await?;
        if wish.dry_run {
            return Ok("nothing was changed (--dry-run)".into());
        }
        if look.running {
            if !wish.restart {
                return Err(format!(
                    "guest {guest} runs: its disks and NICs can be put under havm only while it is off. \
                     Shut it down and ask again, or let havm do so now with --restart"
                ));
            }
            self.shut_down(guest, say).await?;
        }
        say.progress("defining the guest anew").await;
        let full = self
            .libvirt
            .define(look.plan.domain.to_xml())
            .await
            .map_err(text)?;
        if let Err(why) = self.install_pair(&look, &full, say).await {
            let undone = self.libvirt.define(look.original.clone()).await;
            let _ = guests::forget(&self.paths, guest);
            let undone = undone.map_or_else(
                |e| format!("; the old definition could NOT be put back: {e}"),
                |_| String::new(),
            );
            return Err(format!("{why}; everything was undone{undone}"));
        }
        self.take_in(guest, Some(Operator::InitPrimary)).await?;
        Ok(format!(
            "guest {guest} is under havm; its first synchronisation begins"
        ))
    }

    async fn look(&self, wish: &Wish, say: &Answers) -> Result<Look, String> {
        let guest = &wish.guest;
        if self.guest_status(guest).await.is_some() {
            return Err(format!(
                "guest {guest} is protected already: `havm status {guest}`"
            ));
        }
        let (all, _) = GuestFile::all(&self.paths);
        if all.len() >= MAX_GUESTS {
            return Err(format!(
                "{MAX_GUESTS} guests are protected here, which is the bound"
            ));
        }
        let home = self.home_of(wish)?;
        self.agree().await?;
        let original = self
            .libvirt
            .inactive_xml(guest.as_str())
            .await
            .map_err(text)?;
        let host = self.libvirt.host().await.map_err(text)?;
        let tree = Element::parse(&original).map_err(text)?;
        let plan = protect(&tree, guest, &self.paths.run(guest), &host).map_err(text)?;
        say.progress(unified_diff(
            &tree.to_xml(),
            &plan.domain.to_xml(),
            "now",
            "protected",
        ))
        .await;
        for n in &plan.notes {
            say.progress(format!("note: {n}")).await;
        }
        let mut disks = Vec::new();
        for d in &plan.disks {
            let size_bytes = size_of(&d.path)
                .map_err(|e| format!("disk {} ({}): {e}", d.target, d.path.display()))?;
            if size_bytes == 0 || size_bytes % 512 != 0 {
                return Err(format!(
                    "disk {} ({}) has {size_bytes} bytes: a disk's size is a multiple of 512",
                    d.target,
                    d.path.display()
                ));
            }
            disks.push(GuestDisk {
                path: d.path.clone(),
                size_bytes,
                block: d.block,
            });
        }
        let file = GuestFile {
            version: GUEST_VERSION,
            guest: guest.clone(),
            home,
            machine: plan.machine.clone(),
            disks,
            nics: plan.nics.clone(),
        };
        let mut same = Vec::new();
        for path in plan.files.clone() {
            let p = path.clone();
            let hash = tokio::task::spawn_blocking(move || hash_of(&p))
                .await
                .map_err(text)?;
            let hash = hash.map_err(|e| format!("{}: {e}", path.display()))?;
            same.push(SameFile { path, hash });
        }
        match self
            .ask_peer(
                &Ask::Prepare {
                    file: file.clone(),
                    same,
                },
                PEER,
            )
            .await?
        {
            Told::Obstacles { list } if list.is_empty() => {}
            Told::Obstacles { list } => {
                let list: Vec<String> = list.iter().take(50).map(|l| format!("  - {l}")).collect();
                return Err(format!(
                    "the peer cannot be its standby yet:\n{}",
                    list.join("\n")
                ));
            }
            other => return Err(format!("the peer gave an unexpected answer: {other:?}")),
        }
        let running = matches!(
            self.libvirt.state(guest.as_str()).await.map_err(text)?,
            DomState::Up { .. }
        );
        Ok(Look {
            original,
            plan,
            file,
            running,
        })
    }

    fn home_of(&self, wish: &Wish) -> Result<String, String> {
        let (here, there) = (&self.config.node.name, &self.config.peer.name);
        let configured = self.config.guest(&wish.guest).map(|g| g.home.clone());
        let home = match (&wish.home, configured) {
            (Some(h), Some(c)) if *h != c => {
                return Err(format!(
                    "the config says that {c} is its home; change it there, or leave --home out"
                ));
            }
            (Some(h), _) => h.clone(),
            (None, Some(c)) => c,
            (None, None) => here.clone(),
        };
        if home == *here || home == *there {
            Ok(home)
        } else {
            Err(format!("--home {home}: the nodes are {here} and {there}"))
        }
    }

    /// Both configs must say the same.
    pub async fn agree(&self) -> Result<(), String> {
        let asked = self.ask_peer(&Ask::Agreement, AGREEMENT).await.map_err(|e| {
            format!(
                "{} does not answer: is it on, does havmd run there, and do the links carry heartbeats (`havm status`)? ({e})",
                self.config.peer.name
            )
        })?;
        match asked {
            Told::Agreement { agreement } => {
                let differences = self.config.agreement().differences(&agreement);
                if differences.is_empty() {
                    return Ok(());
                }
                let list: Vec<String> = differences.iter().map(|d| format!("  - {d}")).collect();
                Err(format!(
                    "the configs of both nodes differ; make them agree and restart havmd:\n{}",
                    list.join("\n")
                ))
            }
            other => Err(format!("the peer gave an unexpected answer: {other:?}")),
        }
    }

    async fn shut_down(&self, guest: &GuestName, say: &Answers) -> Result<(), String> {
        say.progress(format!(
            "shutting guest {guest} down (at most {} s)",
            SHUTDOWN.as_secs()
        ))
        .await;
        let end = tokio::time::Instant::now() + SHUTDOWN;
        for look in 0u32.. {
            // Pressed again and again: a guest that still boots does not see the first one.
            if look % PRESS_EVERY_LOOKS == 0 {
                self.libvirt.shutdown(guest.as_str()).await.map_err(text)?;
            }
            tokio::time::sleep(LOOK).await;
            let state = self.libvirt.state(guest.as_str()).await.map_err(text)?;
            if !matches!(state, DomState::Up { .. }) {
                return Ok(());
            }
            if tokio::time::Instant::now() > end {
                break;
            }
        }
        Err(format!(
            "guest {guest} did not shut down within {} s (does it listen to ACPI?); shut it down yourself and ask again",
            SHUTDOWN.as_secs()
        ))
    }

    async fn install_pair(&self, look: &Look, full: &str, say: &Answers) -> Result<(), String> {
        let guest = &look.file.guest;
        guests::store_original_xml(&self.paths, guest, &look.original).map_err(text)?;
        guests::store_domain_xml(&self.paths, guest, full).map_err(text)?;
        if let Some(w) = self.witness() {
            say.progress("making the guest's register at the witness")
                .await;
            w.create_key(guest, Term(1), self.me.node, WITNESS)
                .await
                .map_err(text)?;
        }
        say.progress(format!("installing the guest on {}", self.config.peer.name))
            .await;
        let install = Ask::Install {
            file: look.file.clone(),
            domain_xml: full.to_owned(),
            original_xml: look.original.clone(),
        };
        let done = match self.ask_peer(&install, PEER).await {
            Ok(Told::Done) => look.file.store(&self.paths).map_err(text),
            Ok(Told::Failed { why }) => Err(why),
            Ok(other) => Err(format!("the peer gave an unexpected answer: {other:?}")),
            Err(e) => Err(e),
        };
        if done.is_err() {
            let _ = self
                .ask_peer(
                    &Ask::Remove {
                        guest: guest.clone(),
                    },
                    PEER,
                )
                .await;
            if let Some(w) = self.witness() {
                let _ = w.remove_key(guest, WITNESS).await;
            }
        }
        done
    }

    /// `havm unprotect`, at the node that runs the guest. Every step may find its work done already,
    /// so that an interrupted one can be asked for again.
    pub async fn unprotect(
        &self,
        guest: &GuestName,
        restart: bool,
        say: &Answers,
    ) -> Result<String, String> {
        let there = &self.config.peer.name;
        let s = self
            .guest_status(guest)
            .await
            .ok_or("the guest is not protected here")?;
        if !matches!(s.role, Some(Role::Solo | Role::Protected)) {
            return Err(format!("guest {guest} runs at {there}: unprotect it there"));
        }
        let runs = s.safety != Safety::Stopped;
        if runs && !restart {
            return Err(format!(
                "guest {guest} runs: its disks and NICs can go back to libvirt only while it is off. \
                 `havm stop {guest}` and ask again, or let havm restart it with --restart"
            ));
        }
        let original = guests::original_xml(&self.paths, guest)
            .map_err(text)?
            .ok_or("its original definition is not in havm's state folder; nothing was changed")?;
        self.operate(guest, Operator::Unprotect).await?;
        say.progress("ending the replication").await;
        self.wait(guest, "the standby to give way", |s| {
            s.role == Some(Role::Solo)
        })
        .await?;
        let remove = Ask::Remove {
            guest: guest.clone(),
        };
        match self.ask_peer(&remove, PEER).await {
            Ok(Told::Done) => {}
            Ok(Told::Failed { why }) => return Err(format!("{there}: {why}; ask again")),
            Ok(other) => return Err(format!("the peer gave an unexpected answer: {other:?}")),
            Err(e) => {
                return Err(format!(
                    "{e}; the guest runs on without protection, ask again when {there} is back"
                ));
            }
        }
        if runs && self.guest_status(guest).await.is_some() {
            say.progress("shutting the guest down: its disks and NICs go back to libvirt")
                .await;
            self.operate(guest, Operator::Stop).await?;
        }
        self.wait(guest, "the guest to stop", |s| {
            s.safety == Safety::Stopped && s.life.is_none()
        })
        .await?;
        self.forget(guest).await?;
        if let Some(w) = self.witness()
            && let Err(e) = w.remove_key(guest, WITNESS).await
        {
            say.progress(format!("the witness keeps the guest's register: {e}"))
                .await;
        }
        self.libvirt.define(original).await.map_err(text)?;
        let disk = format!("its disk on {there} stays");
        if runs {
            self.libvirt
                .start_defined(guest.as_str())
                .await
                .map_err(text)?;
            return Ok(format!(
                "guest {guest} runs without havm, by its original definition; {disk}"
            ));
        }
        Ok(format!(
            "guest {guest} has its original definition again and is shut off (`virsh start {guest}` runs it); {disk}"
        ))
    }

    /// Has the record removed; the engine does so as soon as the last process is gone.
    async fn forget(&self, guest: &GuestName) -> Result<(), String> {
        for _ in 0..60 {
            if self.guest_status(guest).await.is_none() {
                return Ok(());
            }
            // Refused while a process still ends: asked again below.
            let _ = self.operate(guest, Operator::Unprotect).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Err("the guest's record could not be removed in time; ask again".into())
    }

    async fn wait(
        &self,
        guest: &GuestName,
        what: &str,
        reached: impl Fn(&havm_core::status::GuestStatus) -> bool,
    ) -> Result<(), String> {
        let end = tokio::time::Instant::now() + SHUTDOWN + Duration::from_secs(30);
        while tokio::time::Instant::now() < end {
            if self.guest_status(guest).await.is_none_or(|s| reached(&s)) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(format!(
            "waited in vain for {what}; see `havm status {guest}`, then ask again"
        ))
    }

    /// Asks the peer's daemon.
    pub async fn ask_peer(&self, ask: &Ask, deadline: Duration) -> Result<Told, String> {
        let question = serde_json::to_value(ask).map_err(text)?;
        let answer = self.peer.request(question, deadline).await.map_err(text)?;
        serde_json::from_value(answer).map_err(|e| {
            format!("the peer's answer is not understood ({e}); are both of one version?")
        })
    }
}
