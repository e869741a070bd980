#!/bin/sh
# Fails when lease-core has grown beyond what one person can read: at most $1 lines of code.
# Counted is what runs at the user's: Rust and SQL without blank lines, comments, unit tests, the public test kits, and what is
# generated.
set -eu
cd "$(dirname "$0")/../lease-core/src"

lines=$(find . \( -name '*.rs' -o -name '*.sql' \) ! -name conformance.rs ! -path './conformance/*' ! -name testing.rs \
    ! -name proto.rs \
    -exec awk '
        FNR == 1 { tests = 0 }
        /^#\[cfg\(test\)\]/ { tests = 1 } # They end the file.
        !tests && !/^[[:space:]]*(\/\/.*|--.*)?$/ { print }
    ' {} + | wc -l)

echo "lines: $lines of at most $1"
if [ "$lines" -eq 0 ] || [ "$lines" -gt "$1" ]; then
    echo "lines: lease-core/src has $lines lines of code. Say it in fewer words, or raise LINES in the Makefile" >&2
    exit 1
fi
