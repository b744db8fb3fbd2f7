//! Drives a client or recorder that runs as a child process: what end-to-end tests use.
//!
//! ```no_run
//! use havm_guest::client::ClientHandle;
//! # fn main() -> anyhow::Result<()> {
//! # let command_in_the_client_namespace = std::process::Command::new("testify-client");
//! let mut command = command_in_the_client_namespace;
//! command.args(["run", "10.9.0.10"]);
//! let mut client = ClientHandle::start(command)?;
//! client.mark()?;
//! // … power something off …
//! println!("outage so far: {} ms", client.stats()?.max_gap.ms);
//! let proof = client.stop()?;
//! assert!(proof.perfect(), "{proof:?}");
//! # Ok(()) }
//! ```

use super::proof::Proof;
use super::run::Stats;
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A child that is asked by lines. It is killed when this is dropped.
pub struct Asked {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Drop for Asked {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Asked {
    /// Starts it and waits for its `{"ready":true}`.
    pub fn start(mut command: Command) -> Result<Asked> {
        let what = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {what}"))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{what} has no pipes");
        };
        let mut asked = Asked {
            child,
            to,
            from: BufReader::new(from),
        };
        let ready: serde_json::Value = asked.read().with_context(|| format!("starting {what}"))?;
        if ready["ready"] != true {
            bail!("{what} said {ready} instead of being ready");
        }
        Ok(asked)
    }

    fn read<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self
            .from
            .read_line(&mut line)
            .context("reading its answer")?
            == 0
        {
            bail!("it ended without an answer: {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("it said {line:?}"))
    }

    /// Sends a line, reads the answer.
    pub fn ask<T: DeserializeOwned>(&mut self, line: &str) -> Result<T> {
        self.to
            .write_all(format!("{line}\n").as_bytes())
            .context("asking")?;
        self.read()
    }
}

/// A running `testify-client run`.
pub struct ClientHandle(Asked);

impl ClientHandle {
    /// Starts it; returns when all its connections stand.
    pub fn start(command: Command) -> Result<ClientHandle> {
        Asked::start(command).map(ClientHandle)
    }

    /// How it goes.
    pub fn stats(&mut self) -> Result<Stats> {
        self.0.ask("stats")
    }

    /// Gaps in [`Stats`] count anew from here.
    pub fn mark(&mut self) -> Result<Stats> {
        self.0.ask("mark")
    }

    /// Ends it and returns the proof.
    pub fn stop(mut self) -> Result<Proof> {
        self.0.ask("stop")
    }
}
