use super::*;
use crate::raw::{Encoded, Splitter};
use crate::sender::{Repeater, SenderBroken, StripeSender};
use bytes::Bytes;
use proptest::prelude::*;

const LINKS: usize = 3;

fn frame(i: u64) -> Encoded {
    Encoded::new(
        1,
        Bytes::copy_from_slice(&[i.to_le_bytes(), [0; 8]].concat()),
    )
    .unwrap()
}

fn value(f: &RawFrame) -> u64 {
    u64::from_le_bytes(f.payload[..8].try_into().unwrap())
}

fn received(e: &Encoded, seq: u64) -> RawFrame {
    let mut wire = e.header(seq).to_vec();
    wire.extend_from_slice(e.payload());
    let mut got = None;
    Splitter::default().push(&wire, |f| got = Some(f)).unwrap();
    got.unwrap()
}

/// What may happen to the links, in any order.
#[derive(Debug, Clone)]
enum Act {
    Push,
    Send(usize),
    Arrive(usize),
    /// The link dies with all that is on it, in both directions.
    Kill(usize),
    Consume,
    TellPosition,
    Later,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => Just(Act::Push),
        6 => (0..LINKS).prop_map(Act::Send),
        6 => (0..LINKS).prop_map(Act::Arrive),
        1 => (0..LINKS).prop_map(Act::Kill),
        4 => Just(Act::Consume),
        3 => Just(Act::TellPosition),
        1 => Just(Act::Later),
    ];
    prop::collection::vec(act, 0..400)
}

/// A sender, a receiver and what is between them.
struct World {
    tx: StripeSender,
    rx: Reorder,
    wires: Vec<VecDeque<RawFrame>>,
    pushed: u64,
    got: u64,
    now_us: u64,
    window: usize,
}

impl World {
    fn new(window: usize) -> Self {
        World {
            tx: StripeSender::new(window, 100),
            rx: Reorder::new(window),
            wires: vec![VecDeque::new(); LINKS],
            pushed: 0,
            got: 0,
            now_us: 0,
            window,
        }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Push => {
                if self.tx.has_room(frame(0).wire_bytes()) {
                    self.pushed += 1;
                    assert_eq!(self.tx.push(frame(self.pushed)), self.pushed);
                    assert!(self.tx.held_bytes() <= self.window.max(frame(0).wire_bytes()));
                }
            }
            Act::Send(l) => {
                if let Some(o) = self.tx.next(*l, self.now_us) {
                    self.wires[*l].push_back(received(&o.frame, o.seq));
                }
            }
            Act::Arrive(l) => {
                if let Some(f) = self.wires[*l].pop_front() {
                    self.rx.push(f).unwrap();
                }
            }
            Act::Kill(l) => {
                self.wires[*l].clear();
                self.tx.link_down(*l);
                self.tx
                    .link_up([1; 16], self.rx.position(), self.now_us)
                    .unwrap();
            }
            Act::Consume => {
                if let Some(f) = self.rx.pop() {
                    self.got += 1;
                    assert_eq!(value(&f), self.got, "in order, each once");
                }
            }
            Act::TellPosition => {
                self.tx
                    .on_position(self.rx.position(), self.now_us)
                    .unwrap();
            }
            Act::Later => self.now_us += 150,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever links do, the consumer gets exactly what was pushed, in order, and it gets all of
    /// it as soon as one link works.
    #[test]
    fn links_may_die_at_any_moment(acts in acts(), window in 40usize..400) {
        let mut w = World::new(window);
        acts.iter().for_each(|a| w.act(a));
        // The good end: all links but the first die, that one works.
        (1..LINKS).for_each(|l| { w.wires[l].clear(); w.tx.link_down(l); });
        for _ in 0..3000 {
            for a in [Act::Send(0), Act::Arrive(0), Act::Consume, Act::TellPosition] {
                w.act(&a);
            }
        }
        prop_assert_eq!(w.got, w.pushed);
        prop_assert!(w.tx.is_received());
        prop_assert_eq!(w.tx.held_bytes(), 0);
    }

    /// The same for the way back, where each link gets everything.
    #[test]
    fn the_way_back_is_in_order_too(acts in acts()) {
        let mut tx = Repeater::new(LINKS, 1 << 20);
        let mut rx = Reorder::new(1 << 20);
        let mut wires = vec![VecDeque::new(); LINKS];
        let (mut pushed, mut got) = (0, 0);
        let mut take = |rx: &mut Reorder| {
            while let Some(f) = rx.pop() {
                got += 1;
                assert_eq!(value(&f), got);
            }
            got
        };
        for a in &acts {
            match a {
                Act::Push => { pushed += 1; tx.push(frame(pushed)).unwrap(); }
                Act::Send(l) => wires[*l].extend(tx.next(*l).map(|o| received(&o.frame, o.seq))),
                Act::Arrive(l) => if let Some(f) = wires[*l].pop_front() { rx.push(f).unwrap(); },
                Act::Kill(l) => { wires[*l].clear(); tx.link_up(*l, rx.position()).unwrap(); }
                Act::Consume => { take(&mut rx); }
                Act::TellPosition => tx.on_position(rx.position()).unwrap(),
                Act::Later => {}
            }
        }
        wires[0].clear();
        tx.link_up(0, rx.position()).unwrap();
        while let Some(o) = tx.next(0) {
            rx.push(received(&o.frame, o.seq)).unwrap();
        }
        prop_assert_eq!(take(&mut rx), pushed);
    }
}

#[test]
fn a_late_frame_goes_over_the_idle_link_as_well() {
    let mut tx = StripeSender::new(1 << 20, 100);
    tx.push(frame(1));
    assert_eq!(tx.next(0, 1000).unwrap().seq, 1);
    assert_eq!(tx.late_at_us(), Some(1100));
    assert!(tx.next(1, 1099).is_none());
    assert!(tx.next(0, 1100).is_none(), "not twice over the same link");
    let o = tx.next(1, 1100).unwrap();
    assert!(o.seq == 1 && o.again);
    assert!(tx.next(1, 1101).is_none());
}

#[test]
fn all_that_a_stuck_link_holds_goes_over_the_other_but_only_when_the_peer_stands_still() {
    let mut tx = StripeSender::new(1 << 20, 100);
    for i in 1..=4 {
        tx.push(frame(i));
    }
    // 1 over link 1, the others over link 0.
    assert_eq!(tx.next(1, 0).unwrap().seq, 1);
    (2..=4).for_each(|i| assert_eq!(tx.next(0, 0).unwrap().seq, i));
    tx.on_position(
        Position {
            received: 1,
            consumed: 0,
        },
        90,
    )
    .unwrap();
    assert!(tx.next(1, 150).is_none(), "the peer came on at 90");
    assert_eq!(tx.late_at_us(), Some(190));
    let again: Vec<u64> = std::iter::from_fn(|| tx.next(1, 190).map(|o| o.seq)).collect();
    assert_eq!(again, [2, 3, 4]);
}

#[test]
fn lies_and_amnesia_of_the_peer_break_the_stream() {
    let mut tx = StripeSender::new(1 << 20, 100);
    tx.push(frame(1));
    let ahead = Position {
        received: 1,
        consumed: 0,
    };
    assert!(matches!(
        tx.on_position(ahead, 0),
        Err(SenderBroken::FromTheFuture { .. })
    ));
    tx.link_up([1; 16], Position::default(), 0).unwrap();
    assert_eq!(
        tx.link_up([2; 16], Position::default(), 0),
        Err(SenderBroken::PeerForgot)
    );
}

#[test]
fn a_sender_that_ignores_the_window_is_stopped() {
    let mut rx = Reorder::new(100);
    let big = Encoded::new(1, vec![0; MAX_PAYLOAD_BYTES].into()).unwrap();
    rx.push(received(&big, 2)).unwrap();
    assert!(matches!(
        rx.push(received(&big, 3)),
        Err(ReceiverBroken::Overrun { .. })
    ));
    assert!(matches!(
        rx.push(received(&big, 0)),
        Err(ReceiverBroken::NoNumber(_))
    ));
}
