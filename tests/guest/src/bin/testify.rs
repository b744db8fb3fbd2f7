//! Process 1 of the testifying guest.

use havm_guest::guest::disk::Log;
use havm_guest::guest::memory::Memory;
use havm_guest::guest::server::Server;
use havm_guest::guest::{init, say};
use std::path::Path;

fn main() {
    if std::process::id() != 1 {
        eprintln!("testify runs as process 1 of the test guest: see tests/guest");
        std::process::exit(2);
    }
    let wanted = init::start();
    init::obey_power_button();
    let log = init::disk().and_then(|path| match Log::open(Path::new(path)) {
        Ok(log) => Some(log),
        Err(e) => {
            say(&format!("{path}: {e}"));
            None
        }
    });
    if log.is_none() {
        say("no disk: answers carry no record");
    }
    let memory = Memory::start();
    if let Some((rate, set)) = wanted.dirty
        && let Err(e) = memory.dirty(rate, set)
    {
        say(&format!("havm.dirty: {e}"));
    }
    if let Err(e) = Server::new(log, memory).serve() {
        say(&format!("cannot serve: {e}"));
    }
    // Process 1 must not end: the kernel would panic.
    loop {
        std::thread::park();
    }
}
