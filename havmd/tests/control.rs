//! The control socket between `havm` and `havmd`.

use havm_daemon::control::{Answer, Answers, Client, Handler, Request, bind, serve};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A socket with a handler behind it; dropped, the folder goes.
fn socket(handler: Handler) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("s");
    let p = path.clone();
    std::thread::spawn(move || {
        let rt = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("rt");
        rt.block_on(async { serve(bind(&p).expect("bind"), handler).await });
    });
    for _ in 0..200 {
        if UnixStream::connect(&path).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    (dir, path)
}

fn answering() -> Handler {
    Arc::new(|request: Request, answers: Answers| {
        tokio::spawn(async move {
            answers.progress("working").await;
            match request {
                Request::Status => answers.done(&7).await,
                // A handler that dies without an end.
                Request::Unprotect { .. } => {}
                _ => answers.not_safe("not now").await,
            }
        });
    })
}

fn all(path: &std::path::Path, request: &Request) -> Vec<Answer> {
    let mut c = Client::ask(path, request).expect("asked");
    let mut out = vec![];
    loop {
        let a = c.next_answer().expect("an answer");
        let end = !matches!(a, Answer::Progress { .. } | Answer::Event { .. });
        out.push(a);
        if end {
            return out;
        }
    }
}

/// Only root may order guests about.
#[test]
fn the_socket_is_for_its_owner_only() {
    let (_dir, path) = socket(answering());
    let mode = std::fs::metadata(&path)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// Progress first, then exactly one end; a handler that dies still gives an end.
#[test]
fn every_request_has_one_end() {
    let (_dir, path) = socket(answering());
    let working = Answer::Progress {
        text: "working".into(),
    };
    assert_eq!(
        all(&path, &Request::Status),
        [working.clone(), Answer::Done { value: 7.into() }]
    );
    let events = Request::Events {
        last: 1,
        guest: None,
        follow: false,
    };
    assert_eq!(
        all(&path, &events)[1],
        Answer::Failed {
            text: "not now".into(),
            not_safe: true
        }
    );
    let Answer::Failed { text, .. } = &all(
        &path,
        &Request::Unprotect {
            guest: "web".parse().expect("name"),
            restart: false,
        },
    )[1] else {
        panic!("no failure")
    };
    assert!(text.contains("log"), "{text}");
}

/// Garbage gets an answer that says so, and harms no other connection.
#[test]
fn garbage_is_answered() {
    let (_dir, path) = socket(answering());
    let mut s = UnixStream::connect(&path).expect("connect");
    s.write_all(b"{\"do\":\"explode\"}\n").expect("write");
    let mut text = String::new();
    s.read_to_string(&mut text).expect("answer");
    assert!(
        text.contains("failed") && text.contains("version"),
        "{text}"
    );
    assert_eq!(all(&path, &Request::Status).len(), 2);
}
