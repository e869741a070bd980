"""Real etcd servers on this machine, to be frozen and killed. They end with this process, however it ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60.0
"""A server that takes longer to start, or a cluster to have a leader, does not."""

# Servers read variables of their own.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("ETCD_", "ETCDCTL_"))}
# It reads until its standard input ends: when that is closed, or this process is gone.
SHELL = '"$@" </dev/null & echo $!; read -r _; kill -9 $!; wait'


def folder() -> Path:
    """Where `make etcd` puts servers."""
    target = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
    return Path(os.environ.get("ETCD_SERVERS", target / "etcd"))


def needed() -> Path:
    """The newest server that is there. Without one the test is skipped, and fails where there has to be one."""
    there = [folder() / name for name in ("etcd-3.5", "etcd-3.4") if os.access(folder() / name, os.X_OK)]
    if there and os.access(folder() / "etcdctl", os.X_OK):
        return there[0]
    lack = f"THERE IS NO ETCD in {folder()}: what runs on it is not tested. `make etcd` gets it"
    if os.environ.get("CI"):
        pytest.fail(lack)
    pytest.skip(lack)


def until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < deadline, f"in vain waited for: {what}"
        time.sleep(0.02)


class Leader(NamedTuple):
    member: int
    """Its id in the cluster."""
    node: int


class Node:
    """One server, at the same addresses and on the same data whenever it is started again."""

    def __init__(self, server: Path, name: str, ports: tuple[int, int], peers: str, directory: Path) -> None:
        self.port = ports[0]
        client, peer = (f"http://127.0.0.1:{port}" for port in ports)
        self.command = ["sh", "-c", SHELL, "sh", str(server), "--name", name, "--data-dir", str(directory / name)]
        self.command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        self.command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", peers]
        self.log = directory / f"{name}.log"
        self.running: subprocess.Popen[str] | None = None
        self.pid = 0

    def start(self) -> None:
        assert self.running is None, "it runs"
        pipe = subprocess.PIPE
        with self.log.open("a") as log:
            # In a session of its own: Ctrl-C is not to end the shell before its server.
            self.running = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=ENVIRONMENT, start_new_session=True
            )
        self.pid = int(self._pipes()[1].readline())

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.running is not None and self.running.stdin is not None and self.running.stdout is not None
        return self.running.stdin, self.running.stdout

    def kill(self) -> None:
        """As a power failure would end it: it is gone when this returns. A frozen one too, and one that is."""
        if self.running is None:
            return
        stdin, stdout = self._pipes()
        with suppress(BrokenPipeError):
            # A forked child may have the pipe too: so it is not only closed.
            stdin.write("\n")
            stdin.close()
        stdout.close()
        # The shell has waited for the server.
        self.running.wait(LIMIT)
        self.running = None

    def signal(self, which: signal.Signals, state: str) -> None:
        assert self.running is not None, "it does not run"
        os.kill(self.pid, which)
        stat = Path(f"/proc/{self.pid}/stat")
        until(lambda: stat.read_text().rpartition(") ")[2][0] in state, f"{which.name} does something")

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP, "T")

    def thaw(self) -> None:
        self.signal(signal.SIGCONT, "RSD")


class Cluster:
    """Servers that form one cluster."""

    def __init__(self, nodes: int = 1, *options: str) -> None:
        server = needed()
        self.user: str | None = None
        memory = Path("/dev/shm")
        where = memory if os.access(memory, os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-servers-", dir=where))
        ports = free_ports(2 * nodes)
        pairs = list(zip(ports[::2], ports[1::2], strict=True))
        peers = ",".join(f"n{at}=http://127.0.0.1:{peer}" for at, (_, peer) in enumerate(pairs))
        self.nodes = [Node(server, f"n{at}", pair, peers, self.directory) for at, pair in enumerate(pairs)]
        with ExitStack() as undo:
            undo.callback(self.close)
            for node in self.nodes:
                node.command += options
                node.start()
            self.wait_until_healthy(*range(nodes))
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self.directory)

    def url(self, prefix: str, access: str = "") -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"etcd://{access}{hosts}/{prefix}"

    def kill(self, at: int) -> None:
        self.nodes[at].kill()

    def revive(self, at: int) -> None:
        """Starts what was killed; it serves when this returns."""
        self.nodes[at].start()
        self.wait_until_healthy(at)

    def wait_until_healthy(self, *nodes: int) -> None:
        """Until each of these nodes answers with the consent of a majority."""
        for at in nodes:
            ask = self.command([self.nodes[at]], "get", "health", "--command-timeout=1s")

            def answers(ask: list[str] = ask) -> bool:
                return subprocess.run(ask, env=ENVIRONMENT, capture_output=True, timeout=LIMIT).returncode == 0

            self.until(answers, "etcd to start")

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Waits, and shows what the servers said if it is in vain."""
        try:
            until(happened, what)
        except AssertionError as error:
            for node in self.nodes:
                state = "runs" if node.running else "was killed"
                said = node.log.read_text(errors="replace")
                panic = said.find("panic")
                error.add_note(f"port {node.port}, {state}:\n{said[-1500:] if panic < 0 else said[panic - 1000 :][:4000]}")
            raise

    def leader(self) -> Leader | None:
        """``None`` while no server that runs says that it leads."""
        # Those that do not answer are told by the status, and the others on standard output.
        command = self.command(self._running(), "endpoint", "status", "--write-out=json", "--command-timeout=2s")
        said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT).stdout
        for each in json.loads(said or "[]"):
            status = each["Status"]
            if status.get("leader") == status["header"]["member_id"]:  # Left out while there is none.
                port = int(each["Endpoint"].rpartition(":")[2])
                return Leader(status["leader"], [node.port for node in self.nodes].index(port))
        return None

    def _running(self) -> list[Node]:
        return [node for node in self.nodes if node.running is not None]

    def command(self, nodes: list[Node], *arguments: str) -> list[str]:
        endpoints = ",".join(f"http://127.0.0.1:{node.port}" for node in nodes)
        user = [f"--user={self.user}"] if self.user else []
        return [str(folder() / "etcdctl"), f"--endpoints={endpoints}", *user, *arguments]

    def ctl(self, *arguments: str) -> str:
        """Runs etcdctl against all servers that run; what it says."""
        command = self.command(self._running(), *arguments)
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, f"etcdctl {arguments}: {done.stderr}"
        return done.stdout

    def keys(self, prefix: str) -> list[dict[str, Any]]:
        """What etcd has below a prefix: `create_revision`, `mod_revision`, `version` and more. Keys and values are in Base64."""
        keys: list[dict[str, Any]] = json.loads(self.ctl("get", "--prefix", prefix, "--write-out=json")).get("kvs", [])
        return keys

    def names(self, prefix: str) -> list[str]:
        return self.ctl("get", "--prefix", "--keys-only", prefix).split()

    def leases(self) -> list[str]:
        """The ids of all leases of etcd's that there are."""
        return self.ctl("lease", "list").split("\n")[1:-1]


def free_ports(count: int) -> list[int]:
    """Below those that the system gives to who connects: so nobody else has one while its server is dead."""
    with ExitStack() as taken:
        ports: list[int] = []
        for port in random.sample(range(20_000, 32_000), 100):
            if len(ports) == count:
                break
            listener = taken.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        assert len(ports) == count
        return ports


@contextmanager
def frozen(node: Node) -> Iterator[None]:
    node.freeze()
    try:
        yield
    finally:
        node.thaw()
