use super::*;
use crate::acked::AckLedger;
use crate::epoch::Clear;
use crate::frame::{DiskShape, RamBlock};
use crate::page::{PageBatch, PageEncoder};
use havm_core::ids::{LifeId, StreamId, Term};
use havm_core::order::StreamBase;

fn shape() -> StreamStart {
    StreamStart {
        guest: "g".parse().unwrap(),
        term: Term(2),
        stream: StreamId([1; 16]),
        my_life: LifeId([2; 16]),
        peer_life: LifeId([3; 16]),
        base: StreamBase::Unknown,
        blocks: vec![RamBlock {
            name: "pc.ram".into(),
            len: 16 << 12,
            guest_addr: 0,
            shared: true,
        }],
        disks: vec![DiskShape {
            size: 100_000,
            block_bytes: 65536,
        }],
        machine: "pc-q35-10.0".into(),
    }
}

fn ledger() -> AckLedger {
    AckLedger::new(Term(2), StreamId([1; 16]), LifeId([3; 16]))
}

fn raw(e: &Encoded) -> RawFrame {
    let mut wire = e.header(0).to_vec();
    wire.extend_from_slice(e.payload());
    let mut got = None;
    Splitter::default().push(&wire, |f| got = Some(f)).unwrap();
    got.unwrap()
}

fn started(limit: u64) -> EpochAssembler {
    let mut a = EpochAssembler::new(limit);
    let start = Frame::StreamStart(Box::new(shape())).encode().unwrap();
    assert!(matches!(a.push(&raw(&start)), Ok(Step::Start(_))));
    a
}

/// One of everything.
fn frames(l: &mut AckLedger, bulk: bool, eligible: bool) -> Vec<Encoded> {
    let mut e = l.open(bulk).unwrap();
    let mut out = vec![e.begin().unwrap()];
    out.extend(e.disk_write(0, 70_000, &[5; 30_000]).unwrap());
    let mut b = PageBatch::new(0);
    let mut enc = PageEncoder::new(0);
    enc.push(&mut b, 15, &[4; PAGE_BYTES]);
    enc.push(&mut b, 2, &[0; PAGE_BYTES]);
    out.push(e.pages(b).unwrap());
    out.push(e.disk_sync(0, 1, &[1; 100_000 - 65536]).unwrap());
    out.extend(e.disk_clear(0, 0, 512, Clear::Trim).unwrap());
    out.push(e.device_state(&[8; 5000]).unwrap());
    out.push(l.close(e, eligible, true).unwrap());
    out
}

fn last_step(a: &mut EpochAssembler, frames: &[Encoded]) -> Result<Step, AssembleError> {
    let mut last = Ok(Step::Staged);
    for f in frames {
        last = a.push(&raw(f));
        if last.is_err() {
            break;
        }
    }
    last
}

#[test]
fn a_whole_epoch_is_complete_and_survives_the_journal() {
    let Ok(Step::Complete(c)) =
        last_step(&mut started(1 << 20), &frames(&mut ledger(), false, true))
    else {
        panic!("not complete")
    };
    let mut journal = Vec::new();
    c.write(|b| {
        journal.extend_from_slice(b);
        Ok(())
    })
    .unwrap();
    let again = CompleteEpoch::read(&shape(), &journal).unwrap();
    for c in [*c, again] {
        assert_eq!(c.id().n, EpochNo(1));
        assert!(c.eligible() && c.shutdown());
        let pages: Vec<u64> = c.pages().map(|p| p.unwrap().1.index).collect();
        assert_eq!(pages, [15, 2]);
        assert_eq!(c.disk_syncs().count(), 1);
        let writes: Vec<u64> = c.disk_writes().map(|w| w.offset).collect();
        assert_eq!(writes, [70_000, 0]);
        assert_eq!(
            c.device_state().unwrap().unpack().unwrap(),
            [8; 5000].as_slice()
        );
    }
    for len in 0..journal.len() {
        assert!(
            CompleteEpoch::read(&shape(), &journal[..len]).is_err(),
            "cut at {len}"
        );
    }
}

/// Whichever frame is lost or repeated: no complete epoch comes of it.
#[test]
fn an_epoch_with_a_frame_too_few_or_too_many_is_never_complete() {
    let all = frames(&mut ledger(), false, true);
    for i in 0..all.len() {
        let mut less = all.clone();
        less.remove(i);
        assert!(
            !matches!(
                last_step(&mut started(1 << 20), &less),
                Ok(Step::Complete(_))
            ),
            "{i}"
        );
        let mut more = all.clone();
        more.insert(i, all[i].clone());
        assert!(last_step(&mut started(1 << 20), &more).is_err(), "{i}");
    }
    for i in 1..all.len() - 2 {
        let mut swapped = all.clone();
        swapped.swap(i, i + 1);
        assert!(
            last_step(&mut started(1 << 20), &swapped).is_err(),
            "swapped {i}"
        );
    }
}

#[test]
fn bulk_pages_come_out_at_once_and_are_never_eligible() {
    let mut l = ledger();
    let mut a = started(40_000);
    let mut direct = 0;
    for f in frames(&mut l, true, false) {
        match a.push(&raw(&f)).unwrap() {
            Step::Direct(_) => direct += 1,
            Step::Complete(c) => assert!(c.is_bulk() && c.pages().next().is_none()),
            _ => {}
        }
    }
    assert_eq!(direct, 2);
    let claim = Frame::EpochEnd(EpochEnd {
        n: EpochNo(2),
        eligible: true,
        shutdown: false,
        tally: Tally::default(),
    });
    a.push(&raw(&Frame::EpochBegin {
        n: EpochNo(2),
        bulk: true,
    }
    .encode()
    .unwrap()))
        .unwrap();
    assert!(matches!(
        a.push(&raw(&claim.encode().unwrap())),
        Err(AssembleError::Order { .. })
    ));
}

#[test]
fn the_staged_bytes_are_bounded() {
    let big = last_step(&mut started(300), &frames(&mut ledger(), false, true));
    assert!(matches!(big, Err(AssembleError::TooLarge { .. })));
}

#[test]
fn nothing_outside_of_the_guest_is_taken() {
    let tries: Vec<fn(&mut crate::epoch::OpenEpoch) -> Encoded> = vec![
        |e| e.disk_write(0, 99_999, &[1; 2]).unwrap().remove(0),
        |e| e.disk_write(1, 0, &[1; 2]).unwrap().remove(0),
        |e| e.disk_sync(0, 2, &[1; 65536]).unwrap(),
        |e| e.disk_sync(0, 1, &[1; 65536]).unwrap(),
        |e| {
            let mut b = PageBatch::new(0);
            PageEncoder::new(0).push(&mut b, 16, &[0; PAGE_BYTES]);
            e.pages(b).unwrap()
        },
        |e| {
            let mut b = PageBatch::new(1);
            PageEncoder::new(0).push(&mut b, 0, &[0; PAGE_BYTES]);
            e.pages(b).unwrap()
        },
    ];
    for (i, make) in tries.iter().enumerate() {
        let (mut a, mut l) = (started(1 << 20), ledger());
        let mut e = l.open(false).unwrap();
        a.push(&raw(&e.begin().unwrap())).unwrap();
        let frame = make(&mut e);
        assert!(
            matches!(a.push(&raw(&frame)), Err(AssembleError::Shape { .. })),
            "{i}"
        );
    }
}
