//! From an image to running vCPUs.

use crate::error::ImageError;
use crate::ram::RamImage;
use crate::stream;
use havm_qmp::{EventKind, Qmp};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a waiting QEMU may take to load the image before it is given up. It takes some ms.
const LOAD_DEADLINE: Duration = Duration::from_secs(10);

/// Where the time of a promotion went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Promoted {
    /// Making the stream.
    pub stream: Duration,
    /// QEMU loading it.
    pub load: Duration,
    /// `cont`.
    pub cont: Duration,
    /// The stream's size, bytes.
    pub stream_bytes: usize,
}

/// Tells a waiting QEMU what the stream will look like. Once, when it is attached: it takes time that a
/// promotion should not spend.
///
/// # Errors
/// The monitor's.
pub fn prepare(qmp: &mut Qmp) -> Result<(), ImageError> {
    let caps = serde_json::json!({"capabilities": [
        {"capability": "x-ignore-shared", "state": true},
        {"capability": "events", "state": true},
    ]});
    qmp.execute("migrate-set-capabilities", caps)?;
    Ok(())
}

/// Loads the image's small blocks and `saved_devices` into the waiting QEMU (its RAM file holds the rest).
/// The guest stands afterwards; [`run`] starts it.
///
/// # Errors
/// QEMU did not take the stream: this QEMU is spent, a new one is needed.
pub fn load(
    qmp: &mut Qmp,
    machine: &str,
    image: &RamImage,
    saved_devices: &[u8],
) -> Result<Promoted, ImageError> {
    let t0 = Instant::now();
    let bytes = stream::synthesize(machine, &image.stream_blocks(), saved_devices)?;
    let stream = t0.elapsed();

    let io = |what| move |source| ImageError::Io { what, source };
    let (mut ours, theirs) = UnixStream::pair().map_err(io("make a socket pair"))?;
    ours.set_write_timeout(Some(LOAD_DEADLINE))
        .map_err(io("set a timeout"))?;
    let t1 = Instant::now();
    qmp.send_fd("havm-image", theirs.as_fd())?;
    drop(theirs);
    let stream_bytes = bytes.len();
    let writer = std::thread::Builder::new()
        .name("image-stream".into())
        .spawn(move || ours.write_all(&bytes))
        .map_err(io("start a thread"))?;
    qmp.take_events().for_each(drop);
    let asked = qmp.execute(
        "migrate-incoming",
        serde_json::json!({"uri": "fd:havm-image", "exit-on-error": false}),
    );
    let loaded = asked
        .map_err(ImageError::from)
        .and_then(|_| wait_loaded(qmp, t1));
    let written = writer.join();
    loaded?;
    match written {
        Ok(Ok(())) => {}
        Ok(Err(source)) => {
            return Err(ImageError::Io {
                what: "write the stream",
                source,
            });
        }
        Err(_) => return Err(ImageError::Load("the stream's writer died".into())),
    }
    Ok(Promoted {
        stream,
        load: t1.elapsed(),
        cont: Duration::ZERO,
        stream_bytes,
    })
}

/// Starts the vCPUs of a loaded guest.
///
/// # Errors
/// The monitor's.
pub fn run(qmp: &mut Qmp) -> Result<Duration, ImageError> {
    let t = Instant::now();
    qmp.cont()?;
    Ok(t.elapsed())
}

/// [`load`], then [`run`].
///
/// # Errors
/// As theirs.
pub fn promote(
    qmp: &mut Qmp,
    machine: &str,
    image: &RamImage,
    saved_devices: &[u8],
) -> Result<Promoted, ImageError> {
    let mut p = load(qmp, machine, image, saved_devices)?;
    p.cont = run(qmp)?;
    Ok(p)
}

fn wait_loaded(qmp: &mut Qmp, since: Instant) -> Result<(), ImageError> {
    while since.elapsed() < LOAD_DEADLINE {
        let left = LOAD_DEADLINE.saturating_sub(since.elapsed());
        match qmp.wait_event(left)?.map(|e| e.kind) {
            Some(EventKind::Migration { status }) if status == "completed" => return Ok(()),
            Some(EventKind::Migration { status }) if status == "failed" => {
                return Err(ImageError::Load(why_failed(qmp)));
            }
            Some(_) => {}
            None => break,
        }
    }
    Err(ImageError::Load(format!(
        "no answer within {} s",
        LOAD_DEADLINE.as_secs()
    )))
}

fn why_failed(qmp: &mut Qmp) -> String {
    match qmp.execute("query-migrate", serde_json::json!({})) {
        Ok(v) => v["error-desc"]
            .as_str()
            .unwrap_or("it gives no reason")
            .to_owned(),
        Err(e) => format!("and its monitor failed: {e}"),
    }
}
