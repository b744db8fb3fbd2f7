//! The receiver: frames in order become epochs; a complete eligible one is acked before it is committed.

use super::shared::{Shared, Work};
use super::{Events, Reply, StandbyEvent};
use havm_core::ids::EpochNo;
use havm_links::incoming::{In, Incoming};
use havm_links::link::run_sooner;
use havm_wire::assemble::{EpochAssembler, Step};
use havm_wire::raw::RawFrame;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

/// How long the thread sleeps at most before it looks whether it should end.
const TICK: Duration = Duration::from_millis(50);

pub(super) struct Receiver {
    pub shared: Arc<Shared>,
    pub incoming: Arc<Incoming>,
    pub events: Events,
    pub end: Arc<AtomicBool>,
    pub max_epoch_bytes: u64,
}

struct Stream {
    assembler: EpochAssembler,
    epoch_bytes: usize,
}

impl Receiver {
    pub(super) fn run(self) {
        run_sooner();
        let mut stream = self.fresh();
        while !self.end.load(SeqCst) {
            match self.incoming.recv(TICK) {
                None => {}
                Some(In::Frame(raw)) => {
                    if let Err(why) = self.frame(&mut stream, &raw) {
                        tracing::error!(why, "the stream broke");
                        self.events.tell(StandbyEvent::Broken(why));
                        // Nothing more of it is wanted; a new one may come.
                        if let Some(s) = stream.assembler.shape() {
                            self.incoming.refuse(s.stream, "it broke");
                        }
                        stream = self.fresh();
                    }
                }
                Some(In::NewStream(hello)) => {
                    let p = self.shared.lock();
                    let taken = p.confirmed && p.complete.is_some();
                    drop(p);
                    if taken {
                        self.incoming.refuse(
                            hello.stream,
                            "this standby is eligible by an earlier stream of this term",
                        );
                    } else if self.incoming.accept(hello.stream) {
                        stream = self.fresh();
                        let mut p = self.shared.lock();
                        p.acked = EpochNo(0);
                        p.complete = None;
                        p.image_reported = false;
                    }
                }
                Some(In::LinkUp(i)) => tracing::info!(link = i, "link carries the stream"),
                Some(In::LinkDown(i, why)) => tracing::warn!(link = i, why, "link down"),
                Some(In::Silent) => self.events.tell(StandbyEvent::Silent),
                Some(In::Alive) => self.events.tell(StandbyEvent::Alive),
                Some(In::Broken(why)) => self.events.tell(StandbyEvent::Broken(why)),
            }
        }
    }

    fn fresh(&self) -> Stream {
        Stream {
            assembler: EpochAssembler::new(self.max_epoch_bytes),
            epoch_bytes: 0,
        }
    }

    fn frame(&self, s: &mut Stream, raw: &RawFrame) -> Result<(), String> {
        s.epoch_bytes += raw.payload.len();
        let step = s.assembler.push(raw).map_err(|e| e.to_string())?;
        let work = match step {
            Step::Staged => return Ok(()),
            Step::Start(start) => Work::Begin(start),
            Step::Direct(f) => Work::Direct(f),
            Step::Request(f) => Work::Request(f),
            Step::Bye(why) => {
                tracing::info!(why, "the primary ended the stream");
                return Ok(());
            }
            Step::Complete(epoch) => {
                let bytes = std::mem::take(&mut s.epoch_bytes);
                let (id, eligible) = (epoch.id(), epoch.eligible());
                // Queued first: what is acked is held.
                let queued = self
                    .shared
                    .push(Work::Commit(epoch, bytes), eligible.then_some(id));
                if queued && eligible && !self.shared.ack_after_commit {
                    Reply(self.incoming.clone()).ack(&self.shared, id, true);
                }
                return Ok(());
            }
        };
        self.shared.push(work, None);
        Ok(())
    }
}
