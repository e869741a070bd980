"""The pages in docs/how-to: their programs are run as they stand there, with the frameworks they are about.

Each ``python`` block of a page begins with a comment that names its file. Where a program has to be in the midst of its
work, the file that it reads is a FIFO, so that it goes on when the test says so.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx

import lease
from conftest import LIMIT, ROOT, in_thread, waits

BLOCK = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str, directory: Path) -> None:
    """Writes the files of a page."""
    text = (ROOT / "docs" / "how-to" / name).read_text()
    blocks = BLOCK.findall(text)
    assert blocks and len(blocks) == text.count("```python"), f"{name}: a block does not say which file it is"
    for file, code in blocks:
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    (directory / "leases").mkdir()


class Program:
    """A program that runs, and whose lines are read as they come. It is ended with the block."""

    def __init__(self, directory: Path, *arguments: object) -> None:
        self._command = [sys.executable, *map(str, arguments)]
        self._process = subprocess.Popen(
            self._command,
            cwd=directory,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its children can be killed with it
        )
        self.pid = self._process.pid
        self.said: list[str] = []
        self._asked: set[int] = set()
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._news:
                    self.said.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _all(self) -> str:
        return "\n".join(self.said)

    def says(self, pattern: str) -> re.Match[str]:
        """Waits for a line like this, another one than those it gave before, and gives what was found in it."""

        def find() -> re.Match[str] | None:
            for number, line in enumerate(self.said):
                if number not in self._asked and (found := re.search(pattern, line)):
                    self._asked.add(number)
                    return found
            return None

        with self._news:
            found = self._news.wait_for(lambda: find() or self._ended, LIMIT)
        assert isinstance(found, re.Match), f"{self._command} did not say {pattern!r}:\n{self._all()}"
        return found

    def ends(self) -> tuple[int, str]:
        """Its status and all that it said, once it has ended."""
        with self._news:
            assert self._news.wait_for(lambda: self._ended, LIMIT), f"{self._command} did not end:\n{self._all()}"
        return self._process.wait(LIMIT), self._all()

    def terminate(self) -> None:
        self._process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process.poll() is None:
            if kind is None:
                self._process.terminate()
            else:
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(LIMIT)
        self._reader.join(LIMIT)


def run(directory: Path, *arguments: object, status: int = 0) -> str:
    """Runs a program to its end."""
    with Program(directory, *arguments) as program:
        ended, said = program.ends()
    assert ended == status, f"status {ended}\n{said}"
    return said


class Gate:
    """A file that has nothing to read yet: whoever opens it waits until it is fed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing: int | None = None
        os.mkfifo(path)

    def wait_for_reader(self) -> None:
        """Returns once somebody has opened it; again, when it was somebody who has ended, once another one has."""
        pause = threading.Event()
        for _ in range(int(LIMIT / 0.01)):
            try:
                writing = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                assert error.errno == errno.ENXIO, error
                pause.wait(0.01)
                continue
            if self._writing is not None:
                os.close(self._writing)
            self._writing = writing
            return
        raise AssertionError(f"nobody reads {self._path.name}")

    def feed(self, text: str) -> None:
        """Lets the reader go on, and leaves a plain file for whoever comes next."""
        assert self._writing is not None
        self._path.unlink()
        self._path.write_text(text)
        with open(self._writing, "w") as fifo:
            fifo.write(text)
        self._writing = None


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as db:
        return db.execute(query).fetchall()


SALES = "day,amount\n2026-01-31,40\n2026-01-30,7\n2026-01-31,2\n"


def test_celery_tasks_run_once(tmp_path: Path) -> None:
    page("run-once.md", tmp_path)
    for folder in ("queue", "control", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "celeryconfig.py").write_text(
        "broker_url = 'filesystem://'\n"
        "folders = {'data_folder_in': 'queue', 'data_folder_out': 'queue', 'control_folder': 'control'}\n"
        "broker_transport_options = {**folders, 'polling_interval': 0.05}\n"
        f"result_backend = 'file://{tmp_path}/results'\n"
    )
    call = f"from tasks import nightly; print('result:', nightly.delay('2026-01-31').get(timeout={LIMIT}))"
    gate = Gate(tmp_path / "sales.csv")
    serve = ("-m", "celery", "-A", "tasks", "worker", "--loglevel", "info", "--concurrency", "2")
    with Program(tmp_path, *serve) as worker:
        worker.says(r"celery@.* ready")
        with Program(tmp_path, "-c", call) as first:
            gate.wait_for_reader()
            assert "result: None" in run(tmp_path, "-c", call), "a call beside it is skipped"
            gate.feed(SALES)
            first.says("^result: written$")
        assert "result: done before" in run(tmp_path, "-c", call)
        worker.terminate()
        assert worker.ends()[0] == 0
    assert rows(tmp_path / "shop.db", "SELECT day, total, fence FROM report") == [("2026-01-31", 42, 1)]


def test_schedulers_run_a_job_once(tmp_path: Path) -> None:
    page("run-once.md", tmp_path)
    schedule = tmp_path / "schedule.py"
    nightly, every_second = '"cron", hour=2', '"cron", second="*"'
    assert schedule.read_text().count(nightly) == 1
    schedule.write_text(schedule.read_text().replace(nightly, every_second))
    gate = Gate(tmp_path / "sales.csv")
    with Program(tmp_path, "schedule.py") as one, Program(tmp_path, "schedule.py") as other:
        gate.wait_for_reader()
        with lease.Manager(f"sqlite:{tmp_path}/leases/jobs.db") as operator:
            (record,) = operator.list("report:")
        runs, skips = (one, other) if record.owner.endswith(f":{one.pid}") else (other, one)
        skips.says("^skipped$")
        gate.feed(SALES)
        runs.says("^written$")
        for program in (runs, skips):
            program.says("^done before$")
    assert [line for line in skips.said if line == "written"] == []
    assert rows(tmp_path / "shop.db", "SELECT fence FROM report") == [(record.token,)]


def test_a_newer_run_is_not_written_over(tmp_path: Path) -> None:
    """The fence of that page: a run that is done when a newer one has written."""
    page("run-once.md", tmp_path)
    gate = Gate(tmp_path / "sales.csv")
    with Program(tmp_path, "-c", "import jobs; jobs.report('2026-01-31')") as late:
        gate.wait_for_reader()
        with closing(sqlite3.connect(tmp_path / "shop.db")) as db, db:
            db.execute("INSERT INTO report VALUES ('2026-01-31', 5, 2)")
        gate.feed(SALES)
        status, said = late.ends()
    assert status == 1 and "RuntimeError: a newer run has written" in said
    assert rows(tmp_path / "shop.db", "SELECT total, fence FROM report") == [(5, 2)]


def test_a_django_command_refuses_to_run_beside_itself(tmp_path: Path) -> None:
    page("django-command.md", tmp_path)
    for package in ("project", "shop", "shop/management", "shop/management/commands"):
        (tmp_path / package / "__init__.py").touch()
    run(tmp_path, "manage.py", "makemigrations", "shop")
    run(tmp_path, "manage.py", "migrate")
    command = ("manage.py", "import_prices", "prices.csv")
    database = tmp_path / "db.sqlite3"
    gate = Gate(tmp_path / "prices.csv")
    with Program(tmp_path, *command) as first, lease.Manager(f"sqlite:{tmp_path}/leases/shop.db") as operator:
        gate.wait_for_reader()
        said = run(tmp_path, *command, status=75)
        assert re.fullmatch(rf"CommandError: running already: \S+:{first.pid}", said), said
        with Program(tmp_path, *command, "--wait", LIMIT) as second:
            waits(operator, "import_prices")
            first.terminate()
            assert first.ends() == (143, "")
            gate.wait_for_reader()
            gate.feed("sku,amount\nbolt,5\nnut,3\n")
            status, said = second.ends()
            found = re.fullmatch(r"2 prices under fence (\d+)", said)
            assert status == 0 and found, said
    prices = [("bolt", 5), ("nut", 3)]
    assert rows(database, "SELECT sku, amount FROM shop_price ORDER BY sku") == prices
    assert rows(database, "SELECT name, token FROM shop_fence") == [("import_prices", int(found[1]))]

    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE shop_fence SET token = 1000")
    (tmp_path / "prices.csv").write_text("sku,amount\nbolt,1\n")
    assert "a newer run has written" in run(tmp_path, *command, status=1)
    assert rows(database, "SELECT sku, amount FROM shop_price ORDER BY sku") == prices


@contextmanager
def client(socket: Path) -> Iterator[httpx.Client]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://test", timeout=LIMIT) as client:
        yield client


def test_one_fastapi_process_leads_and_one_rebuilds(tmp_path: Path) -> None:
    page("fastapi-lifespan.md", tmp_path)
    gate = Gate(tmp_path / "products.txt")
    (tmp_path / "customers.txt").write_text("one two")
    serve = ("-m", "uvicorn", "app:app", "--uds")
    with (
        Program(tmp_path, *serve, "one") as one,
        client(tmp_path / "one") as of_one,
        lease.Manager(f"sqlite:{tmp_path}/leases/app.db") as operator,
    ):
        first = int(one.says(r"leading under fence (\d+)")[1])
        one.says("Uvicorn running")
        with Program(tmp_path, *serve, "other") as other, client(tmp_path / "other") as of_other:
            other.says("Uvicorn running")

            rebuilds = in_thread(lambda: of_one.post("/rebuild/products"))
            gate.wait_for_reader()
            refused = of_other.post("/rebuild/products")
            assert (refused.status_code, refused.json()) == (409, {"detail": "products is being rebuilt"})
            assert of_other.post("/rebuild/customers").json()["words"] == 2
            gate.feed("one two three")
            rebuilt, again = rebuilds().json(), of_other.post("/rebuild/products").json()
            assert rebuilt["words"] == again["words"] == 3 and rebuilt["fence"] < again["fence"]

            waits(operator, "leader")
            operator.break_lease("leader", first)
            one.says("leading no more: ")
            second = int(other.says(r"leading under fence (\d+)")[1])
            waits(operator, "leader")
            other.terminate()
            third = int(one.says(r"leading under fence (\d+)")[1])
            assert first < second < third
        one.terminate()
        one.ends()
        assert operator.list() == []
    assert rows(tmp_path / "shop.db", "SELECT pid, fence FROM leader") == [(one.pid, third)]


def test_gunicorn_workers_share_a_manager_of_the_master(tmp_path: Path) -> None:
    page("prefork.md", tmp_path)
    gate = Gate(tmp_path / "products.txt")
    serve = ("-m", "gunicorn", "--preload", "--workers", "2", "--bind", "unix:socket", "web:app")
    with Program(tmp_path, *serve) as master, client(tmp_path / "socket") as one, client(tmp_path / "socket") as other:
        assert master.says(r"prepared in (\d+) under fence 1")[1] == str(master.pid)
        workers = {master.says(r"Booting worker with pid: (\d+)")[1] for _ in range(2)}
        rebuilds = in_thread(lambda: one.get("/"))
        gate.wait_for_reader()
        refused = other.get("/")
        assert (refused.status_code, refused.text) == (409, "another worker rebuilds\n")
        gate.feed("one two three")
        rebuilt = rebuilds()
        found = re.fullmatch(r"3 words, in (\d+) under fence (\d+)\n", rebuilt.text)
        assert rebuilt.status_code == 200 and found and found[1] in workers, rebuilt.text
        again = re.fullmatch(r"3 words, in \d+ under fence (\d+)\n", other.get("/").text)
        assert again and int(found[2]) < int(again[1])
        master.terminate()
        status, said = master.ends()
    assert status == 0 and said.count("prepared in") == 1, said


def test_children_of_multiprocessing_use_a_manager_of_the_parent(tmp_path: Path) -> None:
    page("prefork.md", tmp_path)
    lines = run(tmp_path, "pools.py").splitlines()
    tokens = [1]
    for method in ("fork", "spawn", "forkserver"):
        did = [re.fullmatch(r"(\d+) did the job under fence (\d+)", lines.pop(0)) for _ in range(2)]
        assert lines.pop(0) == f"{method} [0, 0]"
        assert did[0] and did[1] and did[0][1] != did[1][1]
        tokens += [int(found[2]) for found in did if found]
    assert tokens == sorted(set(tokens))
    assert lines.pop(0) == "held in the child: False FORKED"
    assert re.match('Forked: check "parent\'s": .*parent of this forked process', lines.pop(0))
    assert re.match("memory in the child: <Lease 'job' token=1 held", lines.pop(0))
    assert lines == []


def test_greenlets_go_on_while_the_pool_waits(tmp_path: Path) -> None:
    page("other-runtimes.md", tmp_path)
    lines = run(tmp_path, "jobs.py").splitlines()
    jobs = [re.fullmatch(r"job (\d) under fence (\d+)", line) for line in lines if line.startswith("job")]
    assert sorted(found[1] for found in jobs if found) == ["0", "1", "2"] and lines[-1] == "ended: RELEASED"
    assert len({found[2] for found in jobs if found}) == 3


def test_the_tests_of_the_page_pass_and_can_fail(tmp_path: Path) -> None:
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.")
    good, bad = tmp_path / "good", tmp_path / "bad"
    page("testing.md", good)
    page("testing.md", bad)
    assert re.search(r"^3 passed in", run(good, *tests), re.MULTILINE)
    exports = bad / "exports.py"
    assert exports.read_text().count("held.check()") == 1
    exports.write_text(exports.read_text().replace("held.check()", "pass"))
    said = run(bad, *tests, status=1)
    assert "FAILED test_exports.py::test_it_stops_when_the_lease_is_lost" in said and "1 failed, 2 passed" in said
