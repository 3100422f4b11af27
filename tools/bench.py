"""Our savers against the official ones: the same steps on the same server, in one run, taking turns.

A step is what a graph does with its saver: ``aput``, ``aput_writes``, ``aget_tuple``. A figure is the median
of the rounds, with the slowest and the fastest beside it; a ratio above 1 means that ours is faster::

    python tools/bench.py            # a few minutes
    python tools/bench.py --short    # seconds: shows that it runs, not how fast it is
    python tools/bench.py --json bench.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool
from rich.console import Console
from rich.table import Table

import persistence

POOL = 10

Saver = BaseCheckpointSaver[Any]
Opener = Callable[[], AbstractAsyncContextManager[Saver]]


@dataclass(frozen=True)
class Load:
    """How much work one measurement is."""

    workflows: int
    steps: int
    state: int
    """Bytes of each step's state."""


@dataclass
class Series:
    """Steps per second of one contender, round by round."""

    backend: str
    contender: str
    load: Load
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.rates)


@asynccontextmanager
async def official_sqlite(path: Path) -> AsyncIterator[Saver]:
    """The official saver as its documentation opens it."""
    async with AsyncSqliteSaver.from_conn_string(str(path)) as saver:
        await saver.setup()
        yield saver


@asynccontextmanager
async def official_postgres(conninfo: str) -> AsyncIterator[Saver]:
    """The official saver on a pool of the same size as ours."""
    kwargs = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool: AsyncConnectionPool[AsyncConnection[DictRow]] = AsyncConnectionPool(
        conninfo, max_size=POOL, open=False, kwargs=kwargs
    )
    async with pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        yield saver


@asynccontextmanager
async def ours(dsn: str) -> AsyncIterator[Saver]:
    """Our saver as ``aopen`` gives it."""
    settings = persistence.Settings(pool_max=POOL)
    async with persistence.aopen(dsn, settings=settings) as db:
        assert db.checkpointer is not None  # noqa: S101
        yield db.checkpointer


async def workflow(saver: Saver, load: Load) -> None:
    """One conversation: its steps one after the other."""
    config: Any = {"configurable": {"thread_id": uuid.uuid4().hex, "checkpoint_ns": ""}}
    for step in range(load.steps):
        checkpoint = empty_checkpoint()
        checkpoint["id"] = str(uuid6(clock_seq=step))
        checkpoint["channel_values"] = {"messages": ["x" * load.state], "step": step}
        versions: dict[str, str | int | float] = {
            "messages": f"{step + 1:032}.0",
            "step": f"{step + 1:032}.0",
        }
        checkpoint["channel_versions"] = versions
        config = await saver.aput(config, checkpoint, {"source": "loop", "step": step}, versions)
        await saver.aput_writes(config, [("messages", ["y" * 100]), ("step", step)], str(uuid6()))
        found = await saver.aget_tuple(config)
        if found is None or found.checkpoint["channel_values"]["step"] != step:
            raise RuntimeError("the saver lost a checkpoint")


async def measure(opener: Opener, load: Load) -> float:
    """Steps per second."""
    async with opener() as saver:
        await workflow(saver, Load(1, 2, load.state))  # connections and statement caches
        started = time.perf_counter()
        await asyncio.gather(*(workflow(saver, load) for _ in range(load.workflows)))
        return load.workflows * load.steps / (time.perf_counter() - started)


async def compare(contenders: dict[str, dict[str, Opener]], loads: list[Load], rounds: int) -> list[Series]:
    """Let the contenders take turns, so that what disturbs the machine disturbs all of them."""
    series = [
        Series(backend, name, load)
        for backend, rivals in contenders.items()
        for load in loads
        for name in rivals
    ]
    for _ in range(rounds):
        for one in series:
            one.rates.append(await measure(contenders[one.backend][one.contender], one.load))
    return series


@contextmanager
def databases(folder: Path) -> Iterator[tuple[str, str]]:
    """Two empty databases on one Postgres server."""
    with server(folder) as conninfo:
        names = [f"persistence_bench_{uuid.uuid4().hex[:8]}" for _ in range(2)]
        with psycopg.connect(conninfo, autocommit=True) as conn:
            for name in names:
                conn.execute(f'CREATE DATABASE "{name}"')
            try:
                yield make_conninfo(conninfo, dbname=names[0]), make_conninfo(conninfo, dbname=names[1])
            finally:
                for name in names:
                    conn.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """``PERSISTENCE_TEST_POSTGRES``, or a server from the wheel."""
    if configured := os.environ.get("PERSISTENCE_TEST_POSTGRES"):
        yield configured
        return
    from persistence.backends import embedded

    with embedded.serve(folder / "pg") as conninfo:
        yield conninfo


def show(series: list[Series]) -> None:
    """Print the table."""
    table = Table("backend", "workflows", "state", "saver", "steps/s", "min .. max", "ratio")
    for one in series:
        rival = next(
            s for s in series if (s.backend, s.load, s.contender) == (one.backend, one.load, "official")
        )
        table.add_row(
            one.backend,
            str(one.load.workflows),
            f"{one.load.state:,} B",
            one.contender,
            f"{one.median:,.0f}",
            f"{min(one.rates):,.0f} .. {max(one.rates):,.0f}",
            f"{one.median / rival.median:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main() -> int:
    """Run, print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="Our savers against the official ones.")
    parser.add_argument("--short", action="store_true", help="only show that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    options = parser.parse_args()
    loads = (
        [Load(1, 3, 2_000), Load(5, 3, 2_000)]
        if options.short
        else [Load(1, 300, 2_000), Load(100, 10, 2_000)]
    )
    with tempfile.TemporaryDirectory(prefix="persistence-bench-") as name:
        folder = Path(name)
        with databases(folder) as (theirs, mine):
            contenders: dict[str, dict[str, Opener]] = {
                "sqlite": {
                    "official": lambda: official_sqlite(folder / "official.db"),
                    "ours": lambda: ours(f"sqlite:///{folder}/ours.db"),
                },
                "postgres": {"official": lambda: official_postgres(theirs), "ours": lambda: ours(mine)},
            }
            series = asyncio.run(compare(contenders, loads, 1 if options.short else options.rounds))
    show(series)
    if options.json:
        options.json.write_text(
            json.dumps([asdict(one) | {"median": one.median} for one in series], indent=2)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
