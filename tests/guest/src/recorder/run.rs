//! A run of the recorder.

use super::book::{Book, Recorded};
use super::packet::PacketSocket;
use crate::client::control;
use crate::client::handle::Asked;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What to record.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The interfaces.
    pub interfaces: Vec<String>,
    /// Where to take lines from; stdin if none.
    pub socket: Option<PathBuf>,
}

/// Runs until `stop`; prints `{"ready":true}` once it records.
pub fn run(plan: &Plan) -> Result<()> {
    let book = Arc::new(Mutex::new(Book::default()));
    let stopping = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let mut threads = Vec::new();
    for interface in &plan.interfaces {
        let socket = PacketSocket::open(interface)?;
        let (book, stopping, interface) = (book.clone(), stopping.clone(), interface.clone());
        threads.push(std::thread::spawn(move || -> Result<()> {
            let mut frame = vec![0; 1 << 17];
            while !stopping.load(Ordering::Relaxed) {
                if let Some(len) = socket.receive(&mut frame).context(interface.clone())? {
                    let now_ms = start.elapsed().as_secs_f64() * 1000.0;
                    let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
                    book.frame(&interface, now_ms, &frame[..len]);
                }
            }
            let dropped = socket.dropped();
            book.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .missed(dropped);
            Ok(())
        }));
    }
    let lines = control::lines(plan.socket.as_deref())?;
    println!("{{\"ready\":true}}");
    for line in lines {
        let now = || -> Result<String> {
            let book = book.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(serde_json::to_string(book.recorded())?)
        };
        match line.text.trim() {
            "" => {}
            "stats" => line.answer(&now()?),
            "stop" => {
                stopping.store(true, Ordering::Relaxed);
                for thread in threads {
                    match thread.join() {
                        Ok(result) => result?,
                        Err(_) => anyhow::bail!("a thread of the recorder failed"),
                    }
                }
                line.answer(&now()?);
                if let Some(socket) = &plan.socket {
                    std::fs::remove_file(socket).context("removing the socket")?;
                }
                return Ok(());
            }
            other => {
                let text = format!("{other:?} is none of stats, stop");
                line.answer(&serde_json::json!({ "error": text }).to_string());
            }
        }
    }
    Ok(())
}

/// A running `testify-client record`, as a child process.
pub struct RecorderHandle(Asked);

impl RecorderHandle {
    /// Starts it; returns when it records.
    pub fn start(command: Command) -> Result<RecorderHandle> {
        Asked::start(command).map(RecorderHandle)
    }

    /// What was recorded so far.
    pub fn stats(&mut self) -> Result<Recorded> {
        self.0.ask("stats")
    }

    /// Ends it.
    pub fn stop(mut self) -> Result<Recorded> {
        self.0.ask("stop")
    }
}
