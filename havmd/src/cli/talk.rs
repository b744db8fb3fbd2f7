//! Asking the daemon.

use super::Exit;
use crate::control::{Answer, Client, HostStatus, Request};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Where the daemon is.
pub struct Daemon {
    socket: PathBuf,
}

/// Why there is no answer, and the exit code for it.
pub struct Trouble {
    /// For a person.
    pub text: String,
    /// For a program.
    pub exit: Exit,
}

impl Trouble {
    /// Prints it.
    pub fn print(self) -> Exit {
        eprintln!("havm: {}", self.text);
        self.exit
    }
}

impl Daemon {
    /// By the option, by the config, by the default, in this order.
    pub fn new(socket: Option<&Path>, config: &Path) -> Daemon {
        let socket = socket.map(Path::to_owned).unwrap_or_else(|| {
            let run_dir = havm_config::load(config).map_or_else(
                |_| PathBuf::from(havm_config::model::RUN_DIR),
                |c| c.node.run_dir,
            );
            run_dir.join("havmd.sock")
        });
        Daemon { socket }
    }

    /// Asks, shows progress and events by `show`, and gives the end.
    pub fn ask<T: DeserializeOwned>(
        &self,
        request: &Request,
        mut show: impl FnMut(&Answer),
    ) -> Result<T, Trouble> {
        let gone = |e: std::io::Error| Trouble {
            text: format!(
                "cannot reach havmd at {}: {e}. Is it running (`systemctl status havmd`), and are you root?",
                self.socket.display()
            ),
            exit: Exit::NoDaemon,
        };
        let mut client = Client::ask(&self.socket, request).map_err(gone)?;
        loop {
            match client.next_answer().map_err(gone)? {
                Answer::Done { value } => {
                    return serde_json::from_value(value).map_err(|e| Trouble {
                        text: format!(
                            "havmd's answer is not understood: {e}; are both of one version?"
                        ),
                        exit: Exit::Failed,
                    });
                }
                Answer::Failed { text, not_safe } => {
                    let exit = if not_safe {
                        Exit::NotSafe
                    } else {
                        Exit::Failed
                    };
                    return Err(Trouble { text, exit });
                }
                a => show(&a),
            }
        }
    }

    /// The status of this node.
    pub fn status(&self) -> Result<HostStatus, Trouble> {
        self.ask(&Request::Status, |_| {})
    }
}

/// Shows progress on stderr, so that stdout stays for results.
pub fn progress(a: &Answer) {
    if let Answer::Progress { text } = a {
        eprintln!("{text}");
    }
}
