//! The command line's requests, each in a task of its own.

use super::Input;
use super::protect::Wish;
use super::remote::{Ask, Told, operator};
use super::shared::Shared;
use crate::control::{Answers, HostStatus, Op, Request, VerifyResult};
use havm_core::ids::GuestName;
use havm_core::record::{Role, RoleStatus};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{broadcast, oneshot};

/// How long a comparison of both sides may take.
const VERIFY: Duration = Duration::from_secs(3600);

impl Shared {
    /// Answers one request.
    pub async fn serve(self: Arc<Self>, request: Request, answers: Answers) {
        match request {
            Request::Status => match self.host_status().await {
                Some(s) => answers.done(&s).await,
                None => answers.failed("havmd is ending").await,
            },
            Request::Protect {
                guest,
                dry_run,
                home,
                restart,
            } => {
                let wish = Wish {
                    guest,
                    dry_run,
                    home,
                    restart,
                };
                finish(&answers, self.protect(&wish, &answers).await).await;
            }
            Request::Unprotect { guest, restart } => {
                finish(&answers, self.unprotect(&guest, restart, &answers).await).await;
            }
            Request::Operate { guest, op } => {
                finish(&answers, self.operate_where_it_runs(&guest, op).await).await;
            }
            Request::Verify { guest } => match self.verify(&guest).await {
                Ok(r) => answers.done(&r).await,
                Err(e) => answers.failed(e).await,
            },
            Request::Events {
                last,
                guest,
                follow,
            } => {
                self.events(last, guest, follow, &answers).await;
            }
        }
    }

    async fn host_status(&self) -> Option<HostStatus> {
        let (tx, rx) = oneshot::channel();
        self.inputs.send(Input::Status(tx)).ok()?;
        rx.await.ok()
    }

    /// At this node, or passed to the peer where that is the guest's primary.
    async fn operate_where_it_runs(&self, guest: &GuestName, op: Op) -> Result<String, String> {
        let s = self.guest_status(guest).await.ok_or_else(|| {
            format!("guest {guest} is not protected here; `havm status` lists those that are")
        })?;
        let primary = matches!(s.role, Some(Role::Solo | Role::Protected))
            && s.role_status != Some(RoleStatus::Yielded);
        let local = matches!(op, Op::ForcePromote | Op::DiscardMine);
        if primary || local {
            self.operate(guest, operator(op)).await?;
            return Ok(format!("asked for at {}", self.config.node.name));
        }
        let ask = Ask::Operate {
            guest: guest.clone(),
            op,
        };
        match self.ask_peer(&ask, Duration::from_secs(10)).await {
            Ok(Told::Done) => Ok(format!("asked for at {}", self.config.peer.name)),
            Ok(Told::Failed { why }) => Err(format!("{}: {why}", self.config.peer.name)),
            Ok(other) => Err(format!("the peer gave an unexpected answer: {other:?}")),
            Err(e) => Err(format!(
                "{} is this guest's primary, and {e}",
                self.config.peer.name
            )),
        }
    }

    async fn verify(&self, guest: &GuestName) -> Result<VerifyResult, String> {
        let (tx, rx) = oneshot::channel();
        self.inputs
            .send(Input::Verify(guest.clone(), tx))
            .map_err(|_| "havmd is ending".to_owned())?;
        match tokio::time::timeout(VERIFY, rx).await {
            Ok(Ok(r)) => r,
            Ok(Err(_)) => Err(
                "the comparison was given up: protection ended meanwhile, or the replicator did"
                    .into(),
            ),
            Err(_) => Err("no result within an hour".into()),
        }
    }

    async fn events(&self, last: usize, guest: Option<GuestName>, follow: bool, answers: &Answers) {
        // Subscribed before the past is read, so that nothing falls between.
        let (past, mut live) = {
            let log = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            (log.last(last, guest.as_ref()), log.follow())
        };
        for e in past {
            if !answers.event(e).await {
                return;
            }
        }
        loop {
            if !follow {
                break;
            }
            match live.recv().await {
                Ok(e) if guest.is_some() && e.guest != guest => {}
                Ok(e) => {
                    if !answers.event(e).await {
                        return;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(n)) => {
                    answers
                        .progress(format!("({n} events were too fast; see the event file)"))
                        .await;
                }
                Err(broadcast::error::RecvError::Closed) => break,
            }
        }
        answers.done(&()).await;
    }
}

async fn finish(answers: &Answers, r: Result<String, String>) {
    match r {
        Ok(text) => answers.done(&text).await,
        Err(text) => answers.failed(text).await,
    }
}
