"""Databases on a real Citus cluster, with the tables distributed as ``docs/citus.md`` says.

``PERSISTENCE_TEST_CITUS`` names a coordinator: a superuser's conninfo or URL, of a database in which it
and its workers are known. Each database of the tests is made on all of its nodes, and dropped there.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import persistence
from persistence.settings import Settings
from tests.docs.pages import DOCS, blocks
from tests.support import query_form

TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")
_NODES = (
    "SELECT nodename, nodeport FROM pg_dist_node WHERE isactive AND noderole = 'primary' ORDER BY groupid"
)
# Sorts text as English does, as the database of tests/contract.
_CREATE = sql.SQL("CREATE DATABASE {} TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'")


@contextmanager
def distributed_database(coordinator: str) -> Iterator[str]:
    """Conninfo of a database with empty tables that are spread over all workers."""
    with psycopg.connect(coordinator) as conn:
        first, *workers = conn.execute(_NODES).fetchall()
    name = f"citus_{uuid.uuid4().hex[:12]}"
    servers = [coordinator, *(make_conninfo(coordinator, host=host, port=port) for host, port in workers)]
    try:
        for server in servers:
            with psycopg.connect(server, autocommit=True) as conn:
                conn.execute(_CREATE.format(sql.Identifier(name)))
            with psycopg.connect(server, dbname=name, autocommit=True) as conn:
                conn.execute("CREATE EXTENSION citus")
        conninfo = make_conninfo(coordinator, dbname=name)
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute("SELECT citus_set_coordinator_host(%s, %s)", first)
            for worker in workers:
                conn.execute("SELECT citus_add_node(%s, %s)", worker)
        dsn = "postgresql://" + query_form(conninfo)
        persistence.open(dsn, settings=Settings()).close()  # makes the tables
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute(distribution().encode())
        yield conninfo
    finally:
        for server in servers:
            with psycopg.connect(server, autocommit=True) as conn:
                conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Conninfo of one database for the whole run; a test finds its tables empty."""
    coordinator = os.environ.get("PERSISTENCE_TEST_CITUS")
    assert coordinator, "no Citus: name a coordinator in PERSISTENCE_TEST_CITUS"
    with distributed_database(coordinator) as conninfo:
        yield conninfo


def distribution() -> str:
    """What the page has its reader run."""
    (block,) = (block for block in blocks(DOCS / "citus.md") if block.language == "sql")
    return block.text
