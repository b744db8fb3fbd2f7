//! How a test, or a person, talks to a running client or recorder: lines over stdin or a unix
//! socket, one JSON line back for each.

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A line, and where its answer goes.
pub struct Line {
    /// The line without its end; `stop` also stands for the end of stdin.
    pub text: String,
    answer: Box<dyn FnOnce(&str) + Send>,
}

impl Line {
    /// One whose answer is printed.
    pub fn print(text: &str) -> Line {
        // Nobody may be there to read it: a failed write is no matter.
        let print = |text: &str| drop(writeln!(std::io::stdout(), "{text}"));
        Line {
            text: text.to_owned(),
            answer: Box::new(print),
        }
    }

    /// Answers with one line.
    pub fn answer(self, text: &str) {
        (self.answer)(text);
    }
}

/// Lines from a unix socket where one is named, else from stdin.
pub fn lines(socket: Option<&Path>) -> Result<Receiver<Line>> {
    let (sender, receiver) = channel();
    match socket {
        None => {
            std::thread::spawn(move || from_stdin(&sender));
        }
        Some(path) => {
            // One left behind by a client that was killed.
            let _ = std::fs::remove_file(path);
            let listener = UnixListener::bind(path)
                .with_context(|| format!("opening the socket {}", path.display()))?;
            std::thread::spawn(move || {
                for stream in listener.incoming().filter_map(Result::ok) {
                    let sender = sender.clone();
                    std::thread::spawn(move || from_socket(stream, &sender));
                }
            });
        }
    }
    Ok(receiver)
}

fn from_stdin(sender: &Sender<Line>) {
    for text in std::io::stdin().lines() {
        let Ok(text) = text else { break };
        if sender.send(Line::print(&text)).is_err() {
            return;
        }
    }
    // Who started it is gone.
    let _ = sender.send(Line::print("stop"));
}

fn from_socket(stream: UnixStream, sender: &Sender<Line>) {
    let Ok(to) = stream.try_clone() else { return };
    for text in BufReader::new(stream).lines() {
        let (Ok(text), Ok(mut to)) = (text, to.try_clone()) else {
            return;
        };
        let answer = Box::new(move |text: &str| {
            // An asker that left does not get its answer.
            let _ = to.write_all(format!("{text}\n").as_bytes());
        });
        if sender.send(Line { text, answer }).is_err() {
            return;
        }
    }
}

/// Sends one line to a socket and returns the answer.
pub fn ask(socket: &Path, line: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("nothing listens at {}", socket.display()))?;
    stream
        .write_all(format!("{line}\n").as_bytes())
        .context("asking")?;
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .context("the answer")?;
    Ok(answer.trim_end().to_owned())
}
