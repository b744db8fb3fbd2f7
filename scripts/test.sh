#!/usr/bin/env bash
# Everything CI runs: lints, unit, simulation and model tests first, then the real lab.
set -u
cd "$(dirname "$0")/.."
scripts/deps.sh || exit 1

step() { printf '\n== %s\n' "$*"; }
step format;   cargo fmt --all -- --check || exit 1
step lints;    cargo clippy --workspace --all-targets --release -- -D warnings || exit 1
step 'programs and the guest image'
cargo build --release --workspace --bins --examples || exit 1
target/release/lab guest-image || exit 1
step 'unit, simulation and component tests'
# Doc tests have nothing to show here that the unit tests do not.
cargo test --release --workspace --lib --bins --tests --no-fail-fast || exit 1
step 'end to end, on the lab'
exec scripts/on-lab.sh havm-e2e target/release/havm-e2e run
