"""Who moves a SQLite file into an empty Postgres database, each by its own means, and how it is checked.

Tables are made before the clock starts, but for ours, whose ``migrate`` makes them. What arrived is compared
by content each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from psycopg.conninfo import conninfo_to_dict

from persistence import transfer
from persistence.registry import provider_for
from persistence.transfer.digest import line
from persistence.transfer.records import Checkpoint, Write
from tools.benchmarks import threads
from tools.benchmarks.clients import WrongStateError
from tools.benchmarks.contenders import BARE, OFFICIAL, OFFICIAL_KWARGS, OURS
from tools.benchmarks.measure import Sample
from tools.benchmarks.server import ROOT, Server

TWO, PGLOADER = "ours, 2 workers", "pgloader"
_COLUMNS = {
    "checkpoint_blobs": "thread_id, checkpoint_ns, channel, version, type, blob",
    "checkpoint_writes": (
        "thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob"
    ),
    "checkpoints": "thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata",
}


@dataclass(frozen=True)
class Route:
    """From where to where: a file, and an empty database by its near and by its measured address."""

    source: Path
    near: str
    target: str
    rows: Mapping[str, Path]
    """The finished rows, as binary COPY wants them."""


def contenders() -> list[str]:
    """Who can take part here."""
    return [OURS, OFFICIAL, BARE, TWO, *([PGLOADER] if shutil.which("pgloader") else [])]


class Depot:
    """The sources of a run and their finished rows, each made when it is first needed."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder = folder
        self._server = server
        self._rows: dict[Path, dict[str, Path]] = {}

    def move(self, contender: str, shape: str, *, far: bool) -> Sample:
        """Have somebody move a source into a new database, timed, and compare what arrived."""
        source = self._source(shape, 0)
        if source not in self._rows:
            with self._server.database() as name:
                self._rows[source] = _finished_rows(source, self._server.near_to(name), self._folder)
        with self._server.database() as name:
            near = self._server.near_to(name)
            target = self._server.far_from(name) if far else near
            self._server.settle()
            return _RUN[contender](Route(source, near, target, self._rows[source]))

    def peak(self, shape: str, size: int) -> Sample:
        """Move a source in a process of its own, and see how large that gets."""
        source = self._source(shape, size)
        with self._server.database() as name:
            done = subprocess.run(  # noqa: S603 - our own
                [sys.executable, "-m", "tools.benchmarks.footprint", source, self._server.near_to(name)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return Sample(json.loads(done.stdout.splitlines()[-1]))

    def _source(self, shape: str, size: int) -> Path:
        path = self._folder / f"{shape.replace(' ', '-')}-{size}.db"
        if not path.exists():
            threads.fill(path, threads.SHAPES[shape], size)
        return path


def _finished_rows(source: Path, near: str, folder: Path) -> dict[str, Path]:
    """Move the source into a database, and take its rows out as binary COPY gives them."""
    transfer.migrate(source, near, verify=False)
    files = {table: folder / f"{source.stem}.{table}" for table in _COLUMNS}
    with psycopg.connect(near) as conn:
        for table, columns in _COLUMNS.items():
            order = columns.split(", blob")[0].split(", type")[0].split(", parent")[0]
            query = f"COPY (SELECT {columns} FROM {table} ORDER BY {order}) TO STDOUT (FORMAT BINARY)"
            with files[table].open("wb") as file, conn.cursor().copy(query.encode()) as copy:
                for block in copy:
                    file.write(block)
    return files


def _ours(workers: int) -> Callable[[Route], Sample]:
    options = transfer.Options(workers=workers)

    def move(route: Route) -> Sample:
        with _timed() as whole:
            transfer.migrate(route.source, route.target, options=options, verify=False)
        with _timed() as verify:
            verdict = transfer.verify(route.source, route.target, workers=workers)
        verdict.require()
        return Sample({"whole s": whole[0], "verify s": verify[0]})

    return move


def _official(route: Route) -> Sample:
    """Replay through the savers' public methods: ``list``, then ``put`` and ``put_writes``, oldest first."""
    with closing(sqlite3.connect(route.source)) as conn:
        threads = [row[0] for row in conn.execute("SELECT DISTINCT thread_id FROM checkpoints ORDER BY 1")]
    with (
        SqliteSaver.from_conn_string(str(route.source)) as source,
        psycopg.Connection.connect(route.target, **OFFICIAL_KWARGS) as conn,
    ):
        target = PostgresSaver(conn)
        target.setup()
        with _timed() as whole:
            for thread in threads:
                _replay(thread, source, target)
    _require_equal(route)
    return _written(whole[0])


def _replay(thread: str, source: SqliteSaver, target: PostgresSaver) -> None:
    config: Any = {"configurable": {"thread_id": thread}}
    stored: set[tuple[str, str, Any]] = set()
    for item in reversed(list(source.list(config))):
        place = item.config["configurable"]
        before: Any = item.parent_config or {
            "configurable": {"thread_id": thread, "checkpoint_ns": place["checkpoint_ns"]}
        }
        # A saver is told what is new since the checkpoints before: only these values are stored.
        versions = item.checkpoint["channel_versions"]
        new = {c: v for c, v in versions.items() if (place["checkpoint_ns"], c, v) not in stored}
        stored.update((place["checkpoint_ns"], c, v) for c, v in new.items())
        target.put(before, item.checkpoint, item.metadata, new)
        tasks: dict[str, list[tuple[str, Any]]] = defaultdict(list)
        for task, channel, value in item.pending_writes or ():
            tasks[task].append((channel, value))
        for task, writes in tasks.items():
            target.put_writes(item.config, writes, task)


def _bare(route: Route) -> Sample:
    """The finished rows by binary COPY over one connection: the limit."""
    _setup(route)
    with psycopg.connect(route.target) as conn, _timed() as whole:
        for table, columns in _COLUMNS.items():
            statement = f"COPY {table} ({columns}) FROM STDIN (FORMAT BINARY)"
            with route.rows[table].open("rb") as file, conn.cursor().copy(statement.encode()) as copy:
                while block := file.read(1 << 20):
                    copy.write(block)
        conn.commit()
    _require_equal(route)
    return _written(whole[0])


def _pgloader(route: Route) -> Sample:
    """The same file's tables as they are, which no saver for Postgres could read."""
    given = conninfo_to_dict(route.target)
    host = str(given.get("host") or "localhost")
    address = f"unix:{host}" if host.startswith("/") else host
    user = given.get("user") or os.environ.get("USER", "postgres")
    url = f"postgresql://{user}@{address}:{given.get('port') or 5432}/{given['dbname']}"
    command = ["pgloader", "--quiet", f"sqlite://{route.source}", url]
    env = {**os.environ, **({"PGPASSWORD": str(given["password"])} if given.get("password") else {})}
    with _timed() as whole:
        done = subprocess.run(command, capture_output=True, text=True, env=env)  # noqa: S603 - found before
    if done.returncode:
        raise RuntimeError(f"pgloader ended with {done.returncode}: {done.stderr or done.stdout}")
    with closing(sqlite3.connect(route.source)) as conn, psycopg.connect(route.near) as copied:
        for table in ("checkpoints", "writes"):
            query = f"SELECT count(*) FROM {table}"
            if conn.execute(query).fetchone() != copied.execute(query.encode()).fetchone():
                raise WrongStateError(f"pgloader has not moved all of {table}")
    return _written(whole[0])


def _setup(route: Route) -> None:
    with psycopg.Connection.connect(route.near, **OFFICIAL_KWARGS) as conn:
        PostgresSaver(conn).setup()


def _written(seconds: float) -> Sample:
    """Somebody who only writes."""
    return Sample({"whole s": seconds})


def _require_equal(route: Route) -> None:
    """Compare all but the writes' task paths, which ``list`` does not give."""
    if _content(str(route.near)) != _content(f"sqlite:///{route.source}"):
        raise WrongStateError("what arrived is not what was sent")


def _content(side: str) -> str:
    digest = hashlib.sha256()
    with provider_for(side).source() as opened:
        for record in opened.records(data=False):
            if isinstance(record, Write):
                record = record._replace(task_path="")
            if isinstance(record, Checkpoint | Write):
                digest.update(record.thread_id.encode() + line(record))
    return digest.hexdigest()


@contextmanager
def _timed() -> Iterator[list[float]]:
    """Seconds of the block, in a list once it has ended."""
    seconds: list[float] = []
    started = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - started)


_RUN: dict[str, Callable[[Route], Sample]] = {
    OURS: _ours(1),
    TWO: _ours(2),
    OFFICIAL: _official,
    BARE: _bare,
    PGLOADER: _pgloader,
}
