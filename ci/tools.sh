#!/bin/sh
# Says what this machine lacks, and how to get it without root: to build and test, with `check` also for `make check`, with
# `python` for the Python package.
set -eu

missing=0
lacks() {
    echo "missing: $1" >&2
    missing=1
}

# Whether version $1 is at least version $2.
at_least() {
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
if ! command -v cargo >/dev/null; then
    lacks "cargo. Install Rust $rust or later for this user: https://rustup.rs"
else
    found=$(cargo --version | cut -d ' ' -f 2)
    at_least "$found" "$rust" || lacks "Rust $rust; found $found. Run: rustup update stable"
fi

command -v "${CC:-cc}" >/dev/null ||
    lacks "a C compiler, for the SQLite that is built in. Set CC to one, or install gcc or clang"

case "${1:-}" in check | python)
    "${PYTHON:-python3}" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        lacks "Python 3.11 or later with its module venv (Debian: python3-venv). Set PYTHON to one"
    ;;
esac

if [ "${1:-}" = check ]; then
    cargo fmt --version >/dev/null 2>&1 || lacks "rustfmt. Run: rustup component add rustfmt"
    cargo clippy --version >/dev/null 2>&1 || lacks "clippy. Run: rustup component add clippy"
fi

exit "$missing"
