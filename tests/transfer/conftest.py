"""Databases to move, written by the official savers, and ways to compare what they list."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from tests.transfer import graphs

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


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No setting of whoever runs the tests takes part."""
    from persistence.settings import get_settings

    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


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
