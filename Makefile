# What there is to do with this repository. `make` alone says it.

CARGO ?= cargo
PYTHON ?= python3

# How much code lease-core may have: see ci/lines.sh.
LINES := 8350
# Where `make install` puts the C library; all of it within DESTDIR, if that is set.
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
# How long the demo runs: at least 6.
SECONDS ?= 8

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-python test-tools etcd soak bench header proto install wheel check fmt tools

# Where the tests look for etcd servers.
ETCD = $${CARGO_TARGET_DIR:-target}/etcd
# Where the Python package is built and tested.
PYTHON_WORK = $${CARGO_TARGET_DIR:-target}/python

help: ## Say what there is to do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: tools ## Fifty contenders in ten processes want one name, for SECONDS=8
	$(CARGO) run --release --locked -p lease-core --example demo -- --seconds $(SECONDS)

test: test-rust test-python ## Run every test there is, doc tests too

test-rust: tools etcd ## Those of Rust and C, with all features and with none
	@echo "== tests: all features"
	$(CARGO) test --workspace --all-features --locked --no-fail-fast
	@echo "== tests: no features"
	$(CARGO) test -p lease-core --no-default-features --locked --no-fail-fast

test-python: tools etcd ## Those of the Python package, as it is installed, and of all languages on one store
	@echo "== tests: Python"
	@sh ci/tools.sh python
	sh ci/python.sh "$(PYTHON_WORK)" test

test-tools: tools ## Get what the tests of the C library can make use of: clang, CMake, valgrind, libuv, libev
	@mkdir -p "$${CARGO_TARGET_DIR:-target}"
	sh ci/test-tools.sh "$${CARGO_TARGET_DIR:-target}/test-tools"

etcd: tools ## Get the etcd servers that the tests run on: without root, nothing is installed
	@sh ci/etcd.sh "$(ETCD)" || { \
		echo "THERE IS NO ETCD TO BE HAD HERE: the etcd store is NOT tested. See above; put servers into $(ETCD)" >&2; \
		[ -z "$$CI" ]; \
	}

bench: tools etcd ## Measure
	$(CARGO) bench -p lease-core --bench figures --locked
	$(CARGO) bench -p lease-core --features etcd --bench etcd --locked
	$(CARGO) bench -p lease-ffi --bench figures --locked
	sh ci/python.sh "$(PYTHON_WORK)" bench

soak: tools etcd ## Hunt for what happens seldom: 4,000 seeds of faults, 6,600 power failures, all faults of etcd for long, a thousand ends of Python
	CYCLES=1000000 $(CARGO) test --release -p lease-core --all-features --locked --test threads cycles
	CHAOS_SEEDS=4000 $(CARGO) test --release -p lease-core --all-features --locked --test chaos
	SQLITE_ROUNDS=20 $(CARGO) test --release -p lease-core --all-features --locked --test sqlite_faults
	ETCD_ROUNDS=5 $(CARGO) test --release -p lease-core --all-features --locked --test etcd -- --test-threads=8
	EXITS=40 sh ci/python.sh "$(PYTHON_WORK)" test -k interpreter_may_end

install: tools ## Install the C library: PREFIX=/usr/local, LIBDIR, INCLUDEDIR, DESTDIR
	$(CARGO) build --release --locked -p lease-ffi
	DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" LIBDIR="$(LIBDIR)" INCLUDEDIR="$(INCLUDEDIR)" \
		sh packaging/install.sh "$${CARGO_TARGET_DIR:-target}/release"

wheel: tools ## Build a Python wheel for any Linux with glibc 2.17, into dist/
	sh ci/python.sh "$(PYTHON_WORK)" wheel

proto: tools ## Write the messages of etcd anew from lease-core/proto/etcd.proto
	BLESS=1 $(CARGO) test -p lease-core --locked --test proto

header: ## Write include/lease.h anew from the sources
	BLESS=1 $(CARGO) test -p lease-ffi --locked --test header

check: ## Everything but the tests: format, lints, docs, licences, size
	@sh ci/tools.sh check
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --all-features --locked -- -D warnings
	$(CARGO) clippy -p lease-core --all-targets --no-default-features --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --all-features --locked
	$(PYTHON) ci/licences.py --self-test
	$(PYTHON) ci/licences.py
	sh ci/lines.sh $(LINES)
	sh ci/python.sh "$(PYTHON_WORK)" check

fmt: ## Format the code
	$(CARGO) fmt --all
	sh ci/python.sh "$(PYTHON_WORK)" fmt

# Rust and a C compiler are all it takes, and Python 3.11 for the checks: nothing to install, so it says what is missing.
tools:
	@sh ci/tools.sh
