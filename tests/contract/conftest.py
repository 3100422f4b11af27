"""The columns of the parity matrix: every backend in both colours, found through the registry.

No test names a backend. One that needs what only some have asks for it: ``durable`` is a target
that keeps what was acknowledged, can be read from outside, and has an official saver.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

import persistence
from persistence.settings import Settings
from tests.conftest import _query_form
from tests.contract.subject import LoopThread, Subject, Target

BACKENDS = ("memory", "sqlite", "sqlite-memory", "postgres")
COLOURS = ("sync", "async")
DURABLE = ("sqlite", "postgres")
COLUMNS = [(backend, colour) for backend in BACKENDS for colour in COLOURS]

settings.register_profile(
    "contract",
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("contract")


def pytest_configure(config: pytest.Config) -> None:
    # The pool's own threads draw their jitter from `random` while Hypothesis watches it.
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module inside strategies")
    config.addinivalue_line("markers", "clause(*ids): the clauses of docs/contract.md that the test proves")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test in every column; one that asks for ``durable`` where something is left to look at."""
    if "column" in metafunc.fixturenames:
        durable = "durable" in metafunc.fixturenames
        asynchronous = "asynchronous" in metafunc.fixturenames
        columns = [
            column
            for column in COLUMNS
            if (not durable or column[0] in DURABLE) and (not asynchronous or column[1] == "async")
        ]
        metafunc.parametrize("column", columns, ids=["-".join(column) for column in columns])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell the matrix (``tools/parity_matrix.py`` reads the JUnit file) what a test is about."""
    for item in items:
        if "tests/contract/" not in item.path.as_posix():
            continue
        clauses = [clause for mark in item.iter_markers("clause") for clause in mark.args]
        column = getattr(item, "callspec", None)
        backend, colour = column.params.get("column", ("", "")) if column else ("", "")
        row = {"clauses": clauses, "backend": backend, "colour": colour}
        item.user_properties.append(("parity", json.dumps(row)))


@pytest.fixture(scope="session")
def contract_postgres(postgres_server: str) -> Iterator[str]:
    """One database for the whole suite; a test finds its tables empty."""
    name = f"contract_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_server, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    conninfo = make_conninfo(postgres_server, dbname=name)
    dsn = "postgresql://" + _query_form(conninfo)
    persistence.open(dsn, settings=Settings()).close()  # makes the tables
    yield conninfo
    with psycopg.connect(postgres_server, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


def _postgres(conninfo: str, colour: str) -> Target:
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
    dsn = "postgresql://" + _query_form(make_conninfo(conninfo, password=password))
    return Target("postgres", colour, dsn, str(password), official, raw)


@pytest.fixture(scope="session")
def contract_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tables made, to be copied."""
    path = tmp_path_factory.mktemp("contract") / "empty.db"
    persistence.open(f"sqlite:///{path}", settings=Settings()).close()
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def _sqlite(path: Path, colour: str) -> Target:
    @contextmanager
    def official() -> Iterator[Any]:
        with closing(sqlite3.connect(path, check_same_thread=False)) as conn:
            yield SqliteSaver(conn)

    def raw() -> bytes:
        return b"".join(file.read_bytes() for file in path.parent.glob(path.name + "*"))

    return Target("sqlite", colour, f"sqlite:///{path}", None, official, raw)


@pytest.fixture
def target(column: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """An empty database."""
    backend, colour = column
    if backend == "postgres":
        return _postgres(request.getfixturevalue("contract_postgres"), colour)
    if backend == "sqlite":
        empty = request.getfixturevalue("contract_sqlite")
        return _sqlite(Path(shutil.copy(empty, tmp_path / "contract.db")), colour)
    return Target(backend, colour, {"memory": "memory://", "sqlite-memory": "sqlite://"}[backend])


Opener = Callable[..., Subject]


@pytest.fixture
def opened(target: Target, loop_thread: LoopThread) -> Iterator[Opener]:
    """Opens the database, with settings; all is closed after the test."""
    with ExitStack() as stack:

        def open_(**kwargs: Any) -> Subject:
            has_tables = target.official is not None
            subject = Subject(target, Settings(setup_on_open=not has_tables, **kwargs), loop_thread)
            stack.callback(subject.close)
            return subject

        yield open_


@pytest.fixture
def saver(opened: Opener) -> Subject:
    """The saver under test, on an empty database."""
    return opened()


@pytest.fixture
def asynchronous(saver: Subject) -> Subject:
    """A saver for what drives savers by their asynchronous methods only."""
    return saver


@pytest.fixture
def durable(target: Target) -> Target:
    """The target of ``saver``, which keeps what was acknowledged and can be looked at from outside."""
    return target
