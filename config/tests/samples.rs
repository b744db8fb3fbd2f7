//! The samples: every valid one is read, every invalid one gives exactly the expected words.
//! `HAVM_BLESS=1` writes the expected files anew; read the difference before you commit it.

use std::fs;
use std::path::{Path, PathBuf};

fn samples(kind: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("samples")
        .join(kind);
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .expect("the samples are there")
        .map(|e| e.expect("a readable entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == "toml"))
        .collect();
    files.sort();
    files
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[test]
fn valid_samples_are_read() {
    let files = samples("valid");
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        let text = fs::read_to_string(&file).expect("a readable sample");
        if let Err(e) = havm_config::parse(&text, &name(&file)) {
            panic!("{e}");
        }
    }
}

#[test]
fn invalid_samples_say_what_where_and_how_to_mend_it() {
    let files = samples("invalid");
    assert!(files.len() >= 20, "{} samples", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a readable sample");
        let got = match havm_config::parse(&text, &name(&file)) {
            Ok(_) => "(read without an error)\n".to_owned(),
            Err(e) => format!("{e}\n"),
        };
        let expected = file.with_extension("expected");
        if std::env::var_os("HAVM_BLESS").is_some() {
            fs::write(&expected, &got).expect("a writable folder");
        }
        let want = fs::read_to_string(&expected).unwrap_or_default();
        if got != want || !got.contains("help: ") || !got.contains(".toml:") {
            wrong.push(format!(
                "--- {} expected\n{want}--- got\n{got}",
                name(&file)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_printed_defaults_are_the_real_ones() {
    let full = havm_config::parse(havm_config::DEFAULTS_TOML, "defaults.toml").expect("readable");
    let least = r#"
        node = { name = "alpha" }
        witness = { kind = "builtin", address = ["10.9.0.9"] }
        [peer]
        name = "beta"
        [[peer.link]]
        name = "rep0"
        local = "10.77.0.1"
        peer = "10.77.0.2"
        [[guest]]
        name = "web"
        home = "alpha"
    "#;
    assert_eq!(full, havm_config::parse(least, "least").expect("readable"));
}

#[test]
fn both_sides_of_a_pair_agree_and_a_difference_is_named() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/valid");
    let a = havm_config::load(&dir.join("alpha.toml")).expect("readable");
    let mut b = havm_config::load(&dir.join("beta.toml")).expect("readable");
    assert_eq!(a.agreement().differences(&b.agreement()), vec![]);
    assert_eq!(a.fingerprint(), b.fingerprint());
    b.detection.lost_ms = 500;
    b.guests[0].home = "beta".into();
    let found = a.agreement().differences(&b.agreement());
    let found: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(
        found,
        [
            "detection.lost_ms: here 120, at the peer 500",
            "guest \"web\" home: here alpha, at the peer beta"
        ]
    );
    assert_ne!(a.fingerprint(), b.fingerprint());
}

/// Whatever bytes stand in the file, the answer is a model or an error, never a panic.
#[test]
fn damaged_files_never_panic() {
    let text = havm_config::DEFAULTS_TOML;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |n: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % n as u64) as usize
    };
    let pieces = [
        "\"",
        "[",
        "]",
        "=",
        "\n",
        "é",
        "-1",
        "99999999999999999999",
        "{",
        "'''",
        "\u{0}",
        "\t",
        "true",
        "[[guest]]\n",
    ];
    for _ in 0..3000 {
        let mut s = text.to_owned();
        for _ in 0..1 + next(4) {
            let mut at = next(s.len());
            while !s.is_char_boundary(at) {
                at -= 1;
            }
            if next(2) == 0 {
                s.insert_str(at, pieces[next(pieces.len())]);
            } else {
                s.truncate(at.max(1));
            }
        }
        if let Err(e) = havm_config::parse(&s, "damaged") {
            assert!(e.to_string().contains("help: "));
        }
    }
}
