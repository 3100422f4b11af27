"""Databases as others leave them: without a constraint, of an old saver, for a role that may not see all."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.store.postgres import PostgresStore
from psycopg import sql

from persistence import schema, transfer
from persistence.errors import SourceError
from persistence.registry import provider_for
from tests.transfer import make
from tests.transfer.test_refusals import config

ODD = (
    "checkpoint = '5'",
    """checkpoint = '{"v": 4, "channel_values": [1]}'""",
    """checkpoint = '{"v": 4, "channel_values": 5}'""",
    """checkpoint = '{"v": 4, "channel_versions": [1]}'""",
    """checkpoint = '{"v": 4, "channel_versions": "x"}'""",
    "checkpoint = NULL",
    "metadata = NULL",
)


def execute(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn) as conn:
        for statement in statements:
            conn.execute(statement.encode())


@pytest.fixture
def source(postgres_dsn: str) -> str:
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.setup()
        for number in range(len(ODD)):
            make.put(saver, f"t{number}", {"c": [number]})
            saver.put_writes(config(f"t{number}"), [("c", [1])], "task")
    return postgres_dsn


def test_rows_that_no_saver_writes(source: str, tmp_path: Path) -> None:
    execute(
        source,
        "ALTER TABLE checkpoints ALTER checkpoint DROP NOT NULL, ALTER metadata DROP NOT NULL",
        "ALTER TABLE checkpoint_writes ALTER blob DROP NOT NULL",
        *(f"UPDATE checkpoints SET {odd} WHERE thread_id = 't{n}'" for n, odd in enumerate(ODD)),
        "UPDATE checkpoint_writes SET blob = NULL WHERE thread_id = 't0'",
    )
    with pytest.raises(transfer.RefusedError) as refused:
        transfer.migrate(source, f"sqlite:///{tmp_path / 'new.db'}")
    assert sum(problem.count for problem in refused.value.problems) == len(ODD) + 1
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("table", ["checkpoints", "checkpoint_writes"])
def test_several_rows_of_one_key(source: str, tmp_path: Path, table: str) -> None:
    execute(
        source,
        f"ALTER TABLE {table} DROP CONSTRAINT {table}_pkey",
        f"INSERT INTO {table} SELECT * FROM {table} WHERE thread_id = 't1'",
    )
    with pytest.raises(transfer.RefusedError, match=r"1 x there are several rows of this key .*'t1'"):
        transfer.migrate(source, f"sqlite:///{tmp_path / 'new.db'}")
    assert not (tmp_path / "new.db").exists()


def test_without_task_path(source: str, tmp_path: Path) -> None:
    execute(source, "ALTER TABLE checkpoint_writes DROP COLUMN task_path")
    target = f"sqlite:///{tmp_path / 'new.db'}"
    assert transfer.migrate(source, target).verified
    assert transfer.verify(source, target).equal


@pytest.fixture
def reader(source: str) -> Iterator[str]:
    """The DSN of a role that may read the three tables and nothing else."""
    role = sql.Identifier(f"r_{uuid.uuid4().hex[:12]}")
    with closing(psycopg.connect(source, autocommit=True)) as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        tables = "checkpoints, checkpoint_blobs, checkpoint_writes"
        conn.execute(sql.SQL(f"GRANT SELECT ON {tables} TO {{}}").format(role))
        yield f"{source}&user={role.as_string(None)[1:-1]}"
        conn.execute(sql.SQL("DROP OWNED BY {}").format(role))
        conn.execute(sql.SQL("DROP ROLE {}").format(role))


def test_a_store_that_may_not_be_read(reader: str, source: str, tmp_path: Path) -> None:
    with PostgresStore.from_conn_string(source) as store:
        store.setup()
    assert transfer.migrate(reader, f"sqlite:///{tmp_path / 'new.db'}").verified
    with pytest.raises(SourceError, match="permission denied"):
        transfer.export(reader, tmp_path / "archive", options=transfer.Options(include=["store"]))


def test_rows_that_a_policy_hides_are_not_left_behind(reader: str, source: str, tmp_path: Path) -> None:
    execute(source, "ALTER TABLE checkpoints ENABLE ROW LEVEL SECURITY")
    with pytest.raises(SourceError, match="row-level security"):
        transfer.migrate(reader, f"sqlite:///{tmp_path / 'new.db'}")
    assert transfer.migrate(source, f"sqlite:///{tmp_path / 'new.db'}").verified  # by their owner


def test_a_transfer_may_take_longer_than_a_database_allows_its_sessions(source: str) -> None:
    """Waiting for the other side, in a transaction or between two: an hour of it, or here a second."""
    provider = provider_for(source)
    schema.setup(provider)
    limits = ["idle_session_timeout", "idle_in_transaction_session_timeout"]
    with psycopg.connect(source) as conn:
        if conn.info.server_version >= 170000:
            limits.append("transaction_timeout")
        for limit in limits:
            conn.execute(f"ALTER DATABASE {conn.info.dbname} SET {limit} = '1s'".encode())
    with provider.sink() as sink, sink.exclusive(), sink.source() as reading:
        time.sleep(1.2)
        assert not sink.ledger().runs()
        assert len(list(reading.threads())) == len(ODD)


def test_a_connection_that_ends_after_all_was_read(source: str) -> None:
    with provider_for(source).source() as opened:
        assert opened.count() == len(ODD)
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        execute(source, f"SELECT pg_terminate_backend(pid, 60000) {others}")
