//! The bad cases, one function each. Every one starts with `web` protected at home on alpha, and ends so.

mod guest_ends;
mod hosts;
mod links;
mod processes;
mod setup;
mod sync;

use crate::stage::Stage;
use anyhow::Result;

/// A scenario.
pub struct Scenario {
    /// Its name, for `havm-e2e run NAME`.
    pub name: &'static str,
    /// What it protects.
    pub what: &'static str,
    /// What it does.
    pub play: fn(&Stage) -> Result<()>,
}

macro_rules! scenarios {
    ($($module:ident :: $name:ident $what:literal),+ $(,)?) => {
        /// All of them, in the order in which they run.
        pub const ALL: &[Scenario] = &[
            $(Scenario { name: stringify!($name), what: $what, play: $module::$name }),+
        ];
    };
}

scenarios! {
    hosts::primary_power_off "the guest goes on at the standby, and comes home by itself",
    hosts::standby_power_off "the guest goes on alone after the permit",
    hosts::primary_frozen "a frozen primary that wakes up is silent and rejoins",
    hosts::power_off_after_promotion "power lost between promotion and first epoch",
    hosts::power_off_in_failback "power lost in the middle of the way home",
    links::one_link_after_the_other "one link is enough, whichever",
    links::cut_with_witness_for_both "both links cut: one side goes on, not two",
    links::cut_with_witness_for_primary "only the primary reaches the witness: it goes on",
    links::cut_with_witness_for_standby "only the standby reaches the witness: it goes on, the old primary stands",
    links::cut_with_no_witness "nobody reaches the witness: output is held, and flows again",
    processes::qemu_killed "QEMU killed on the primary: the standby goes on",
    processes::havmd_killed "daemons killed on each side: the guest does not notice",
    processes::replicator_killed_on_primary "the primary's data plane killed: same guest, protected again",
    processes::replicator_killed_on_standby "the standby's data plane killed: protected again",
    sync::power_off_in_resync "power lost during a resync, either side",
    sync::power_off_in_first_sync "power lost during the first sync, either side",
    sync::two_guests_opposite_homes "each server is home of one guest; each dies once",
    guest_ends::reboot_from_inside "a guest that reboots itself goes on, protected",
    guest_ends::shutdown_from_inside "a guest that switches itself off stays off",
    guest_ends::destroyed_by_virsh "a guest that its admin destroys stays off",
    setup::bad_configs "wrong configs: place and remedy",
    setup::unreachable_peer "protection without a peer is refused with a reason",
    setup::mismatched_peer "two configs that disagree: the key is named",
}
