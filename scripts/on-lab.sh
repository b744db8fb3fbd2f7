#!/usr/bin/env bash
# on-lab.sh LAB COMMAND…: runs a command that uses the lab LAB, and takes that lab down whatever happens.
set -u
cd "$(dirname "$0")/.."
lab=$1
shift
down() { target/release/lab --name "$lab" down >/dev/null 2>&1; }
child=
# A signal reaches the command first; the lab goes when it has ended.
on_signal() { [ -n "$child" ] && kill -TERM "$child" 2>/dev/null; wait; down; exit 130; }
trap on_signal INT TERM HUP
"$@" &
child=$!
wait "$child"
rc=$?
child=
down
exit "$rc"
