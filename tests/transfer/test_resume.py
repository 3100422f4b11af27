"""A run that was interrupted goes on, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

from persistence import transfer
from persistence.backends.postgres.transfer_sink import PostgresSink
from persistence.errors import ConflictError, ConnectError, TransferError
from persistence.registry import provider_for
from tests.transfer import graphs, make
from tests.transfer.conftest import rows


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "chat.db"
    graphs.fill(path, threads=1, turns=1)
    with SqliteSaver.from_conn_string(str(path)) as saver:
        for number in range(25):  # one thread that spans batches
            make.put(saver, "long", {"c": ["x" * (number // 2)]}, versions={"c": number // 2})
    return path


def interrupted(source: Path, dsn: str, sink: type[Any] = PostgresSink) -> None:
    """A run that ends after three batches of 9 rows; tests/transfer/kills kills runs anywhere."""
    write, batches = sink.write, 0

    def ended(self: Any, batch: Any) -> None:
        nonlocal batches
        batches += 1
        if batches > 3:
            raise KeyboardInterrupt
        write(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
        patch.setattr("persistence.transfer.ahead.LIMIT", -1)
        patch.setattr(sink, "write", ended)
        transfer.migrate(source, dsn)


def test_resumed_run_reports_what_was_there(source: Path, postgres_dsn: str) -> None:
    interrupted(source, postgres_dsn)
    report = transfer.migrate(source, postgres_dsn)
    assert report.batches_skipped == 3
    assert report.batches_written > 0
    assert report.verified
    with psycopg.connect(postgres_dsn) as conn:
        runs = conn.execute(
            "SELECT run_id, state, finished_at IS NOT NULL FROM persistence_transfers"
        ).fetchall()
        batches = conn.execute("SELECT count(*) FROM persistence_transfer_batches").fetchone()
    assert runs == [(report.run_id, "finished", True)]
    assert batches == (report.batches_written + report.batches_skipped,)


def test_source_changed_since(source: Path, postgres_dsn: str, tmp_path: Path) -> None:
    changed = tmp_path / "chat.db"
    changed.write_bytes(source.read_bytes())
    interrupted(changed, postgres_dsn)
    before = rows(postgres_dsn)
    make.execute(changed, "DELETE FROM writes")
    with pytest.raises(ConflictError, match="has changed since"):
        transfer.migrate(changed, postgres_dsn)
    assert rows(postgres_dsn) == before


def test_ledger_of_a_copied_database_is_another_targets(source: Path, postgres_dsn: str) -> None:
    """A restored backup brings the ledger along, but it is not the database the ledger speaks of."""
    interrupted(source, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE persistence_transfers SET target_identity = 'elsewhere'")
    with pytest.raises(ConflictError):
        transfer.migrate(source, postgres_dsn)


def test_batches_that_are_not_the_same_are_refused(source: Path, postgres_dsn: str) -> None:
    interrupted(source, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE persistence_transfer_batches SET digest = 'x' WHERE batch_no = 1")
    before = rows(postgres_dsn)
    with pytest.raises(TransferError, match="batch 1"):
        transfer.migrate(source, postgres_dsn)
    assert rows(postgres_dsn) == before


def test_second_is_refused_while_the_first_runs(
    source: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.backends.postgres.transfer_sink._LOCK_WAIT", 0.5)
    with provider_for(postgres_dsn).sink() as sink, sink.exclusive():
        with pytest.raises(ConflictError, match="under way"):
            transfer.migrate(source, postgres_dsn)
        assert transfer.migrate(source, f"{postgres_dsn}&schema=other").verified
    assert transfer.migrate(source, postgres_dsn).verified


@pytest.mark.usefixtures("written_afterwards")
def test_connection_lost_on_the_way(source: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    lost = False

    def lose(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        nonlocal lost
        if phase == "write" and not lost:
            lost = True
            with psycopg.connect(postgres_dsn) as conn:
                conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )

    with pytest.raises(ConnectError) as raised:
        transfer.migrate(source, postgres_dsn, progress=lose)
    assert "\n" not in str(raised.value)
    assert transfer.migrate(source, postgres_dsn).verified


@pytest.mark.usefixtures("written_afterwards")
def test_a_row_written_meanwhile_is_a_conflict(
    source: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application is already running on the target: its row is not overwritten."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    written = False

    def write_to_target(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        nonlocal written
        if phase == "write" and not written:
            written = True
            with psycopg.connect(postgres_dsn) as conn:
                conn.execute(
                    "INSERT INTO checkpoint_blobs SELECT 'long', '', 'c', n::text, 'bytes', 'theirs'"
                    " FROM generate_series(0, 20) n"
                )

    with pytest.raises(ConflictError, match="holds a row"):
        transfer.migrate(source, postgres_dsn, progress=write_to_target)
    with psycopg.connect(postgres_dsn) as conn:
        theirs = conn.execute("SELECT count(*) FROM checkpoint_blobs WHERE blob = 'theirs'").fetchone()
        conn.execute("DELETE FROM checkpoint_blobs WHERE blob = 'theirs'")
    assert theirs == (21,)
    assert transfer.migrate(source, postgres_dsn).verified
