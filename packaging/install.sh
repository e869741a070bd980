#!/bin/sh
# Installs what `cargo build --release -p lease-ffi` built in the directory $1, under PREFIX, LIBDIR, INCLUDEDIR; all of
# them within DESTDIR, if it is set.
set -eu
built=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# What the library itself says it is.
soname=$(LC_ALL=C readelf -d "$built/liblease.so" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
lib="${DESTDIR:-}$LIBDIR" include="${DESTDIR:-}$INCLUDEDIR"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# As the shared library, the static one defines no name but ours: a program may have an SQLite, or a Rust library, of its
# own. Without what only a compiler of one version could use.
"${LD:-ld}" -r --whole-archive "$built/liblease.a" -o "$work/lease.o"
"${OBJCOPY:-objcopy}" --wildcard --keep-global-symbol='lease_*' --strip-debug \
    --remove-section=.llvmbc --remove-section=.llvmcmd "$work/lease.o"
"${AR:-ar}" rcs "$work/liblease.a" "$work/lease.o"
"${OBJCOPY:-objcopy}" --strip-debug "$built/liblease.so" "$work/liblease.so"

install -d "$lib/pkgconfig" "$lib/cmake/lease" "$include"
install -m 755 "$work/liblease.so" "$lib/liblease.so.$version"
ln -sf "liblease.so.$version" "$lib/$soname"
ln -sf "$soname" "$lib/liblease.so"
install -m 644 "$work/liblease.a" "$lib/liblease.a"
install -m 644 include/lease.h include/lease.hpp "$include/"

# In terms of the prefix where they lie below it, so that the prefix can be defined anew.
below() {
    case $1 in
    "$PREFIX"/*) printf '${prefix}/%s\n' "${1#"$PREFIX"/}" ;;
    *) printf '%s\n' "$1" ;;
    esac
}

fill() {
    sed -e "s|@PC_LIBDIR@|$(below "$LIBDIR")|g" -e "s|@PC_INCLUDEDIR@|$(below "$INCLUDEDIR")|g" \
        -e "s|@INCLUDEDIR_FROM_LIBDIR@|$(realpath -m --relative-to="$LIBDIR" "$INCLUDEDIR")|g" \
        -e "s|@PREFIX@|$PREFIX|g" -e "s|@LIBDIR@|$LIBDIR|g" -e "s|@INCLUDEDIR@|$INCLUDEDIR|g" \
        -e "s|@VERSION@|$version|g" -e "s|@SONAME@|$soname|g" "packaging/$1.in" >"$2/$1"
    chmod 644 "$2/$1"
}
fill lease.pc "$lib/pkgconfig"
fill leaseConfig.cmake "$lib/cmake/lease"
fill leaseConfigVersion.cmake "$lib/cmake/lease"
