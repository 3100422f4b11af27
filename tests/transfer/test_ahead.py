"""What is written while the source is read is what is written after it; until then nobody sees any of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

import persistence
from persistence import schema, transfer
from persistence.errors import ConflictError, SchemaError, TransferError
from persistence.registry import provider_for
from persistence.transfer import Options, ahead, recording
from persistence.transfer.preflight import RefusedError
from tests.transfer import make
from tests.transfer.conftest import rows
from tests.transfer.test_recording import fill, outcome, readings

__all__ = ["readings"]

TABLES = (
    "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With threads in the middle that are not written as they come."""
    return fill(tmp_path_factory.mktemp("ahead") / "chat.db", threads=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches, segments and parts."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    monkeypatch.setattr(recording, "PART_BYTES", 1_000)


def after_reading(source: Path, dsn: str, name: str) -> tuple[Any, ...]:
    """What is to come out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "LIMIT", -1)
        assert transfer.migrate(source, f"{dsn}&schema={name}", options=Options(workers=1)).verified
    return outcome(dsn, name)


def tables(dsn: str) -> list[Any]:
    with psycopg.connect(dsn) as conn:
        return conn.execute(TABLES).fetchall()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("made", [False, True])
def test_the_same_comes_out(
    source: Path, postgres_dsn: str, readings: list[list[str] | None], workers: int, made: bool
) -> None:
    """With tables and without, by one process and by two; and it is known as done afterwards."""
    target = f"{postgres_dsn}&schema=early"
    if made:
        schema.setup(provider_for(target))
    report = transfer.migrate(source, target, options=Options(workers=workers), verify=False)
    if workers == 1:
        assert readings == [None, ["in place"]]
    assert (report.batches_written > 5, report.batches_skipped) == (True, 0)
    assert outcome(postgres_dsn, "early") == after_reading(source, postgres_dsn, "late")
    assert transfer.verify(source, target).equal
    assert transfer.migrate(source, target).already_done
    transfer.undo("last", target)
    assert not any(rows(postgres_dsn, "early").values())


def test_one_transaction(source: Path, postgres_dsn: str) -> None:
    """But for the segments of what is not written as it comes."""
    transfer.migrate(source, postgres_dsn, options=Options(workers=1))
    with psycopg.connect(postgres_dsn) as conn:
        times = conn.execute(
            "SELECT array_agg(thread_id ORDER BY batch_no) FROM persistence_transfer_batches"
            " GROUP BY committed_at ORDER BY count(*) DESC"
        ).fetchall()
    early, *later = [set(threads) for (threads,) in times]
    assert {"chat 0 é", "chat 1 é", "long", "no version"} <= early
    assert set().union(*later) == {"in place", "log"}


def test_the_tables_are_those_of_setup(source: Path, postgres_dsn: str) -> None:
    described = []
    for name, limit in (("early", 1_000_000_000), ("late", -1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ahead, "LIMIT", limit)
            transfer.migrate(source, f"{postgres_dsn}&schema={name}")
        assert schema.check(provider_for(f"{postgres_dsn}&schema={name}")) == []
        with psycopg.connect(postgres_dsn) as conn:
            columns = conn.execute(
                "SELECT c.relname, c.relkind::text, a.attname, format_type(a.atttypid, a.atttypmod),"
                " a.attnotnull, a.attcompression::text, pg_get_expr(d.adbin, d.adrelid)"
                " FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
                " LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum"
                " WHERE c.relnamespace = %s::regnamespace AND a.attnum > 0 ORDER BY 1, 3",
                [name],
            ).fetchall()
            indexes = conn.execute(
                "SELECT tablename, replace(indexdef, schemaname || '.', '') FROM pg_indexes"
                " WHERE schemaname = %s ORDER BY 1, 2",
                [name],
            ).fetchall()
            versions = [
                conn.execute(f"SELECT * FROM {name}.{table} ORDER BY 1".encode()).fetchall()
                for table in ("checkpoint_migrations", "store_migrations", "persistence_alembic_version")
            ]
        described.append((columns, indexes, versions))
    assert described[0] == described[1]
    assert len(described[0][0]) > 50


def test_what_is_refused_leaves_nothing(source: Path, postgres_dsn: str, tmp_path: Path) -> None:
    """Not even a table, though all but the last thread was written."""
    refused = tmp_path / "chat.db"
    refused.write_bytes(source.read_bytes())
    with SqliteSaver.from_conn_string(str(refused)) as saver:
        make.put(saver, "zz\0", {"c": [1]})
    with pytest.raises(RefusedError, match="NUL"):
        transfer.migrate(refused, postgres_dsn)
    assert tables(postgres_dsn) == []


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_interrupted_leaves_nothing(
    source: Path, postgres_dsn: str, error: type[BaseException], workers: int
) -> None:
    def stop(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        if done >= total > 0:
            raise error

    with pytest.raises(error):
        transfer.migrate(source, postgres_dsn, progress=stop, options=Options(workers=workers))
    assert tables(postgres_dsn) == []
    assert not [thread for thread in threading.enumerate() if "ahead" in thread.name]
    assert transfer.migrate(source, postgres_dsn).verified


@pytest.mark.parametrize("made", [False, True])
def test_somebody_else_sets_up_meanwhile(source: Path, postgres_dsn: str, made: bool) -> None:
    """It waits where the transfer makes the tables; where they are there, it does not."""
    provider = provider_for(postgres_dsn)
    if made:
        schema.setup(provider)
    other = threading.Thread(target=schema.setup, args=(provider,))
    waited: list[bool] = []

    def begin(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        if phase == "read" and done >= total > 0 and not waited:
            time.sleep(0.3)  # until the tables are made
            other.start()
            other.join(0.5)
            waited.append(other.is_alive())

    assert transfer.migrate(source, postgres_dsn, progress=begin, options=Options(workers=1)).verified
    other.join(10)
    assert waited == [not made]
    assert not other.is_alive()
    assert schema.check(provider) == []


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A process in the background of a shell may have been started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_while_it_waits_for_a_lock(source: Path, postgres_dsn: str) -> None:
    schema.setup(provider_for(postgres_dsn))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("LOCK TABLE checkpoint_blobs IN SHARE MODE")
        ctrl_c = threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT])
        ctrl_c.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            transfer.migrate(source, postgres_dsn, options=Options(workers=1))
        assert time.monotonic() - began < 20
    assert not [thread for thread in threading.enumerate() if "ahead" in thread.name]
    assert not any(rows(postgres_dsn).values())
    assert transfer.migrate(source, postgres_dsn).verified


def test_a_row_written_meanwhile(source: Path, postgres_dsn: str) -> None:
    """The application runs on the target already: its row is kept, and it is said."""
    schema.setup(provider_for(postgres_dsn))
    written: list[bool] = []

    def write(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        if not written:
            with psycopg.connect(postgres_dsn) as conn:
                conn.execute("INSERT INTO checkpoint_blobs VALUES ('long', '', 'c', '12', 'bytes', 'theirs')")
            written.append(True)

    with pytest.raises(ConflictError, match="long"):
        transfer.migrate(source, postgres_dsn, progress=write, options=Options(workers=1))
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT thread_id, blob FROM checkpoint_blobs").fetchall() == [
            ("long", b"theirs")
        ]
        assert conn.execute("SELECT count(*) FROM checkpoints").fetchone() == (0,)
        conn.execute("DELETE FROM checkpoint_blobs")
    assert transfer.migrate(source, postgres_dsn).verified


def test_the_target_refuses(source: Path, postgres_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """What speaks against a row is said by the writing after the reading, which is tried then."""
    schema.setup(provider_for(postgres_dsn))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("ALTER TABLE checkpoint_writes ADD CHECK (channel <> 'c' OR idx < -1000)")
        conn.execute("ALTER TABLE checkpoints ADD CHECK (thread_id <> 'no version')")
    with caplog.at_level("INFO", "persistence.transfer.ahead"), pytest.raises(TransferError, match="check"):
        transfer.migrate(source, postgres_dsn, options=Options(workers=1))
    assert "while the source was read" in caplog.text
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("ALTER TABLE checkpoints DROP CONSTRAINT checkpoints_thread_id_check")
    assert transfer.migrate(source, postgres_dsn).verified


@pytest.mark.parametrize("holds", ["thread", "run", "table"])
def test_a_database_that_holds_something(source: Path, postgres_dsn: str, tmp_path: Path, holds: str) -> None:
    """A thread of somebody else's, an earlier transfer, one table of an application."""
    if holds == "thread":
        with persistence.open(postgres_dsn) as handle:
            assert handle.checkpointer is not None
            make.put(handle.checkpointer, "theirs", {"c": [1]})
    elif holds == "run":
        small = tmp_path / "small.db"
        with SqliteSaver.from_conn_string(str(small)) as saver:
            make.put(saver, "before", {"c": [1]})
        transfer.migrate(small, postgres_dsn)
    else:
        with psycopg.connect(postgres_dsn) as conn:
            conn.execute("CREATE TABLE checkpoints (id int)")
    if holds == "table":
        with pytest.raises(SchemaError, match="thread_id"):
            transfer.migrate(source, postgres_dsn)
        assert tables(postgres_dsn)[0] == ("public", "checkpoints")
        return
    assert transfer.migrate(source, postgres_dsn).verified
    assert transfer.verify(source, postgres_dsn, subset=True).equal


def test_an_archive(source: Path, postgres_dsn: str, tmp_path: Path) -> None:
    transfer.export(source, tmp_path / "archive")
    transfer.import_(tmp_path / "archive", f"{postgres_dsn}&schema=early")
    assert outcome(postgres_dsn, "early") == after_reading(source, postgres_dsn, "late")


def test_an_encrypted_target(source: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows cannot be finished beforehand."""
    monkeypatch.setenv("PERSISTENCE_ENCRYPTION_KEY", "k" * 32)
    monkeypatch.setenv("PERSISTENCE_ALLOW_PLAINTEXT", "true")
    assert transfer.migrate(source, postgres_dsn).verified


def test_an_empty_source(postgres_dsn: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    with SqliteSaver.from_conn_string(str(empty)) as saver:
        saver.setup()
    report = transfer.migrate(empty, postgres_dsn)
    assert (report.verified, report.totals.threads) == (True, 0)
