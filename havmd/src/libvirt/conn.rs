//! The thread that talks to libvirt: its calls block (a start takes 0.35 s, a hung libvirtd for
//! ever), so that none may run on the daemon's loop.
//!
//! One thread and connection each: one for the host's own questions, one for each guest, so that
//! a slow start of one guest holds up no other. A lost connection is opened again at the next call.

use super::transform::Host;
use super::tree::Element;
use std::sync::mpsc;
use std::time::Duration;
use tokio::sync::oneshot;
use virt::connect::Connect;
use virt::domain::{Domain, DomainShutoffReason, DomainState, DomainStateReason};
use virt::error::ErrorNumber;
use virt::sys;

/// How long a call may take before the caller is told that libvirt does not answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Why libvirt did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LibvirtError {
    /// No connection.
    #[error(
        "cannot connect to libvirt at {uri}: {why}. Is libvirtd (or virtqemud) running? `systemctl status libvirtd virtqemud`"
    )]
    Connect {
        /// Where.
        uri: String,
        /// Why.
        why: String,
    },
    /// It refused.
    #[error("libvirt: {what}: {why}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// Its words.
        why: String,
        /// There is no such domain.
        no_domain: bool,
    },
    /// It does not answer.
    #[error("libvirt did not answer within {0} s; `virsh list` will hang too: restart libvirtd")]
    Timeout(u64),
    /// The thread is gone.
    #[error("the libvirt thread has ended")]
    Ended,
}

impl LibvirtError {
    /// There is no such domain.
    pub fn no_domain(&self) -> bool {
        matches!(
            self,
            LibvirtError::Call {
                no_domain: true,
                ..
            }
        )
    }
}

/// How a domain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomState {
    /// Its QEMU runs: vCPUs on or paused.
    Up {
        /// vCPUs stand.
        paused: bool,
    },
    /// No QEMU, and somebody meant it: shut down from inside or by `virsh shutdown`/`destroy`.
    OffOnPurpose,
    /// No QEMU, and nobody meant it (crashed, killed, never started).
    Off,
    /// libvirt does not know it.
    Absent,
}

type Job = Box<dyn FnOnce(&mut Option<Connect>) + Send>;

/// A handle; clones share the thread.
#[derive(Clone)]
pub struct Libvirt {
    uri: String,
    jobs: mpsc::Sender<Job>,
}

impl Libvirt {
    /// Starts the thread; it connects at the first call.
    pub fn start(uri: &str, name: &str) -> std::io::Result<Libvirt> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name(format!("lv-{}", name.chars().take(11).collect::<String>()))
            .spawn(move || {
                virt::error::clear_error_callback();
                let mut conn: Option<Connect> = None;
                while let Ok(job) = inbox.recv() {
                    job(&mut conn);
                }
            })?;
        Ok(Libvirt {
            uri: uri.to_owned(),
            jobs,
        })
    }

    /// Runs `f` on the thread.
    pub async fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        f: impl FnOnce(&Connect) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let (tx, rx) = oneshot::channel();
        let uri = self.uri.clone();
        let job: Job = Box::new(move |conn| {
            let out = connected(conn, &uri).and_then(|c| {
                f(c).map_err(|e| LibvirtError::Call {
                    what,
                    why: e.message().chars().take(600).collect(),
                    no_domain: e.code().is(ErrorNumber::NoDomain),
                })
            });
            // Nobody waits any more after a timeout.
            let _ = tx.send(out);
        });
        self.jobs.send(job).map_err(|_| LibvirtError::Ended)?;
        match tokio::time::timeout(CALL_TIMEOUT, rx).await {
            Ok(Ok(out)) => out,
            Ok(Err(_)) => Err(LibvirtError::Ended),
            Err(_) => Err(LibvirtError::Timeout(CALL_TIMEOUT.as_secs())),
        }
    }

    /// The persistent definition, in libvirt's own form.
    pub async fn inactive_xml(&self, name: &str) -> Result<String, LibvirtError> {
        let name = name.to_owned();
        self.call("read the definition", move |c| {
            c.lookup_domain_by_name(&name)?
                .xml_desc(sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE)
        })
        .await
    }

    /// Defines a domain, autostart off, and gives its definition back as libvirt completed it.
    pub async fn define(&self, xml: String) -> Result<String, LibvirtError> {
        self.call("define the domain", move |c| {
            let d = c.define_domain_xml(&xml)?;
            d.set_autostart(false)?;
            d.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE)
        })
        .await
    }

    /// Removes a definition; fine where there is none.
    pub async fn undefine(&self, name: &str) -> Result<(), LibvirtError> {
        let name = name.to_owned();
        let r = self
            .call("undefine the domain", move |c| {
                c.lookup_domain_by_name(&name)?.undefine()
            })
            .await;
        absent_is_fine(r)
    }

    /// Starts a QEMU by this definition, vCPUs standing.
    pub async fn create_paused(&self, xml: String) -> Result<(), LibvirtError> {
        self.call("start the domain", move |c| {
            c.create_domain_xml(&xml, sys::VIR_DOMAIN_START_PAUSED)
                .map(drop)
        })
        .await
    }

    /// Starts a defined domain as any admin would.
    pub async fn start_defined(&self, name: &str) -> Result<(), LibvirtError> {
        let name = name.to_owned();
        self.call("start the domain", move |c| {
            c.lookup_domain_by_name(&name)?.create()
        })
        .await
    }

    /// Ends a domain's QEMU at once; fine where there is none.
    pub async fn destroy(&self, name: &str) -> Result<(), LibvirtError> {
        let name = name.to_owned();
        let r = self
            .call("destroy the domain", move |c| {
                let d = c.lookup_domain_by_name(&name)?;
                if d.is_active()? { d.destroy() } else { Ok(()) }
            })
            .await;
        absent_is_fine(r)
    }

    /// Presses the power button.
    pub async fn shutdown(&self, name: &str) -> Result<(), LibvirtError> {
        let name = name.to_owned();
        self.call("shut the domain down", move |c| {
            c.lookup_domain_by_name(&name)?.shutdown()
        })
        .await
    }

    /// How it is.
    pub async fn state(&self, name: &str) -> Result<DomState, LibvirtError> {
        let name = name.to_owned();
        let r = self
            .call("read the domain's state", move |c| {
                dom_state(&c.lookup_domain_by_name(&name)?)
            })
            .await;
        match r {
            Err(LibvirtError::Call {
                no_domain: true, ..
            }) => Ok(DomState::Absent),
            r => r,
        }
    }

    /// Machine aliases, and the bridges of networks that are up.
    pub async fn host(&self) -> Result<Host, LibvirtError> {
        let (caps, nets) = self
            .call("read the host's capabilities", |c| {
                let mut nets = Vec::new();
                for n in c.list_all_networks(sys::VIR_CONNECT_LIST_NETWORKS_ACTIVE)? {
                    // A network without a bridge (hostdev, macvtap) is no error here.
                    if let (Ok(name), Ok(bridge)) = (n.name(), n.bridge_name()) {
                        nets.push((name, bridge));
                    }
                }
                Ok((c.capabilities()?, nets))
            })
            .await?;
        Ok(Host {
            network_bridges: nets.into_iter().collect(),
            ..read_host(&caps)
        })
    }

    /// libvirt's and QEMU's version, as major * 1,000,000 + minor * 1,000 + release.
    pub async fn versions(&self) -> Result<(u32, u32), LibvirtError> {
        self.call("read the versions", |c| {
            Ok((c.lib_version()?, c.hyp_version()?))
        })
        .await
    }
}

fn absent_is_fine(r: Result<(), LibvirtError>) -> Result<(), LibvirtError> {
    match r {
        Err(LibvirtError::Call {
            no_domain: true, ..
        }) => Ok(()),
        r => r,
    }
}

fn connected<'a>(conn: &'a mut Option<Connect>, uri: &str) -> Result<&'a Connect, LibvirtError> {
    if conn
        .as_ref()
        .is_some_and(|c| !c.is_alive().unwrap_or(false))
    {
        *conn = None;
    }
    if conn.is_none() {
        *conn = Some(Connect::open(Some(uri)).map_err(|e| LibvirtError::Connect {
            uri: uri.to_owned(),
            why: e.message().to_owned(),
        })?);
    }
    conn.as_ref().ok_or(LibvirtError::Ended)
}

fn dom_state(d: &Domain) -> Result<DomState, virt::error::Error> {
    let (state, reason) = d.state()?;
    Ok(match state {
        s if s.is(DomainState::Shutoff) => match reason {
            r if r.meant() == Some(true) => DomState::OffOnPurpose,
            _ => DomState::Off,
        },
        s if s.is(DomainState::Paused) => DomState::Up { paused: true },
        s if s.is(DomainState::Crashed) || s.is(DomainState::NoState) => DomState::Off,
        _ => DomState::Up { paused: false },
    })
}

trait Purpose {
    fn meant(&self) -> Option<bool>;
}
impl<I> Purpose for virt::enumutil::Enum<DomainStateReason, I> {
    /// Whether a domain that is off was turned off by somebody.
    fn meant(&self) -> Option<bool> {
        match self {
            virt::enumutil::Enum::Known(DomainStateReason::Shutoff(
                virt::enumutil::Enum::Known(r),
            )) => Some(matches!(
                r,
                DomainShutoffReason::Shutdown | DomainShutoffReason::Destroyed
            )),
            _ => None,
        }
    }
}

/// What libvirt's capabilities say: machine types for x86_64, and whom QEMU runs as.
fn read_host(caps: &str) -> Host {
    let mut out = Host::default();
    let Ok(caps) = Element::parse(caps) else {
        return out;
    };
    // `+64055:+994` of the model `dac`: whom QEMU runs as.
    let labels = caps
        .at(&["host"])
        .into_iter()
        .flat_map(|h| h.all("secmodel"))
        .filter(|m| m.get("model").is_some_and(|n| n.text == "dac"))
        .flat_map(|m| m.all("baselabel"));
    for label in labels {
        let mut n = label
            .text
            .split(':')
            .map(|s| s.trim_start_matches('+').parse().ok());
        if let (Some(Some(u)), Some(Some(g))) = (n.next(), n.next()) {
            out.qemu_ids = (u, g);
        }
    }
    for arch in caps
        .all("guest")
        .filter_map(|g| g.get("arch"))
        .filter(|a| a.attr("name") == Some("x86_64"))
    {
        for m in arch.all("machine") {
            out.machines.insert(m.text.clone());
            if let Some(full) = m.attr("canonical") {
                out.machine_aliases.insert(m.text.clone(), full.to_owned());
            }
        }
    }
    out
}
