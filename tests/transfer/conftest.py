"""Databases to move, written by the official savers, and ways to compare what they list."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from tests.transfer import graphs

if TYPE_CHECKING:
    from persistence.transfer import Phase, Progress
    from tests.transfer.targets import Target

TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that real graphs wrote; not to be changed."""
    path = tmp_path_factory.mktemp("filled") / "chat.db"
    graphs.fill(path)
    return path


@pytest.fixture
def database(filled: Path, tmp_path: Path) -> Path:
    """A copy of ``filled`` that a test may change."""
    return Path(shutil.copy(filled, tmp_path / "chat.db"))


@pytest.fixture
def written_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written while it is read, so there are many commits and not one."""
    monkeypatch.setattr("persistence.transfer.ahead.LIMIT", -1)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch, written_afterwards: None) -> Progress:
    """Interrupts a transfer of small batches once it has committed some of them."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 20)

    def interrupt(phase: Phase, done: int, total: int, unit_bytes: int) -> None:
        if phase == "write" and done > 60:
            raise KeyboardInterrupt

    return interrupt


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No setting of whoever runs the tests takes part."""
    from persistence.settings import get_settings

    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    get_settings.cache_clear()
    names = ("persistence", "persistence.settings", "psycopg", "stamina")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    get_settings.cache_clear()
    for name, level in levels.items():  # which a command that runs in this process sets
        logging.getLogger(name).setLevel(level)


def sqlite_tuples(path: Path) -> list[CheckpointTuple]:
    """What the official SQLite saver lists."""
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.serde = graphs.serde()
        return list(saver.list(None))


def postgres_tuples(dsn: str, thread: str | None = None) -> list[CheckpointTuple]:
    """What the official Postgres saver lists."""
    with PostgresSaver.from_conn_string(dsn) as saver:
        saver.serde = graphs.serde()
        return list(saver.list(None if thread is None else graphs.config(thread)))


def rows(dsn: str, schema: str = "public") -> dict[str, list[Any]]:
    """Every row of LangGraph's tables in Postgres."""
    with psycopg.connect(dsn) as conn:
        return {
            table: conn.execute(
                f'SELECT t.* FROM "{schema}".{table} t ORDER BY t::text COLLATE "C"'.encode()
            ).fetchall()
            for table in TABLES
        }


def file_rows(path: Path) -> dict[str, list[Any]]:
    """Every row of LangGraph's tables in a SQLite file."""
    with closing(sqlite3.connect(path)) as conn:
        return {
            table: conn.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3, 4, 5").fetchall()
            for table in ("checkpoints", "writes")
        }


def by_thread(tuples: list[CheckpointTuple]) -> dict[str, list[CheckpointTuple]]:
    """What a saver listed, for each thread."""
    threads = defaultdict(list)
    for item in tuples:
        threads[item.config["configurable"]["thread_id"]].append(item)
    return threads


def without_carried_snapshots(item: CheckpointTuple) -> CheckpointTuple:
    """The tuple without a DeltaChannel snapshot.

    The official Postgres saver shows a snapshot in every later checkpoint at the same version, the SQLite one
    only in the checkpoint that took it. The history is what both must agree on.
    """
    values = {k: v for k, v in item.checkpoint["channel_values"].items() if k != "lines"}
    return item._replace(checkpoint={**item.checkpoint, "channel_values": values})


@pytest.fixture(params=["postgres", "sqlite"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """An empty database of each kind."""
    from tests.transfer.targets import Target

    if request.param == "sqlite":
        (tmp_path / "target").mkdir()
        return Target(f"sqlite:///{tmp_path / 'target' / 'new.db'}")
    return Target(request.getfixturevalue("postgres_dsn"))
