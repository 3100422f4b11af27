"""Fixtures that every test folder shares: a real Postgres server and fresh databases on it."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support import query_form


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Conninfo of a Postgres superuser: ``PERSISTENCE_TEST_POSTGRES``, or a server of this session's own."""
    if configured := os.environ.get("PERSISTENCE_TEST_POSTGRES"):
        yield configured
        return
    from persistence.backends import embedded

    with (
        tempfile.TemporaryDirectory(prefix="persistence-tests-") as folder,
        embedded.serve(Path(folder) / "pg") as conninfo,
    ):
        yield conninfo


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter. Each process of pytest closes pytest's own to others again."""
    with tempfile.TemporaryDirectory(prefix="persistence-tests-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        folder.chmod(0o777)


@pytest.fixture
def postgres_dsn(postgres_server: str) -> Iterator[str]:
    """DSN of an empty database of its own, dropped afterwards."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_server, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield "postgresql://" + query_form(make_conninfo(postgres_server, dbname=name))
    with psycopg.connect(postgres_server, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
