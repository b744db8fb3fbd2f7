//! The witness's book, pure: who may ask, and who holds which guest's term.
//!
//! Rules 6 and 13 of `docs/safety.md`. Every change raises `version`; a node shows the highest
//! version that it has seen, and a book that is behind it has been rolled back and refuses
//! everything until it is made anew (with a new incarnation) and both nodes enrol again.

use havm_core::ids::{GuestName, Incarnation, NodeId, Term};
use havm_links::identity::Fingerprint;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The most pairs that one witness serves.
pub const MAX_PAIRS: usize = 64;
/// The most guests of a pair.
pub const MAX_GUESTS: usize = 256;

/// A node of a pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub node: NodeId,
    /// Its name, for people.
    pub name: String,
    /// Its certificate: how it is known.
    pub fingerprint: Fingerprint,
}

/// A guest's register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// The highest term granted.
    pub term: Term,
    /// To whom.
    pub holder: NodeId,
}

/// A pair: its roster and its guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Both nodes.
    pub members: [Member; 2],
    /// A register a guest.
    pub guests: BTreeMap<GuestName, Register>,
}

/// What the witness knows, all of it durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Book {
    /// Random at init.
    pub incarnation: Incarnation,
    /// Grows with every change.
    pub version: u64,
    /// A node has shown a newer version: this book is an old copy.
    pub behind: bool,
    /// The pairs.
    pub pairs: Vec<Pair>,
}

/// What a node shows with every question: the book that it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The incarnation that it spoke with last.
    pub incarnation: Incarnation,
    /// The highest version that it saw of it.
    pub version: u64,
}

/// What a node asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum Ask {
    /// "Are you there, and who are you?"
    Probe,
    /// Rule 6.
    Request {
        /// The guest.
        guest: GuestName,
        /// The incarnation that the asker's record names.
        incarnation: Incarnation,
        /// The asker's basis.
        basis: Term,
        /// The term that it wants.
        term: Term,
    },
    /// A guest is to be protected for the first time: makes its register.
    Create {
        /// The guest.
        guest: GuestName,
        /// The incarnation that the asker knows.
        incarnation: Incarnation,
        /// The term that it starts in.
        term: Term,
        /// Who is primary in it.
        holder: NodeId,
    },
    /// A guest is protected no more: forgets its register.
    Remove {
        /// The guest.
        guest: GuestName,
        /// The incarnation that the asker knows.
        incarnation: Incarnation,
    },
}

/// What the witness answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// To a probe.
    Here,
    /// The register says so now (durably).
    Granted {
        /// The register.
        register: Register,
    },
    /// The register stays as it is.
    Refused {
        /// The register.
        register: Register,
    },
    /// There is no such register, and a request never makes one.
    KeyAbsent,
    /// The register was made, or was exactly so already; or it is removed, or was not there.
    Done,
    /// There is one already, and it says something else.
    Exists {
        /// The register.
        register: Register,
    },
    /// This is not the witness that the asker's record names.
    OtherIncarnation,
    /// This book is an old copy: it refuses everything.
    Behind,
    /// The question cannot be granted as it was asked.
    Wrong {
        /// For a person.
        why: String,
    },
}

/// Why a pair was not enrolled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnrolError {
    /// Too many.
    #[error("this witness serves {MAX_PAIRS} pairs already: use another one")]
    Full,
    /// Not two nodes.
    #[error("a pair is two different nodes with two different certificates")]
    NotAPair,
    /// The book was rolled back.
    #[error(
        "this book is an old copy (a node has seen a newer one): make it anew with `havm witness --reset`, then enrol"
    )]
    Behind,
}

impl Book {
    /// An empty one.
    pub fn new(incarnation: Incarnation) -> Self {
        Book {
            incarnation,
            version: 0,
            behind: false,
            pairs: Vec::new(),
        }
    }

    /// Every certificate that may connect.
    pub fn fingerprints(&self) -> Vec<Fingerprint> {
        let members = self.pairs.iter().flat_map(|p| &p.members);
        members.map(|m| m.fingerprint).collect()
    }

    /// The node behind a certificate.
    pub fn member(&self, fingerprint: Fingerprint) -> Option<&Member> {
        let mut members = self.pairs.iter().flat_map(|p| &p.members);
        members.find(|m| m.fingerprint == fingerprint)
    }

    /// Enrols a pair, as the operator vouched for by a code. Pairs that one of both nodes was in
    /// before end; their registers go over (the higher term where both had one), so a survivor
    /// with a new partner keeps what was granted.
    pub fn enrol(&mut self, members: [Member; 2]) -> Result<(), EnrolError> {
        if self.behind {
            return Err(EnrolError::Behind);
        }
        let [a, b] = &members;
        if a.node == b.node || a.fingerprint == b.fingerprint {
            return Err(EnrolError::NotAPair);
        }
        let concerns = |p: &Pair| {
            p.members.iter().any(|m| {
                [a, b]
                    .iter()
                    .any(|n| n.node == m.node || n.fingerprint == m.fingerprint)
            })
        };
        if !self.pairs.iter().any(concerns) && self.pairs.len() >= MAX_PAIRS {
            return Err(EnrolError::Full);
        }
        let mut guests: BTreeMap<GuestName, Register> = BTreeMap::new();
        for old in self.pairs.extract_if(.., |p| concerns(p)) {
            for (name, r) in old.guests {
                let kept = guests.entry(name).or_insert(r);
                if r.term > kept.term {
                    *kept = r;
                }
            }
        }
        self.pairs.push(Pair { members, guests });
        self.version += 1;
        Ok(())
    }

    /// Answers `who`, known by its certificate. The caller makes the book durable before it speaks
    /// when `version` or `behind` changed.
    pub fn ask(&mut self, who: Fingerprint, seen: Option<Seen>, ask: &Ask) -> Answer {
        let wrong = |why: &str| Answer::Wrong { why: why.into() };
        if let Some(seen) = seen
            && seen.incarnation == self.incarnation
            && seen.version > self.version
        {
            self.behind = true;
        }
        if self.behind {
            return Answer::Behind;
        }
        let concerned = |p: &&mut Pair| p.members.iter().any(|m| m.fingerprint == who);
        let (mine, incarnation) = (self.incarnation, asked_incarnation(ask));
        let Some(pair) = self.pairs.iter_mut().find(concerned) else {
            return wrong("this node is in no pair that the witness knows");
        };
        let Some(me) = pair
            .members
            .iter()
            .find(|m| m.fingerprint == who)
            .map(|m| m.node)
        else {
            return wrong("this node is in no pair that the witness knows");
        };
        if incarnation.is_some_and(|i| i != mine) {
            return Answer::OtherIncarnation;
        }
        let (answer, changed) = match ask {
            Ask::Probe => (Answer::Here, false),
            Ask::Request {
                guest, basis, term, ..
            } => match pair.guests.get_mut(guest) {
                None => (Answer::KeyAbsent, false),
                Some(register) => request(register, me, *basis, *term),
            },
            Ask::Create {
                guest,
                term,
                holder,
                ..
            } => create(pair, guest, *term, *holder),
            Ask::Remove { guest, .. } => (Answer::Done, pair.guests.remove(guest).is_some()),
        };
        if changed {
            self.version += 1;
        }
        answer
    }
}

fn asked_incarnation(ask: &Ask) -> Option<Incarnation> {
    match ask {
        Ask::Probe => None,
        Ask::Request { incarnation, .. }
        | Ask::Create { incarnation, .. }
        | Ask::Remove { incarnation, .. } => Some(*incarnation),
    }
}

/// Rule 6. "Less than" in place of "at most" would refuse the first request after every handover;
/// granting above the basis to a stranger would make two primaries.
fn request(register: &mut Register, me: NodeId, basis: Term, term: Term) -> (Answer, bool) {
    let wanted = Register { term, holder: me };
    if *register == wanted {
        return (
            Answer::Granted {
                register: *register,
            },
            false,
        );
    }
    let free = register.term <= basis || register.holder == me;
    if term > basis && term > register.term && free {
        *register = wanted;
        (Answer::Granted { register: wanted }, true)
    } else {
        (
            Answer::Refused {
                register: *register,
            },
            false,
        )
    }
}

fn create(pair: &mut Pair, guest: &GuestName, term: Term, holder: NodeId) -> (Answer, bool) {
    let wanted = Register { term, holder };
    if pair.members.iter().all(|m| m.node != holder) {
        let why = "the holder is not a node of this pair".into();
        return (Answer::Wrong { why }, false);
    }
    match pair.guests.get(guest) {
        Some(r) if *r == wanted => (Answer::Done, false),
        Some(r) => (Answer::Exists { register: *r }, false),
        None if pair.guests.len() >= MAX_GUESTS => {
            let why = format!("the witness keeps {MAX_GUESTS} guests of this pair already");
            (Answer::Wrong { why }, false)
        }
        None => {
            pair.guests.insert(guest.clone(), wanted);
            (Answer::Done, true)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId([0xa; 16]);
    const B: NodeId = NodeId([0xb; 16]);
    const INC: Incarnation = Incarnation([1; 16]);

    fn fp(n: NodeId) -> Fingerprint {
        Fingerprint([n.0[0]; 32])
    }
    fn member(node: NodeId) -> Member {
        Member {
            node,
            name: "n".into(),
            fingerprint: fp(node),
        }
    }
    fn web() -> GuestName {
        "web".parse().unwrap()
    }
    fn reg(term: u64, holder: NodeId) -> Register {
        Register {
            term: Term(term),
            holder,
        }
    }
    fn book(term: u64, holder: NodeId) -> Book {
        let mut b = Book::new(INC);
        b.enrol([member(A), member(B)]).unwrap();
        let ask = Ask::Create {
            guest: web(),
            incarnation: INC,
            term: Term(term),
            holder,
        };
        assert_eq!(b.ask(fp(A), None, &ask), Answer::Done);
        b
    }
    fn req(b: &mut Book, who: NodeId, basis: u64, term: u64) -> Answer {
        let ask = Ask::Request {
            guest: web(),
            incarnation: INC,
            basis: Term(basis),
            term: Term(term),
        };
        b.ask(fp(who), None, &ask)
    }
    fn granted(term: u64, holder: NodeId) -> Answer {
        Answer::Granted {
            register: reg(term, holder),
        }
    }
    fn refused(term: u64, holder: NodeId) -> Answer {
        Answer::Refused {
            register: reg(term, holder),
        }
    }

    /// The one property of it all: whoever asks, in any order, one term has one holder.
    #[test]
    fn of_two_that_ask_for_the_next_term_one_gets_it() {
        for (first, second) in [(A, B), (B, A)] {
            let mut b = book(1, A);
            assert_eq!(req(&mut b, first, 1, 2), granted(2, first));
            assert_eq!(req(&mut b, second, 1, 2), refused(2, first));
            // Nor a higher one from the old basis: it has not joined what the first one did.
            assert_eq!(req(&mut b, second, 1, 3), refused(2, first));
            // A lost reply is asked for again, and the holder may go on from its own grant.
            assert_eq!(req(&mut b, first, 1, 2), granted(2, first));
            assert_eq!(req(&mut b, first, 1, 3), granted(3, first));
            assert_eq!(req(&mut b, first, 1, 2), refused(3, first));
            // Whoever joined the granted term may ask for the one after it.
            assert_eq!(req(&mut b, second, 3, 4), granted(4, second));
        }
    }

    #[test]
    fn handovers_and_yields_need_no_witness_and_do_not_confuse_it() {
        let mut b = book(1, A);
        // Terms 2 to 6 were passed by handover; the register still says 1.
        assert_eq!(req(&mut b, B, 6, 7), granted(7, B));
        assert_eq!(req(&mut b, A, 6, 7), refused(7, B));
    }

    #[test]
    fn a_term_at_or_below_the_basis_is_never_granted() {
        let mut b = book(1, A);
        assert_eq!(req(&mut b, A, 5, 5), refused(1, A));
        assert_eq!(req(&mut b, A, 5, 3), refused(1, A));
    }

    #[test]
    fn an_absent_key_is_refused_and_never_made_by_a_request() {
        let mut b = Book::new(INC);
        b.enrol([member(A), member(B)]).unwrap();
        let before = b.clone();
        assert_eq!(req(&mut b, A, 0, 1), Answer::KeyAbsent);
        assert_eq!(b, before);
    }

    #[test]
    fn making_a_key_never_changes_one() {
        let mut b = book(3, A);
        let create = |term, holder| Ask::Create {
            guest: web(),
            incarnation: INC,
            term: Term(term),
            holder,
        };
        assert_eq!(b.ask(fp(B), None, &create(3, A)), Answer::Done);
        assert_eq!(
            b.ask(fp(B), None, &create(1, B)),
            Answer::Exists {
                register: reg(3, A)
            }
        );
        assert_eq!(
            b.ask(fp(B), None, &create(9, B)),
            Answer::Exists {
                register: reg(3, A)
            }
        );
        let stranger = create(1, NodeId([9; 16]));
        assert!(matches!(
            b.ask(fp(B), None, &stranger),
            Answer::Wrong { .. }
        ));
        let remove = Ask::Remove {
            guest: web(),
            incarnation: INC,
        };
        assert_eq!(b.ask(fp(A), None, &remove), Answer::Done);
        assert_eq!(req(&mut b, A, 3, 4), Answer::KeyAbsent);
    }

    #[test]
    fn pairs_do_not_see_each_other_and_strangers_see_nothing() {
        let mut b = book(1, A);
        let (c, d) = (NodeId([0xc; 16]), NodeId([0xd; 16]));
        b.enrol([member(c), member(d)]).unwrap();
        assert_eq!(req(&mut b, c, 9, 10), Answer::KeyAbsent);
        assert!(matches!(
            req(&mut b, NodeId([0xe; 16]), 9, 10),
            Answer::Wrong { .. }
        ));
        assert_eq!(req(&mut b, B, 1, 2), granted(2, B));
    }

    #[test]
    fn another_incarnation_is_not_asked() {
        let mut b = book(1, A);
        let ask = Ask::Request {
            guest: web(),
            incarnation: Incarnation([2; 16]),
            basis: Term(1),
            term: Term(2),
        };
        assert_eq!(b.ask(fp(A), None, &ask), Answer::OtherIncarnation);
        assert_eq!(req(&mut b, B, 1, 2), granted(2, B));
    }

    /// A witness restored from a backup would grant a term twice.
    #[test]
    fn a_book_that_is_behind_refuses_everything_for_ever() {
        let mut b = book(1, A);
        let backup = b.clone();
        assert_eq!(req(&mut b, A, 1, 2), granted(2, A));
        let seen = Some(Seen {
            incarnation: INC,
            version: b.version,
        });
        let mut b = backup;
        assert_eq!(b.ask(fp(A), seen, &Ask::Probe), Answer::Behind);
        assert_eq!(req(&mut b, B, 1, 2), Answer::Behind);
        assert_eq!(b.enrol([member(A), member(B)]), Err(EnrolError::Behind));
        // What a node knows of another incarnation says nothing about this one.
        let mut b = book(1, A);
        let other = Some(Seen {
            incarnation: Incarnation([2; 16]),
            version: 99,
        });
        assert_eq!(b.ask(fp(A), other, &Ask::Probe), Answer::Here);
    }

    #[test]
    fn every_change_has_a_new_version_and_nothing_else_has() {
        let mut b = book(1, A);
        let v = b.version;
        req(&mut b, A, 1, 2);
        assert_eq!(b.version, v + 1);
        req(&mut b, A, 1, 2);
        req(&mut b, B, 1, 2);
        b.ask(fp(A), None, &Ask::Probe);
        assert_eq!(b.version, v + 1);
    }

    #[test]
    fn a_survivor_with_a_new_partner_keeps_what_was_granted() {
        let mut b = book(5, B);
        let c = NodeId([0xc; 16]);
        b.enrol([member(A), member(c)]).unwrap();
        assert_eq!(b.pairs.len(), 1);
        assert!(matches!(req(&mut b, B, 5, 6), Answer::Wrong { .. }));
        assert_eq!(req(&mut b, A, 4, 5), refused(5, B));
        assert_eq!(req(&mut b, A, 5, 6), granted(6, A));
        assert_eq!(b.enrol([member(A), member(A)]), Err(EnrolError::NotAPair));
    }

    /// Two nodes that ask at random, with replies lost and repeated: never two holders of a term.
    #[test]
    fn random_walks_never_grant_a_term_to_both() {
        let mut seed = 42u64;
        let mut next = |n: u64| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..300 {
            let mut b = book(1, A);
            let mut owner: BTreeMap<u64, NodeId> = BTreeMap::new();
            for _ in 0..100 {
                let who = if next(2) == 0 { A } else { B };
                let basis = next(12);
                if let Answer::Granted { register } = req(&mut b, who, basis, basis + 1 + next(3)) {
                    assert_eq!(register.holder, who);
                    let held = *owner.entry(register.term.0).or_insert(who);
                    assert_eq!(held, who, "term {} twice", register.term);
                }
            }
        }
    }
}
