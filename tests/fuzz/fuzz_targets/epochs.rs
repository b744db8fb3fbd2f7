//! The assembler under any sequence of frames; whatever it calls complete survives the journal.
#![no_main]

use havm_core::ids::{EpochNo, LifeId, StreamId, Term};
use havm_core::order::StreamBase;
use havm_wire::assemble::{CompleteEpoch, EpochAssembler, Step};
use havm_wire::frame::{
    DiskShape, DiskSync, DiskWrite, EpochEnd, Frame, RamBlock, StreamStart, Tally, WriteKind,
};
use havm_wire::packed::Packed;
use havm_wire::raw::{Encoded, RawFrame, Splitter};
use libfuzzer_sys::fuzz_target;

fn shape() -> StreamStart {
    StreamStart {
        guest: "g".parse().expect("a name"),
        term: Term(1),
        stream: StreamId([1; 16]),
        my_life: LifeId([2; 16]),
        peer_life: LifeId([3; 16]),
        base: StreamBase::Unknown,
        blocks: vec![RamBlock {
            name: "r".into(),
            len: 8 << 12,
            guest_addr: 0,
            shared: true,
        }],
        disks: vec![DiskShape {
            size: 10_000,
            block_bytes: 4096,
        }],
        machine: "m".into(),
    }
}

fn raw(e: &Encoded) -> RawFrame {
    let mut out = None;
    let mut s = Splitter::default();
    s.push(&e.header(1), |f| out = Some(f)).expect("our own");
    s.push(e.payload(), |f| out = Some(f)).expect("our own");
    out.expect("a whole frame")
}

/// A frame from four bytes and what follows.
fn frame(c: &[u8], tally: Tally) -> Frame {
    let at = u64::from(u16::from_le_bytes([c[1], c[2]]));
    let data = Packed::pack(&vec![c[3]; usize::from(c[3]) * 17]).expect("small");
    match c[0] % 9 {
        0 => Frame::EpochBegin {
            n: EpochNo(u64::from(c[1] % 4)),
            bulk: c[2] & 1 == 1,
        },
        1 => Frame::Pages {
            block: u16::from(c[1] % 2),
            entries: c.to_vec().into(),
        },
        2 => Frame::DiskWrite(DiskWrite {
            disk: 0,
            offset: at,
            kind: WriteKind::Data(data),
        }),
        3 => Frame::DiskWrite(DiskWrite {
            disk: 0,
            offset: at,
            kind: WriteKind::Trim {
                len: u32::from(c[3]),
            },
        }),
        4 => Frame::DiskSync(DiskSync {
            disk: 0,
            block: at % 4,
            data: Some(data),
        }),
        5 => Frame::DiskSync(DiskSync {
            disk: 0,
            block: at % 4,
            data: None,
        }),
        6 => Frame::DeviceState(data),
        7 => Frame::EpochEnd(EpochEnd {
            n: EpochNo(u64::from(c[1] % 4)),
            eligible: c[2] & 1 == 1,
            shutdown: c[2] & 2 == 2,
            tally,
        }),
        _ => Frame::PeerSetRequest {
            disk: u16::from(c[1]),
        },
    }
}

fuzz_target!(|data: &[u8]| {
    let mut a = EpochAssembler::new(100_000);
    let start = Frame::StreamStart(Box::new(shape()))
        .encode()
        .expect("small");
    assert!(matches!(a.push(&raw(&start)), Ok(Step::Start(_))));
    let mut last = 0;
    for c in data.chunks_exact(4) {
        let tally = a.open_tally().unwrap_or_default();
        let Ok(e) = frame(c, tally).encode() else {
            continue;
        };
        match a.push(&raw(&e)) {
            Ok(Step::Complete(c)) => {
                assert_eq!(c.id().n.0, last + 1, "in order");
                last += 1;
                assert!(!c.eligible() || (c.device_state().is_some() && !c.is_bulk()));
                let mut journal = Vec::new();
                let write = c.write(|b| {
                    journal.extend_from_slice(b);
                    Ok(())
                });
                write.expect("memory");
                let again = CompleteEpoch::read(&shape(), &journal).expect("our own journal");
                assert_eq!(again.id(), c.id());
                assert_eq!(again.disk_writes().count(), c.disk_writes().count());
            }
            Ok(_) => {}
            Err(_) => return,
        }
    }
});
