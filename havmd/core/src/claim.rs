//! Rule 5: who may seek a permit.

use crate::ids::LifeId;
use crate::record::{Arbiter, Record, Role, RoleStatus};

/// The right to ask for the next term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The life that the record names is unchanged.
    Warm,
    /// The life is lost; the disk is good enough. Only a witness may grant it, after a wait for
    /// the peer.
    Cold,
}

/// The claim of this record, with `life` the copy that is here now.
pub fn claim(record: &Record, life: Option<LifeId>) -> Option<Claim> {
    if !record.valid || record.status == RoleStatus::Yielded {
        return None;
    }
    let warm = life.is_some() && record.lives.map(|l| l.mine) == life;
    match (record.role, record.status) {
        (Role::Protected, RoleStatus::Active | RoleStatus::Handing) if warm => Some(Claim::Warm),
        (Role::Eligible, RoleStatus::Active) if warm => Some(Claim::Warm),
        (Role::Protected, _) if witnessed(record) => Some(Claim::Cold),
        (Role::Eligible, _) if witnessed(record) && record.cold => Some(Claim::Cold),
        _ => None,
    }
}

fn witnessed(record: &Record) -> bool {
    matches!(record.arbiter, Arbiter::Witness(_))
}
