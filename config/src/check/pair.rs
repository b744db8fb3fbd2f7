//! The checks of [node], [peer] and its links.

use super::{Checker, MAX_LINKS};
use crate::model::*;
use crate::raw::*;
use havm_core::spec::LinkSpec;
use std::net::IpAddr;
use std::ops::Range;
use toml::Spanned;

impl Checker<'_> {
    pub(super) fn node(&mut self, raw: Option<Spanned<RawNode>>) -> Node {
        let Some(raw) = raw else {
            self.bad(
                0..0,
                "the section [node] is missing",
                "add:  [node]  name = \"...\"",
            );
            return Node {
                name: String::new(),
                state_dir: STATE_DIR.into(),
                run_dir: RUN_DIR.into(),
                log: LOG.into(),
            };
        };
        let span = raw.span();
        let raw = raw.into_inner();
        Node {
            name: self.name(&raw.name, "name", span),
            state_dir: self.path(&raw.state_dir, "state_dir", STATE_DIR),
            run_dir: self.path(&raw.run_dir, "run_dir", RUN_DIR),
            log: self.text(&raw.log, "log", LOG),
        }
    }

    pub(super) fn peer(&mut self, raw: Option<Spanned<RawPeer>>, node: &Node) -> Peer {
        let Some(raw) = raw else {
            self.bad(
                0..0,
                "the section [peer] is missing",
                "a pair has two servers: add [peer] with `name`, and at least one [[peer.link]] with `name`, `local`, `peer`",
            );
            return Peer {
                name: String::new(),
                links: Vec::new(),
                beat_port: BEAT_PORT,
                peer_port: PEER_PORT,
                replication_ports: REPLICATION_PORTS,
            };
        };
        let span = raw.span();
        let raw = raw.into_inner();
        let name = self.name(&raw.name, "name", span.clone());
        if !name.is_empty() && name == node.name {
            self.bad(
                raw.name.as_ref().map_or(span.clone(), Spanned::span),
                format!("the peer has this node's own name {name:?}"),
                "give each server its own name; on the other one, swap [node] and [peer]",
            );
        }
        let peer_port = self.port(&raw.peer_port, "peer_port", PEER_PORT);
        let replication_ports = self.port_range(&raw.replication_ports);
        if (replication_ports.0..=replication_ports.1).contains(&peer_port) {
            let at = raw.replication_ports.as_ref().map(Spanned::span);
            let at = at.or(raw.peer_port.as_ref().map(Spanned::span));
            self.bad(
                at.unwrap_or(span.clone()),
                format!("`peer_port` {peer_port} lies within `replication_ports`"),
                "both are TCP: move one of them",
            );
        }
        if raw.link.is_empty() {
            self.bad(
                span,
                "the peer has no link",
                "add at least one [[peer.link]] with `name`, `local` and `peer` (IP addresses)",
            );
        } else if let Some(l) = raw.link.get(MAX_LINKS) {
            self.bad(
                l.span(),
                format!("more than {MAX_LINKS} links"),
                "remove some",
            );
        }
        let links = self.links(raw.link);
        Peer {
            name,
            links,
            beat_port: self.port(&raw.beat_port, "beat_port", BEAT_PORT),
            peer_port,
            replication_ports,
        }
    }

    fn port_range(&mut self, v: &Option<Spanned<Vec<i64>>>) -> (u16, u16) {
        let Some(v) = v else { return REPLICATION_PORTS };
        let port = |n: &i64| u16::try_from(*n).ok().filter(|p| *p > 0);
        if let [a, b] = v.get_ref().as_slice()
            && let (Some(a), Some(b)) = (port(a), port(b))
            && a <= b
        {
            return (a, b);
        }
        self.bad(
            v.span(),
            "`replication_ports` is not a range of ports",
            "write [first, last] with 1 <= first <= last <= 65535, like [7440, 7499]",
        );
        REPLICATION_PORTS
    }

    fn links(&mut self, raw: Vec<Spanned<RawLink>>) -> Vec<LinkSpec> {
        let mut links: Vec<LinkSpec> = Vec::new();
        for l in raw.into_iter().take(MAX_LINKS) {
            let span = l.span();
            let l = l.into_inner();
            let name = self.name(&l.name, "name", span.clone());
            let local = self.ip(&l.local, "local", span.clone());
            let peer = self.ip(&l.peer, "peer", span.clone());
            if let Some(other) = links.iter().find(|o| o.name == name) {
                let message = format!("a second link named {:?}", other.name);
                let at = l.name.as_ref().map_or(span.clone(), Spanned::span);
                self.bad(at, message, "give each link its own name");
            }
            let (Some(local), Some(peer)) = (local, peer) else {
                continue;
            };
            let at = l.peer.as_ref().map_or(span, Spanned::span);
            if local == peer {
                self.bad(
                    at,
                    format!("link {name:?} has the same address on both ends"),
                    "`local` is this server's address, `peer` the other's",
                );
            } else if local.is_ipv4() != peer.is_ipv4() {
                self.bad(
                    at,
                    format!("link {name:?} mixes IPv4 and IPv6"),
                    "use one family on both ends",
                );
            } else if let Some(o) = links.iter().find(|o| o.local == local || o.peer == peer) {
                let message = format!("link {name:?} shares an address with link {:?}", o.name);
                self.bad(
                    at,
                    message,
                    "a second link helps only on its own card, cable and subnet",
                );
            }
            links.push(LinkSpec { name, local, peer });
        }
        links
    }

    fn ip(
        &mut self,
        v: &Option<Spanned<String>>,
        key: &str,
        section: Range<usize>,
    ) -> Option<IpAddr> {
        let Some(v) = v else {
            self.bad(
                section,
                format!("`{key}` is missing here"),
                format!("add `{key} = \"10.0.0.1\"` to this section"),
            );
            return None;
        };
        match v.get_ref().parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() || ip.is_multicast() => {
                self.bad(
                    v.span(),
                    format!("{ip} cannot be the address of one end of a link"),
                    "name the address of that server on this link",
                );
                None
            }
            Ok(ip) => Some(ip),
            Err(_) => {
                self.bad(
                    v.span(),
                    format!("{:?} is not an IP address", v.get_ref()),
                    "write it like \"10.77.0.1\" or \"fd00::1\": no port, no host name (names may not resolve when they are needed most)",
                );
                None
            }
        }
    }
}
