//! The standby's side of an epoch: from frames in order to an epoch that may be committed.
//!
//! ```text
//!  no stream ──StreamStart──> between ──EpochBegin──> open ──EpochEnd, all counts right──> between
//!                                                      │                        └─> CompleteEpoch
//!                                                      └─ bulk: pages and sync blocks are handed out at once
//! ```
//! Everything is checked against the shape that the stream announced: no page, block or write
//! outside of it gets further than this. A [`CompleteEpoch`] can be built here only.

use crate::codec::DecodeError;
use crate::frame::{DiskSync, DiskWrite, EpochEnd, Frame, StreamStart, Tally};
use crate::packed::Packed;
use crate::page::{self, Entry, PAGE_BYTES};
use crate::raw::{Encoded, RawFrame, Splitter};
use havm_core::ids::{EpochId, EpochNo};

/// Memory that a frame takes besides its payload, for the bound.
const FRAME_OVERHEAD_BYTES: u64 = 256;

/// Why the stream cannot go on. The image of the last complete epoch is untouched (unless bulk
/// pages were applied).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// Malformed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Not in its place.
    #[error("a {frame} frame came {state}")]
    Order {
        /// What came.
        frame: &'static str,
        /// Where.
        state: String,
    },
    /// It does not fit the guest's shape.
    #[error("a {frame} frame does not fit the guest: {why}")]
    Shape {
        /// What came.
        frame: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Counts or digest do not agree.
    #[error("epoch {n} is not what was sent: announced {sent:?}, received {received:?}")]
    Different {
        /// The epoch.
        n: EpochNo,
        /// The sender's count.
        sent: Tally,
        /// Ours.
        received: Tally,
    },
    /// More than may be staged.
    #[error("epoch {n} is larger than the {limit} bytes that may be staged")]
    TooLarge {
        /// The epoch.
        n: EpochNo,
        /// The bound.
        limit: u64,
    },
}

/// What a frame led to.
#[derive(Debug)]
pub enum Step {
    /// The stream's shape.
    Start(Box<StreamStart>),
    /// Kept for its epoch.
    Staged,
    /// To be applied at once: `Pages` or `DiskSync` of a bulk epoch.
    Direct(Frame),
    /// The epoch is complete.
    Complete(Box<CompleteEpoch>),
    /// A request: `HashRange`, `PeerSetRequest`, `Verify*`.
    Request(Frame),
    /// The primary ended the stream on purpose.
    Bye(String),
}

/// A complete epoch: the only thing that an image commits.
#[derive(Debug)]
pub struct CompleteEpoch {
    id: EpochId,
    end: EpochEnd,
    bulk: bool,
    content: Vec<Frame>,
}

impl CompleteEpoch {
    /// Which.
    pub fn id(&self) -> EpochId {
        self.id
    }
    /// See [`EpochEnd::eligible`].
    pub fn eligible(&self) -> bool {
        self.end.eligible
    }
    /// The guest shut itself down in it.
    pub fn shutdown(&self) -> bool {
        self.end.shutdown
    }
    /// Its pages and sync blocks were handed out already ([`Step::Direct`]).
    pub fn is_bulk(&self) -> bool {
        self.bulk
    }
    /// Counts, for statistics.
    pub fn tally(&self) -> Tally {
        self.end.tally
    }
    /// Pages in the order in which they must be applied: RAM block, entry. An error here is a
    /// fault of the sender that the checks before did not see.
    pub fn pages(&self) -> impl Iterator<Item = Result<(u16, Entry<'_>), DecodeError>> {
        self.content
            .iter()
            .filter_map(|f| match f {
                Frame::Pages { block, entries } => Some((*block, entries)),
                _ => None,
            })
            .flat_map(|(block, bytes)| page::entries(bytes).map(move |e| e.map(|e| (block, e))))
    }
    /// Blocks of sync: apply them before the guest's writes.
    pub fn disk_syncs(&self) -> impl Iterator<Item = &DiskSync> {
        self.content.iter().filter_map(|f| match f {
            Frame::DiskSync(s) => Some(s),
            _ => None,
        })
    }
    /// The guest's writes, in its order.
    pub fn disk_writes(&self) -> impl Iterator<Item = &DiskWrite> {
        self.content.iter().filter_map(|f| match f {
            Frame::DiskWrite(w) => Some(w),
            _ => None,
        })
    }
    /// The device state at its end; an eligible epoch always has it.
    pub fn device_state(&self) -> Option<&Packed> {
        self.content.iter().find_map(|f| match f {
            Frame::DeviceState(d) => Some(d),
            _ => None,
        })
    }

    /// Writes the epoch as bytes, for a journal that [`CompleteEpoch::read`] reads again.
    pub fn write(&self, mut out: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
        let mut frame = |e: Result<Encoded, crate::raw::TooLarge>| {
            let e = e.map_err(std::io::Error::other)?;
            out(&e.header(0))?;
            out(e.payload())
        };
        frame(
            Frame::EpochBegin {
                n: self.id.n,
                bulk: self.bulk,
            }
            .encode(),
        )?;
        self.content.iter().try_for_each(|f| frame(f.encode()))?;
        frame(Frame::EpochEnd(self.end).encode())
    }

    /// Reads what [`CompleteEpoch::write`] wrote, with all checks of an arriving epoch. `shape`
    /// is its stream's start.
    pub fn read(shape: &StreamStart, bytes: &[u8]) -> Result<Self, AssembleError> {
        let mut frames = Vec::new();
        Splitter::default().push(bytes, |f| frames.push(f))?;
        let order = |state: &str| AssembleError::Order {
            frame: "journal",
            state: state.into(),
        };
        let mut a = EpochAssembler::new(u64::MAX);
        for (i, raw) in frames.iter().enumerate() {
            let frame = Frame::decode(raw)?;
            if let (0, Frame::EpochBegin { n, .. }) = (i, &frame) {
                let last = n.0.checked_sub(1).ok_or_else(|| order("with epoch 0"))?;
                a.start = Some(shape.clone());
                a.last = EpochNo(last);
            }
            // Bulk content was applied before the epoch was complete; it is not in the journal.
            match a.take(frame, raw, true)? {
                Step::Complete(c) if i + 1 == frames.len() => return Ok(*c),
                Step::Staged => {}
                _ => return Err(order("with more than one epoch")),
            }
        }
        Err(order("without the epoch's end"))
    }
}

#[derive(Debug)]
struct Open {
    n: EpochNo,
    bulk: bool,
    tally: Tally,
    staged_bytes: u64,
    content: Vec<Frame>,
    has_device_state: bool,
}

/// Puts epochs together.
#[derive(Debug)]
pub struct EpochAssembler {
    start: Option<StreamStart>,
    last: EpochNo,
    eligible_seen: bool,
    open: Option<Open>,
    limit_bytes: u64,
}

impl EpochAssembler {
    /// For a new stream; at most `limit_bytes` are staged.
    pub fn new(limit_bytes: u64) -> Self {
        EpochAssembler {
            start: None,
            last: EpochNo(0),
            eligible_seen: false,
            open: None,
            limit_bytes,
        }
    }

    /// The stream's shape, once it came.
    pub fn shape(&self) -> Option<&StreamStart> {
        self.start.as_ref()
    }
    /// What came of the open epoch so far.
    pub fn open_tally(&self) -> Option<Tally> {
        self.open.as_ref().map(|o| o.tally)
    }
    /// The last complete epoch.
    pub fn last(&self) -> EpochNo {
        self.last
    }

    /// Takes the next frame of the stream.
    pub fn push(&mut self, raw: &RawFrame) -> Result<Step, AssembleError> {
        self.take(Frame::decode(raw)?, raw, false)
    }

    fn take(&mut self, frame: Frame, raw: &RawFrame, replay: bool) -> Result<Step, AssembleError> {
        if let Frame::Bye { reason } = frame {
            return Ok(Step::Bye(reason));
        }
        let Some(start) = &self.start else {
            return match frame {
                Frame::StreamStart(s) => {
                    self.start = Some((*s).clone());
                    Ok(Step::Start(s))
                }
                other => Err(order(&other, "before the stream's start".into())),
            };
        };
        check_shape(start, &frame)?;
        match frame {
            Frame::StreamStart(_) => Err(order(&frame, "in the middle of a stream".into())),
            Frame::EpochBegin { n, bulk } => {
                if let Some(open) = &self.open {
                    return Err(order(&frame, format!("while epoch {} was open", open.n)));
                }
                if n != self.last.next() {
                    return Err(order(&frame, format!("for epoch {n} after {}", self.last)));
                }
                self.open = Some(Open {
                    n,
                    bulk,
                    tally: Tally::default(),
                    staged_bytes: 0,
                    content: Vec::new(),
                    has_device_state: false,
                });
                Ok(Step::Staged)
            }
            Frame::EpochEnd(end) => self.end(end, replay),
            f if f.is_content() => self.content(f, raw),
            request => Ok(Step::Request(request)),
        }
    }

    fn content(&mut self, frame: Frame, raw: &RawFrame) -> Result<Step, AssembleError> {
        let Some(open) = &mut self.open else {
            return Err(order(&frame, "outside of an epoch".into()));
        };
        open.tally
            .fold(raw.header.kind, raw.payload.len(), raw.header.payload_crc());
        match &frame {
            Frame::Pages { entries, .. } => {
                open.tally.pages += page::entries(entries).count() as u64
            }
            Frame::DiskSync(_) => open.tally.syncs += 1,
            Frame::DiskWrite(_) => open.tally.writes += 1,
            _ if std::mem::replace(&mut open.has_device_state, true) => {
                return Err(order(&frame, "twice in one epoch".into()));
            }
            _ => {}
        }
        if open.bulk && matches!(frame, Frame::Pages { .. } | Frame::DiskSync(_)) {
            return Ok(Step::Direct(frame));
        }
        open.staged_bytes += raw.payload.len() as u64 + FRAME_OVERHEAD_BYTES;
        if open.staged_bytes > self.limit_bytes {
            return Err(AssembleError::TooLarge {
                n: open.n,
                limit: self.limit_bytes,
            });
        }
        open.content.push(frame);
        Ok(Step::Staged)
    }

    fn end(&mut self, end: EpochEnd, replay: bool) -> Result<Step, AssembleError> {
        let frame = Frame::EpochEnd(end);
        let (Some(open), Some(start)) = (self.open.take(), &self.start) else {
            return Err(order(&frame, "outside of an epoch".into()));
        };
        if end.n != open.n {
            return Err(order(
                &frame,
                format!("for epoch {} in epoch {}", end.n, open.n),
            ));
        }
        if end.tally != open.tally && !(replay && open.bulk) {
            return Err(AssembleError::Different {
                n: end.n,
                sent: end.tally,
                received: open.tally,
            });
        }
        if end.eligible && (open.bulk || !open.has_device_state) {
            return Err(order(
                &frame,
                "marked eligible for an epoch that is not whole".into(),
            ));
        }
        if self.eligible_seen && !end.eligible {
            return Err(order(
                &frame,
                "not marked eligible after one that was".into(),
            ));
        }
        self.eligible_seen = end.eligible;
        self.last = end.n;
        Ok(Step::Complete(Box::new(CompleteEpoch {
            id: EpochId {
                term: start.term,
                stream: start.stream,
                n: end.n,
            },
            end,
            bulk: open.bulk,
            content: open.content,
        })))
    }
}

fn order(frame: &Frame, state: String) -> AssembleError {
    AssembleError::Order {
        frame: frame.name(),
        state,
    }
}

/// All that a frame names lies inside of the guest.
fn check_shape(start: &StreamStart, frame: &Frame) -> Result<(), AssembleError> {
    let bad = |why: String| {
        Err(AssembleError::Shape {
            frame: frame.name(),
            why,
        })
    };
    let pages_of = |b: u16| {
        start
            .blocks
            .get(usize::from(b))
            .map(|r| r.len / PAGE_BYTES as u64)
    };
    let disk_of = |d: u16| start.disks.get(usize::from(d));
    match frame {
        Frame::Pages { block, entries } => {
            let Some(pages) = pages_of(*block) else {
                return bad(format!("no RAM block {block}"));
            };
            for e in page::entries(entries) {
                let index = e?.index;
                if index >= pages {
                    return bad(format!(
                        "page {index} of RAM block {block}, which has {pages}"
                    ));
                }
            }
        }
        Frame::DiskWrite(w) => match disk_of(w.disk) {
            None => return bad(format!("no disk {}", w.disk)),
            // The sum was checked when the frame was decoded.
            Some(d) if w.offset + w.len() > d.size => {
                return bad(format!(
                    "write at {} of {} bytes, disk of {}",
                    w.offset,
                    w.len(),
                    d.size
                ));
            }
            Some(_) => {}
        },
        Frame::DiskSync(s) => {
            let Some(d) = disk_of(s.disk) else {
                return bad(format!("no disk {}", s.disk));
            };
            let unit = u64::from(d.block_bytes);
            let want = s
                .block
                .checked_mul(unit)
                .map_or(0, |at| d.size.saturating_sub(at).min(unit));
            if want == 0 {
                return bad(format!(
                    "block {} of {unit} bytes, disk of {}",
                    s.block, d.size
                ));
            }
            match &s.data {
                Some(p) if p.raw_len() as u64 != want => {
                    return bad(format!(
                        "block {} with {} bytes instead of {want}",
                        s.block,
                        p.raw_len()
                    ));
                }
                _ => {}
            }
        }
        Frame::HashRange(r) | Frame::VerifyDisk(r) => match disk_of(r.object) {
            None => return bad(format!("no disk {}", r.object)),
            Some(d) => {
                let blocks = d.size.div_ceil(u64::from(d.block_bytes));
                if r.first + r.hashes.len() as u64 > blocks {
                    return bad(format!(
                        "blocks from {} on, disk of {blocks} blocks",
                        r.first
                    ));
                }
            }
        },
        Frame::VerifyRam(r) => match pages_of(r.object) {
            None => return bad(format!("no RAM block {}", r.object)),
            Some(pages) if r.first + r.hashes.len() as u64 > pages => {
                return bad(format!("pages from {} on, RAM block of {pages}", r.first));
            }
            Some(_) => {}
        },
        Frame::PeerSetRequest { disk } if disk_of(*disk).is_none() => {
            return bad(format!("no disk {disk}"));
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
#[path = "assemble_tests.rs"]
mod tests;
