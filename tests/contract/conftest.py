"""The columns of the parity matrix: every backend in both colours, found through the registry.

The tests stand in ``persistence/testing``, which anybody's backend can run, and name no backend.
Here are our databases, and the tests that need LangGraph's official savers beside ours.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

import persistence
from persistence.settings import Settings
from persistence.testing.fixtures import *
from persistence.testing.marks import CLAUSES, EXAMPLES
from persistence.testing.subject import Target
from tests.support import query_form

BACKENDS = ("memory", "sqlite", "sqlite-memory", "postgres")
DURABLE = ("sqlite", "postgres")


@dataclass
class Ours(Target):
    """A column of the matrix."""

    official: Callable[[], Any] | None = None
    """A context manager with LangGraph's own saver on the same database, where there is one."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Tell the matrix (``tools/parity_matrix.py`` reads the JUnit file) what a test is about."""
    test = getattr(item, "function", None)
    clauses = getattr(test, CLAUSES, None)
    if clauses and call.when == "setup":
        spec = getattr(item, "callspec", None)
        column = [spec.params[name] for name in ("backend", "colour")] if spec else None
        row = {"clauses": clauses, "column": column, "examples": getattr(test, EXAMPLES, 0)}
        item.user_properties.append(("parity", json.dumps(row)))
    return (yield)


@pytest.fixture(scope="session")
def contract_postgres(postgres_server: str) -> Iterator[str]:
    """One database for the whole suite; a test finds its tables empty.

    Where the server can, it sorts text as English does (R2): a < B, which are B < a by their bytes.
    """
    name = f"contract_{uuid.uuid4().hex[:12]}"
    create = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    english = sql.SQL(" TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'")
    with psycopg.connect(postgres_server, autocommit=True) as conn:
        try:
            conn.execute(create + english)
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.SyntaxError):  # no ICU; Postgres 14
            conn.execute(create)
    conninfo = make_conninfo(postgres_server, dbname=name)
    dsn = "postgresql://" + query_form(conninfo)
    persistence.open(dsn, settings=Settings()).close()  # makes the tables
    yield conninfo
    with psycopg.connect(postgres_server, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _postgres(conninfo: str, colour: str) -> Ours:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute("TRUNCATE checkpoints, checkpoint_blobs, checkpoint_writes")

    @contextmanager
    def official() -> Iterator[Any]:
        with psycopg.connect(conninfo, autocommit=True, row_factory=dict_row) as conn:
            yield PostgresSaver(conn)

    def raw() -> bytes:
        with psycopg.connect(conninfo) as conn:
            tables = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")
            rows = [conn.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
        return repr(rows).encode()

    password = conninfo_to_dict(conninfo).get("password") or "open-sesame"  # where the server asks for none
    dsn = "postgresql://" + query_form(make_conninfo(conninfo, password=password))
    return Ours("postgres", colour, dsn, str(password), has_tables=True, raw=raw, official=official)


@pytest.fixture(scope="session")
def contract_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tables made, to be copied."""
    path = tmp_path_factory.mktemp("contract") / "empty.db"
    persistence.open(f"sqlite:///{path}", settings=Settings()).close()
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def _sqlite(path: Path, colour: str) -> Ours:
    @contextmanager
    def official() -> Iterator[Any]:
        with closing(sqlite3.connect(path, check_same_thread=False)) as conn:
            yield SqliteSaver(conn)

    def raw() -> bytes:
        return b"".join(file.read_bytes() for file in path.parent.glob(path.name + "*"))

    return Ours("sqlite", colour, f"sqlite:///{path}", has_tables=True, raw=raw, official=official)


@pytest.fixture
def target(backend: str, colour: str, request: pytest.FixtureRequest, tmp_path: Path) -> Ours:
    """An empty database."""
    if backend == "postgres":
        return _postgres(request.getfixturevalue("contract_postgres"), colour)
    if backend == "sqlite":
        empty = request.getfixturevalue("contract_sqlite")
        return _sqlite(Path(shutil.copy(empty, tmp_path / "contract.db")), colour)
    return Ours(backend, colour, {"memory": "memory://", "sqlite-memory": "sqlite://"}[backend])
