//! Two libvirt hosts, a witness box and an outside client on one machine, in namespaces.
//!
//! ```no_run
//! use havm_lab::{Host, Lab, LinkState, Options};
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::up(&Options::named("mytest")?)?;          // torn down when dropped
//! lab.command(Host::Alpha, "virsh").arg("list").status()?; // on alpha
//! lab.client_command("ping").args(["-c1", "10.9.0.10"]).status()?;
//! lab.set_link("rep0", LinkState::Down)?;
//! let cut = lab.power_off(Host::Alpha)?;                   // like a pulled plug
//! lab.power_on(Host::Alpha)?;
//! # Ok(()) }
//! ```

pub mod cgroup;
pub mod hostfiles;
pub mod init;
mod lab;
pub mod names;
pub mod net;
pub mod place;
pub mod procs;
pub mod run;
pub mod status;

pub use lab::{Lab, Options, PowerCut};
pub use names::Host;
pub use net::LinkState;
