#!/bin/sh
# What is done with the Python package, in a virtual environment in the directory $1:
#   check   format and lints; `fmt` mends them
#   test    the tests, against the package as users get it: a source distribution is made, pip builds a wheel of it, and that is
#           installed; further arguments are for pytest
#   bench   measure
#   wheel   a wheel for any Linux with glibc 2.17, into dist/; Zig compiles and links it
set -eu
work=$1 what=$2
shift 2
cd "$(dirname "$0")/.."
venv=$work/venv
# What pip builds in a directory of its own is built anew otherwise, SQLite too.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check"

# The environment; anew whenever what it has to hold, or the interpreter, is another.
lists="tests/python/requirements.txt tests/python/requirements-howto.txt"
# shellcheck disable=SC2086 # Words.
wanted=$("${PYTHON:-python3}" -c 'import sys; print(sys.version)' && cat $lists)
if [ "$(cat "$venv/wanted" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    # shellcheck disable=SC2046,SC2086
    $pip install $(printf -- '--requirement %s ' $lists)
    printf '%s\n' "$wanted" >"$venv/wanted"
fi
# Tools that are called by their names are those of the environment.
PATH="$(cd "$venv/bin" && pwd):$PATH"

install() {
    rm -rf "$work/dist"
    maturin sdist --out "$work/dist" >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log" >&2; exit 1; }
    $pip wheel --no-deps --wheel-dir "$work/dist" "$work"/dist/*.tar.gz
    $pip install --no-deps --force-reinstall "$work"/dist/*.whl
}

case $what in
fmt)
    ruff format --quiet lease-py tests
    ruff check --quiet --fix lease-py tests
    ;;
check)
    ruff format --quiet --check lease-py tests || { ruff format --diff lease-py tests; exit 1; }
    ruff check --quiet lease-py tests
    ;;
test)
    install
    [ $# -gt 0 ] || set -- tests/python tests/across
    exec python -m pytest -p no:cacheprovider "$@"
    ;;
bench)
    install
    exec python lease-py/benches/figures.py
    ;;
wheel)
    $pip install ziglang
    maturin build --release --quiet --zig --compatibility manylinux2014 --out dist
    ls dist
    ;;
*)
    echo "python.sh: there is no $what" >&2
    exit 2
    ;;
esac
