"""The Postgres server of a run, and one database for each contender."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """``PERSISTENCE_TEST_POSTGRES``, or a server from the wheel with its data in ``folder``."""
    if configured := os.environ.get("PERSISTENCE_TEST_POSTGRES"):
        yield configured
        return
    from persistence.backends import embedded

    with embedded.serve(folder / "pg") as conninfo:
        yield conninfo


@dataclass
class Server:
    """A server that takes databases, directly and through the delay."""

    conninfo: str
    far: str | None
    """The same server one millisecond away."""

    def describe(self) -> dict[str, str]:
        """What the figures depend on.

        Raises:
            SystemExit: The server does not wait for its disk, so it would measure something else.
        """
        names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            found = {}
            for name in names:
                row = conn.execute(f"SHOW {name}").fetchone()
                found[name] = str(row[0]) if row else ""
            found["transport"] = "unix socket" if conn.info.host.startswith(("/", "@")) else "tcp"
        if found["fsync"] != "on" or found["synchronous_commit"] == "off":
            raise SystemExit(f"the server is not durable: {found}")
        found["round trip"] = f"{round_trip(self.conninfo):.2f} ms"
        if self.far:
            found["round trip, delayed"] = f"{round_trip(self.far):.2f} ms"
        return found

    @contextmanager
    def database(self) -> Iterator[str]:
        """The name of an empty database, dropped afterwards."""
        name = f"persistence_bench_{uuid.uuid4().hex[:8]}"
        self._execute(f'CREATE DATABASE "{name}"')
        try:
            yield name
        finally:
            self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def near_to(self, database: str) -> str:
        """Conninfo of a database."""
        return make_conninfo(self.conninfo, dbname=database)

    def far_from(self, database: str) -> str:
        """Conninfo of a database, one millisecond away."""
        assert self.far is not None  # noqa: S101 - nobody asks for it without a proxy
        return make_conninfo(self.far, dbname=database)

    def settle(self) -> None:
        """Write out what the one before has left, so that it costs nobody else."""
        self._execute("CHECKPOINT")

    def analyze(self, database: str) -> None:
        """Give the planner the figures that a database in use would have."""
        with psycopg.connect(self.near_to(database), autocommit=True) as conn:
            conn.execute("VACUUM (ANALYZE)")

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            conn.execute(statement)


def round_trip(conninfo: str) -> float:
    """Milliseconds of ``SELECT 1``, the median."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        times = []
        for _ in range(200):
            started = time.perf_counter()
            conn.execute("SELECT 1")
            times.append(time.perf_counter() - started)
    return median(times) * 1000


@contextmanager
def delayed(conninfo: str, milliseconds: float) -> Iterator[str]:
    """The server as seen through the proxy: a question and its answer take ``milliseconds``."""
    with _proxied(conninfo, milliseconds) as trial:
        excess = round_trip(trial) - milliseconds  # what the proxy and the system's timers add
    with _proxied(conninfo, max(0.0, milliseconds - excess)) as far:
        yield far


@contextmanager
def _proxied(conninfo: str, milliseconds: float) -> Iterator[str]:
    """A proxy in a process of its own, so that it does not take turns with the client."""
    given = conninfo_to_dict(conninfo)
    host, port = given.get("hostaddr") or given.get("host") or "localhost", given.get("port") or 5432
    command = [sys.executable, "-m", "tools.benchmarks.proxy", str(host), str(port), str(milliseconds / 2)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    with process:
        try:
            assert process.stdout is not None  # noqa: S101
            listening = process.stdout.readline().strip()
            if not listening:
                raise SystemExit("the delaying proxy did not start")
            rest = {k: v for k, v in given.items() if k not in ("host", "hostaddr", "port")}
            yield make_conninfo("", **rest, host="127.0.0.1", port=listening)
        finally:
            process.terminate()
