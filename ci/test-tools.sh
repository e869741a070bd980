#!/bin/sh
# Gets what the tests of the C library make use of, as far as it is missing: clang, CMake and pkg-config from PyPI into the
# directory $1; a C++ compiler, valgrind, libuv and libev from Debian's packages, which takes root.
set -eu
tools=$1
python=${PYTHON:-python3}

has() {
    for each; do
        command -v "$each" >/dev/null || [ -x "$tools/bin/$each" ] || return 1
    done
}

has_header() {
    printf '#include <%s>\n' "$1" | "${CC:-cc}" -E - >/dev/null 2>&1
}

wheels=
has clang clang++ || "$tools/bin/python" -c 'import ziglang' 2>/dev/null || wheels="$wheels ziglang"
has cmake || wheels="$wheels cmake"
has pkg-config || has pkgconf || wheels="$wheels pkgconf"
if [ -n "$wheels" ]; then
    [ -x "$tools/bin/python" ] || "$python" -m venv "$tools"
    # shellcheck disable=SC2086 # A word a wheel.
    "$tools/bin/python" -m pip install --quiet --disable-pip-version-check $wheels
fi

packages=
has c++ || packages="$packages g++"
has valgrind || packages="$packages valgrind"
has_header uv.h || packages="$packages libuv1-dev"
has_header ev.h || packages="$packages libev-dev"
if [ -n "$packages" ]; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing, and only to be had as root: apt-get install$packages" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # A word a package.
    { apt-get update && apt-get install --yes --no-install-recommends $packages; } >"$tools.log" 2>&1 ||
        { cat "$tools.log" >&2; exit 1; }
fi
