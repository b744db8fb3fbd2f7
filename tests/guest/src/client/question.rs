//! A connection over which the guest is questioned and told what to do.

use crate::proto::{
    HEADER_BYTES, Kind, PORT, Record, Request, Verdict, read_answer, write_request,
};
use crate::report::{Ask, ConnSeen, MAX_DUMP_RECORDS, Seen};
use anyhow::{Context, Result, bail};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{KeepAlive, TcpKeepCount, TcpKeepIdle, TcpKeepInterval};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A guest that answers questions.
pub struct Question {
    stream: TcpStream,
    number: u64,
}

impl Question {
    /// Connects; tries again until the time is over.
    pub fn connect(guest: IpAddr, time: Duration) -> Result<Question> {
        let address = SocketAddr::new(guest, PORT);
        let end = Instant::now() + time;
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                    // A guest that was rebooted while we wait for its answer says so only when
                    // it is asked.
                    setsockopt(&stream, KeepAlive, &true)?;
                    setsockopt(&stream, TcpKeepIdle, &1)?;
                    setsockopt(&stream, TcpKeepInterval, &1)?;
                    setsockopt(&stream, TcpKeepCount, &60)?;
                    return Ok(Question { stream, number: 0 });
                }
                Err(e) if Instant::now() >= end => {
                    return Err(e).with_context(|| format!("no testifying guest at {address}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Asks, and returns the raw answer.
    pub fn ask(&mut self, ask: &Ask) -> Result<Vec<u8>> {
        self.number += 1;
        let request = Request {
            kind: Kind::Control,
            conn: 0,
            number: self.number,
            seen_counter: 0,
            seen_stamp_ns: 0,
            payload_len: 0,
            payload_crc: 0,
        };
        write_request(&mut self.stream, request, &serde_json::to_vec(ask)?)
            .with_context(|| format!("asking the guest {ask:?}"))?;
        let (answer, body) =
            read_answer(&mut self.stream).with_context(|| format!("the answer to {ask:?}"))?;
        if answer.verdict != Verdict::Ok {
            bail!(
                "the guest refuses {ask:?}: {}",
                String::from_utf8_lossy(&body)
            );
        }
        Ok(body)
    }

    /// What the guest has seen; `check_memory` makes it look at all of its memory first.
    pub fn seen(&mut self, check_memory: bool) -> Result<Seen> {
        let ask = if check_memory { Ask::Check } else { Ask::Seen };
        serde_json::from_slice(&self.ask(&ask)?).context("what the guest has seen")
    }

    /// What the guest remembers of its connections.
    pub fn conns(&mut self) -> Result<Vec<ConnSeen>> {
        serde_json::from_slice(&self.ask(&Ask::Conns)?).context("the guest's connections")
    }

    /// Reads records back from the guest's disk; none where there is no valid one.
    pub fn records(&mut self, from: u64, count: u64) -> Result<Vec<Option<Record>>> {
        let mut out = Vec::new();
        let mut next = from;
        while next < from + count {
            let now = (from + count - next).min(MAX_DUMP_RECORDS);
            let bytes = self.ask(&Ask::Dump {
                from: next,
                count: now,
            })?;
            if bytes.len() as u64 != now * HEADER_BYTES as u64 {
                bail!("the guest sent {} bytes for {now} records", bytes.len());
            }
            for chunk in bytes.chunks_exact(HEADER_BYTES) {
                let mut head = [0; HEADER_BYTES];
                head.copy_from_slice(chunk);
                out.push(Record::decode(&head).ok());
            }
            next += now;
        }
        Ok(out)
    }
}
