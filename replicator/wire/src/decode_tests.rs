use super::*;
use crate::back::Back;
use crate::hello::{Lane, LinkFrame, Position, StreamHello};
use crate::raw::{Encoded, Splitter};
use havm_core::ids::EpochId;
use proptest::prelude::*;

fn through(e: &Encoded, seq: u64) -> RawFrame {
    let mut wire = e.header(seq).to_vec();
    wire.extend_from_slice(e.payload());
    let mut got = None;
    Splitter::default().push(&wire, |f| got = Some(f)).unwrap();
    got.unwrap()
}

fn samples() -> Vec<Frame> {
    let packed = Packed::pack(&[3; 999]).unwrap();
    let hashes = HashRange {
        id: 8,
        object: 1,
        first: 7,
        hashes: vec![[1; 16], [2; 16]],
    };
    vec![
        Frame::StreamStart(Box::new(StreamStart {
            guest: "web-1".parse().unwrap(),
            term: Term(5),
            stream: StreamId([1; 16]),
            my_life: LifeId([2; 16]),
            peer_life: LifeId([3; 16]),
            base: StreamBase::Equal,
            blocks: vec![RamBlock {
                name: "pc.ram".into(),
                len: 1 << 28,
                guest_addr: 0,
                shared: true,
            }],
            disks: vec![DiskShape {
                size: 1 << 30,
                block_bytes: 65536,
            }],
            machine: "pc-q35-10.0".into(),
        })),
        Frame::EpochBegin {
            n: EpochNo(9),
            bulk: true,
        },
        Frame::Pages {
            block: 2,
            entries: Bytes::from_static(b"abc"),
        },
        Frame::DiskWrite(DiskWrite {
            disk: 0,
            offset: 512,
            kind: WriteKind::Data(packed.clone()),
        }),
        Frame::DiskWrite(DiskWrite {
            disk: 0,
            offset: 512,
            kind: WriteKind::Zero {
                punch: true,
                len: 4096,
            },
        }),
        Frame::DiskWrite(DiskWrite {
            disk: 0,
            offset: 512,
            kind: WriteKind::Zero {
                punch: false,
                len: 4096,
            },
        }),
        Frame::DiskWrite(DiskWrite {
            disk: 0,
            offset: 512,
            kind: WriteKind::Trim { len: 1 },
        }),
        Frame::DiskSync(DiskSync {
            disk: 1,
            block: 77,
            data: Some(packed.clone()),
        }),
        Frame::DiskSync(DiskSync {
            disk: 1,
            block: 77,
            data: None,
        }),
        Frame::DeviceState(packed),
        Frame::EpochEnd(EpochEnd {
            n: EpochNo(9),
            eligible: true,
            shutdown: false,
            tally: Tally {
                pages: 1,
                writes: 2,
                syncs: 3,
                digest: 4,
            },
        }),
        Frame::HashRange(hashes.clone()),
        Frame::PeerSetRequest { disk: 1 },
        Frame::VerifyAt {
            id: 1,
            n: EpochNo(3),
        },
        Frame::VerifyRam(hashes.clone()),
        Frame::VerifyDisk(hashes),
        Frame::VerifyEnd { id: 1 },
        Frame::Bye {
            reason: "handed over".into(),
        },
    ]
}

fn back_samples() -> Vec<Back> {
    let epoch = EpochId {
        term: Term(1),
        stream: StreamId([4; 16]),
        n: EpochNo(2),
    };
    vec![
        Back::Ack {
            epoch,
            life: LifeId([5; 16]),
        },
        Back::Durable { epoch },
        Back::HashReply {
            id: 1,
            differing: vec![0, 9],
        },
        Back::PeerSet {
            disk: 1,
            more: true,
            encoded: Bytes::from_static(b"xyz"),
        },
        Back::Verified {
            id: 1,
            ram_different: 2,
            ram_pages: 3,
            disk_different: 4,
            disk_blocks: 5,
            error: Some("no".into()),
        },
        Back::Bye {
            reason: "asked to".into(),
        },
    ]
}

fn link_samples() -> Vec<LinkFrame> {
    let position = Position {
        received: 9,
        consumed: 4,
    };
    vec![
        LinkFrame::Hello {
            hello: StreamHello {
                guest: "g".parse().unwrap(),
                term: Term(1),
                stream: StreamId([1; 16]),
                my_life: LifeId([2; 16]),
                peer_life: LifeId([3; 16]),
            },
            position,
            lane: Lane::Beat,
        },
        LinkFrame::Welcome {
            position,
            window_bytes: 1 << 20,
            session: [7; 16],
        },
        LinkFrame::Refused {
            version: 1,
            forever: true,
            why: "other term".into(),
        },
        LinkFrame::Position(position),
    ]
}

#[test]
fn every_frame_comes_back_as_it_was() {
    for f in samples() {
        assert_eq!(Frame::decode(&through(&f.encode().unwrap(), 1)), Ok(f));
    }
    for b in back_samples() {
        assert_eq!(Back::decode(&through(&b.encode().unwrap(), 1)), Ok(b));
    }
    for l in link_samples() {
        assert_eq!(LinkFrame::decode(&through(&l.encode().unwrap(), 0)), Ok(l));
    }
}

/// Cutting a frame short or lengthening it is an error, or another frame that fits (data at the
/// end): never a panic.
#[test]
fn cut_and_lengthened_frames_are_dealt_with() {
    let all: Vec<Encoded> = samples().iter().map(|f| f.encode().unwrap()).collect();
    for e in all {
        for len in 0..=e.payload().len() + 3 {
            let mut p = e.payload().to_vec();
            p.resize(len, 0xff);
            let e = Encoded::new(e.kind(), p.into()).unwrap();
            let _ = Frame::decode(&through(&e, 1));
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_payloads_never_panic(kind: u8, payload: Vec<u8>) {
        let raw = through(&Encoded::new(kind, payload.into()).unwrap(), 0);
        let _ = Frame::decode(&raw);
        let _ = Back::decode(&raw);
        let _ = LinkFrame::decode(&raw);
    }
}

#[test]
fn an_error_names_the_frame_and_the_place() {
    let e = Encoded::new(kind::EPOCH_BEGIN, Bytes::from_static(&[0; 8])).unwrap();
    let text = Frame::decode(&through(&e, 1)).unwrap_err().to_string();
    assert!(
        text.contains("EpochBegin") && text.contains("byte 8"),
        "{text}"
    );
}
