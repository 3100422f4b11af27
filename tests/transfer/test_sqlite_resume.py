"""A run into a SQLite file that was interrupted goes on, or says why it cannot."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from persistence import transfer
from persistence.backends.sqlite.transfer_sink import SqliteSink
from persistence.errors import ConflictError, PersistenceError, TransferError
from persistence.registry import provider_for
from tests.transfer import make, test_resume
from tests.transfer.conftest import file_rows
from tests.transfer.test_resume import source

__all__ = ["source"]


def interrupted(source: Path, target: Path) -> str:
    """See :func:`tests.transfer.test_resume.interrupted`."""
    test_resume.interrupted(source, f"sqlite:///{target}", SqliteSink)
    return f"sqlite:///{target}"


def test_resumed_run_reports_what_was_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "chat.db"
    report = transfer.migrate(source, interrupted(source, target))
    assert report.batches_skipped == 3
    assert report.batches_written > 0
    assert report.verified
    with closing(sqlite3.connect(target)) as conn:
        runs = conn.execute(
            "SELECT run_id, state, finished_at >= started_at, target_identity FROM persistence_transfers"
        ).fetchall()
        batches = conn.execute("SELECT count(*) FROM persistence_transfer_batches").fetchone()
    assert runs == [(report.run_id, "finished", 1, f"sqlite:{target.stat().st_ino}")]
    assert batches == (report.batches_written + report.batches_skipped,)


def test_source_changed_since(source: Path, tmp_path: Path) -> None:
    changed, target = Path(shutil.copy(source, tmp_path / "source.db")), tmp_path / "chat.db"
    interrupted(changed, target)
    before = file_rows(target)
    make.execute(changed, "DELETE FROM writes")
    with pytest.raises(ConflictError) as raised:
        transfer.migrate(changed, f"sqlite:///{target}")
    assert "has changed since" in str(raised.value)
    assert file_rows(target) == before


def test_a_renamed_target_goes_on_and_a_copy_is_another(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "chat.db"
    interrupted(source, target)
    transfer.verify(target, target)  # by a reader, which empties the log into the file
    with provider_for(f"sqlite:///{target}").sink():
        pass
    copied, renamed = shutil.copy(target, tmp_path / "copy.db"), target.rename(tmp_path / "renamed.db")
    with pytest.raises(ConflictError):
        transfer.migrate(source, f"sqlite:///{copied}")
    assert transfer.migrate(source, f"sqlite:///{renamed}").batches_skipped == 3


def test_batches_that_are_not_the_same_are_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "chat.db"
    interrupted(source, target)
    make.execute(target, "UPDATE persistence_transfer_batches SET digest = 'x' WHERE batch_no = 1")
    before = file_rows(target)
    with pytest.raises(TransferError, match="batch 1"):
        transfer.migrate(source, f"sqlite:///{target}")
    assert file_rows(target) == before


def test_second_is_refused_while_the_first_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.backends.sqlite.transfer_lock._LOCK_WAIT", 0.3)
    dsn = f"sqlite:///{tmp_path}/chat.db"
    with provider_for(dsn).sink() as sink, sink.exclusive():
        with pytest.raises(ConflictError, match="under way"):
            transfer.migrate(source, dsn)
        assert transfer.migrate(source, f"sqlite:///{tmp_path}/other.db").verified
    assert transfer.migrate(source, dsn).verified
    assert not (tmp_path / "chat.db-transfer").exists()


def test_a_row_written_meanwhile_is_a_conflict(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application is already running on the target: its row is not overwritten."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    target = tmp_path / "chat.db"
    ids = [row[2] for row in file_rows(source)["checkpoints"] if row[0] == "long"]

    def write_to_target(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        if phase == "write" and ids:
            with closing(sqlite3.connect(target)) as conn, conn:
                conn.executemany(
                    "INSERT INTO checkpoints VALUES ('long', '', ?, NULL, 'msgpack', x'80', '{}')",
                    [[ids.pop()] for _ in range(3)],
                )
                ids.clear()

    with pytest.raises(ConflictError, match="holds a row that the transfer brings: thread 'long'"):
        transfer.migrate(source, f"sqlite:///{target}", progress=write_to_target)
    make.execute(target, "DELETE FROM checkpoints WHERE checkpoint = x'80'")
    assert transfer.migrate(source, f"sqlite:///{target}").verified


def test_a_target_without_room(source: Path, tmp_path: Path, open_folder: Path) -> None:
    """A folder where nothing can be made: a clear error, and the file that is there stays as it is."""
    readable, target = (Path(shutil.copy(source, open_folder / name)) for name in ("source.db", "chat.db"))
    for table in ("checkpoints", "writes"):
        make.execute(target, f"DELETE FROM {table}")
    before = target.read_bytes()
    target.chmod(0o444)
    open_folder.chmod(0o555)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(65534)
    try:
        with pytest.raises(PersistenceError) as raised:
            transfer.migrate(readable, f"sqlite:///{target}")
    finally:
        if as_root:
            os.seteuid(0)
        open_folder.chmod(0o777)
    assert "may only be read" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert target.read_bytes() == before
