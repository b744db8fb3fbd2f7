//! The checks of one [[guest]].

use super::{Checker, FAILBACK_WORDS};
use crate::diagnostic::Diagnostic;
use crate::model::*;
use crate::raw::*;
use crate::suggest;
use havm_core::ids::GuestName;
use std::collections::BTreeMap;
use std::ops::Range;
use toml::Spanned;

impl Checker<'_> {
    pub(super) fn guest(
        &mut self,
        g: Spanned<RawGuest>,
        node: &Node,
        peer: &Peer,
        failback: Failback,
        replication: Replication,
        seen: &mut BTreeMap<GuestName, usize>,
    ) -> Option<Guest> {
        let span = g.span();
        let g = g.into_inner();
        let name = match &g.name {
            None => {
                self.bad(
                    span.clone(),
                    "this guest has no `name`",
                    "add name = \"...\", the libvirt domain's",
                );
                None
            }
            Some(v) => match v.get_ref().parse::<GuestName>() {
                Err(e) => {
                    self.bad(
                        v.span(),
                        e.to_string(),
                        "rename the libvirt domain: `virsh domrename`",
                    );
                    None
                }
                Ok(n) => {
                    let line = Diagnostic::new("", self.text, v.span(), "", "").line;
                    if let Some(first) = seen.insert(n.clone(), line) {
                        self.bad(
                            v.span(),
                            format!(
                                "the guest {:?} is there twice, first in line {first}",
                                n.as_str()
                            ),
                            "keep one of both sections",
                        );
                    }
                    Some(n)
                }
            },
        };
        let home = self.home(&g.home, &span, node, peer);
        let policy = self.word(&g.policy, "policy", &[("ft", Policy::Ft)], Policy::Ft);
        let failback = Failback {
            policy: self.word(&g.failback, "failback", FAILBACK_WORDS, failback.policy),
            ..failback
        };
        let replication = self.replication(&g.replication, replication);
        Some(Guest {
            name: name?,
            home: home?,
            policy,
            failback,
            replication,
        })
    }

    fn home(
        &mut self,
        v: &Option<Spanned<String>>,
        section: &Range<usize>,
        node: &Node,
        peer: &Peer,
    ) -> Option<String> {
        let names = [node.name.as_str(), peer.name.as_str()];
        let Some(v) = v else {
            self.bad(
                section.clone(),
                "this guest has no `home`",
                format!(
                    "add home = \"{}\" or \"{}\": where it should run",
                    names[0], names[1]
                ),
            );
            return None;
        };
        if names.contains(&v.get_ref().as_str()) {
            return Some(v.get_ref().clone());
        }
        let help = match suggest::nearest(v.get_ref(), &names) {
            Some(n) => format!("did you mean \"{n}\"?"),
            None => format!("one of \"{}\", \"{}\"", names[0], names[1]),
        };
        self.bad(
            v.span(),
            format!("{:?} is neither this node nor the peer", v.get_ref()),
            help,
        );
        None
    }
}
