"""A Postgres source is followed as a SQLite file is, with all that only its transactions can do."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.types import Command

import persistence
from persistence import transfer
from persistence.errors import ConflictError, SourceError, TransferError
from persistence.registry import provider_for
from tests.support import clean_environment, fresh_database
from tests.transfer import graphs, make
from tests.transfer.conftest import postgres_tuples, rows, sqlite_tuples
from tests.transfer.targets import Target
from tests.transfer.test_follow import FOLLOW, follow_for, plain, stopped, writing


@pytest.fixture(scope="module")
def template(postgres_server: str, filled: Path) -> Iterator[str]:
    """A Postgres database with what graphs wrote; not to be changed."""
    with fresh_database(postgres_server) as dsn:
        transfer.migrate(filled, dsn)
        yield dsn


@pytest.fixture
def source(template: str, postgres_server: str) -> Iterator[str]:
    """A copy of it that a test may change."""
    with fresh_database(postgres_server, template) as dsn:
        yield dsn


@contextmanager
def saving(dsn: str) -> Iterator[PostgresSaver]:
    with PostgresSaver.from_conn_string(dsn) as saver:
        saver.serde = graphs.serde()
        yield saver


def execute(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn) as conn:
        for statement in statements:
            conn.execute(statement.encode())


def seen(source: str, target: str) -> transfer.Round:
    """One round that finds something, or nothing."""
    return transfer.follow(source, target, stop=stopped()).last


def require_equal(source: str, target: str) -> None:
    assert transfer.verify(source, target).differences == []
    tuples = postgres_tuples(target) if "postgresql" in target else sqlite_tuples(Path(target[10:]))
    assert plain(postgres_tuples(source)) == plain(tuples)


@pytest.mark.parametrize("kind", ["official", "ours"])
def test_an_application_goes_on_writing(kind: str, source: str, target: Target) -> None:
    with writing(source, kind) as writer:
        follow_for(source, target.dsn, 3, lambda _: writer.wait_for(5))
        writer.wait_for(5)
        done = transfer.cut_over(source, target.dsn)
    assert done.sealed
    assert done.mended == 0
    require_equal(source, target.dsn)
    there = {t.config["configurable"]["checkpoint_id"] for t in postgres_tuples(source)}
    assert set().union(*writer.acknowledged.values()) <= there
    transfer.undo(done.run_id, target.dsn)
    assert not any(target.rows().values())
