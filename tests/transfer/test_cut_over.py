"""A cut-over finds what following could not see, seals the source, and leaves it alone where it fails."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

import persistence
from persistence import schema, transfer
from persistence.errors import ConnectError, SealedError, TransferError, VerificationError
from persistence.registry import provider_for
from persistence.settings import Settings
from tests.transfer import graphs, make
from tests.transfer.conftest import file_rows, postgres_tuples
from tests.transfer.test_follow import Writer, follow_for, require_equal

# The last byte of a checkpoint is the end of a value: another one of the same length, which no stamp shows.
IN_PLACE = """
UPDATE checkpoints SET checkpoint = CAST(replace(CAST(checkpoint AS TEXT), 'first', 'other') AS BLOB)
WHERE thread_id = 'changed'
"""


@pytest.fixture
def source(database: Path) -> Path:
    """A database with a thread that can be changed in place."""
    with make.database(database) as saver:
        make.put(saver, "changed", {"c": ["first"]})
    return database


def triggers(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as conn:
        return [name for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]


def holds(dsn: str, value: str) -> bool:
    found = [t for t in postgres_tuples(dsn) if t.config["configurable"]["thread_id"] == "changed"]
    return any(t.checkpoint["channel_values"].get("c") == [value] for t in found)


def once(then: Callable[[], None]) -> Callable[[transfer.Round], None]:
    """Do something after the first round, which has compared everything."""

    def told(found: transfer.Round) -> None:
        if found.number == 1:
            then()

    return told


def test_a_row_changed_in_place_before(source: Path, postgres_dsn: str) -> None:
    follow_for(source, postgres_dsn, 1)
    make.execute(source, IN_PLACE)
    follow_for(source, postgres_dsn, 1)
    assert holds(postgres_dsn, "first")
    done = transfer.cut_over(source, postgres_dsn)
    assert done.mended == 1
    assert holds(postgres_dsn, "other")
    require_equal(source, postgres_dsn)


def test_a_row_changed_in_place_meanwhile(source: Path, postgres_dsn: str) -> None:
    done = transfer.cut_over(source, postgres_dsn, told=once(lambda: make.execute(source, IN_PLACE)))
    assert done.mended == 1
    require_equal(source, postgres_dsn)


def test_deleted_and_made_again_meanwhile(source: Path, postgres_dsn: str) -> None:
    """Row for row the same keys at the same rowids, with a change that only the content shows."""

    def again() -> None:
        with closing(sqlite3.connect(source)) as conn, conn:
            kept = conn.execute("SELECT rowid, * FROM checkpoints WHERE thread_id = 'changed'").fetchall()
            conn.execute("DELETE FROM checkpoints WHERE thread_id = 'changed'")
            for rowid, *row in kept:
                row[5] = row[5].replace(b"first", b"other")
                conn.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                assert conn.execute("SELECT last_insert_rowid()").fetchone() == (rowid,)

    transfer.cut_over(source, postgres_dsn, told=once(again))
    assert holds(postgres_dsn, "other")
    require_equal(source, postgres_dsn)


def test_rebuilt_meanwhile(source: Path, postgres_dsn: str) -> None:
    rounds: list[int] = []

    def vacuum(found: transfer.Round) -> None:
        rounds.append(found.number)
        if found.number == 1:
            make.execute(source, "VACUUM")

    transfer.cut_over(source, postgres_dsn, told=vacuum)
    assert len(rounds) == 3, "everything is compared once more"
    require_equal(source, postgres_dsn)


def test_rebuilt_in_the_last_moment(source: Path, postgres_dsn: str) -> None:
    def vacuum(found: transfer.Round) -> None:
        if found.number == 2:
            make.execute(source, "VACUUM")

    with pytest.raises(TransferError, match="run the command again"):
        transfer.cut_over(source, postgres_dsn, told=vacuum)
    assert triggers(source) == []
    assert transfer.cut_over(source, postgres_dsn).sealed


def test_the_target_lost_a_row(source: Path, postgres_dsn: str) -> None:
    def lose() -> None:
        with psycopg.connect(postgres_dsn) as conn:
            conn.execute("DELETE FROM checkpoint_writes WHERE thread_id = 'log'")

    with pytest.raises(VerificationError, match="'log'"):
        transfer.cut_over(source, postgres_dsn, told=once(lose))
    assert triggers(source) == []
    with make.database(source) as saver:
        make.put(saver, "goes on", {"c": ["x"]})


def test_somebody_holds_the_lock(source: Path, postgres_dsn: str) -> None:
    settings = Settings(sqlite_busy_timeout=0.3)
    follow_for(source, postgres_dsn, 1)
    with closing(sqlite3.connect(source, isolation_level=None)) as conn:
        conn.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConnectError, match="does not finish"):
            transfer.cut_over(source, postgres_dsn, settings=settings)
    assert triggers(source) == []


def test_left_open(source: Path, postgres_dsn: str) -> None:
    done = transfer.cut_over(source, postgres_dsn, seal=False)
    assert not done.sealed
    assert triggers(source) == []
    require_equal(source, postgres_dsn)


def test_with_a_rollback_journal(source: Path, postgres_dsn: str) -> None:
    make.execute(source, "PRAGMA journal_mode = DELETE")
    follow_for(source, postgres_dsn, 1)
    assert transfer.cut_over(source, postgres_dsn).sealed
    with closing(sqlite3.connect(source)) as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert transfer.verify(source, postgres_dsn).equal


def test_again_is_nothing(source: Path, postgres_dsn: str) -> None:
    first = transfer.cut_over(source, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("DELETE FROM checkpoints WHERE thread_id = 'log'")  # the application goes on there
    again = transfer.cut_over(source, postgres_dsn)
    assert (again.already_done, again.run_id, again.pause_seconds) == (True, first.run_id, None)
    with pytest.raises(TransferError, match=r"cut over .* already"):
        follow_for(source, postgres_dsn, 1)


async def test_a_sealed_file_in_an_event_loop(source: Path, postgres_dsn: str) -> None:
    transfer.cut_over(source, postgres_dsn)
    async with AsyncSqliteSaver.from_conn_string(str(source)) as official:
        with pytest.raises(sqlite3.IntegrityError, match="has moved"):
            await official.adelete_thread("log")
    async with persistence.aopen(f"sqlite:///{source}") as db:
        saver: Any = db.checkpointer
        with pytest.raises(SealedError):
            await saver.adelete_thread("log")


def test_a_sealed_file(source: Path, postgres_dsn: str, tmp_path: Path) -> None:
    schema.setup(provider_for(f"sqlite:///{source}"))
    transfer.cut_over(source, postgres_dsn)
    before = file_rows(source)
    with (
        make.database(source) as saver,
        pytest.raises(sqlite3.IntegrityError, match="has moved to postgresql"),
    ):
        make.put(saver, "new", {"c": ["x"]})
    with persistence.open(f"sqlite:///{source}") as db:
        ours: Any = db.checkpointer
        (found, *_) = ours.list(graphs.config("log"))
        with pytest.raises(SealedError, match="has moved to postgresql"):
            ours.put(found.config, found.checkpoint, {}, {})
        with pytest.raises(SealedError, match="persistence unseal"):
            ours.put_writes(found.config, [("c", 1)], "task")
        with pytest.raises(SealedError):
            ours.delete_thread("log")
        health = db.health(60)
    assert (health.status, health.ready) == ("unavailable", False)
    assert health.problem is not None
    assert health.problem.code == "sealed"
    assert not schema.setup(provider_for(f"sqlite:///{source}")).changes
    assert file_rows(source) == before
    assert transfer.migrate(source, f"sqlite:///{tmp_path / 'copy.db'}").verified
    assert transfer.unseal(source)
    assert not transfer.unseal(source)
    assert triggers(source) == []
    with make.database(source) as saver:
        make.put(saver, "new", {"c": ["x"]})


def test_what_the_seal_says_holds_no_secret(source: Path, postgres_dsn: str) -> None:
    transfer.cut_over(source, f"{postgres_dsn}&password=hunter2")
    with pytest.raises(sqlite3.IntegrityError) as caught, SqliteSaver.from_conn_string(str(source)) as saver:
        saver.delete_thread("log")
    assert "hunter2" not in str(caught.value)


def test_the_pause(tmp_path: Path, postgres_dsn: str) -> None:
    """About 30 MB with a writer; the figure is printed."""
    path = tmp_path / "large.db"
    with make.database(path) as saver:
        for number in range(30):
            state: list[str] = []
            for turn in range(20):
                state.append("x" * 5_000)
                make.put(saver, f"thread {number}", {"c": state}, versions={"c": turn})
    follow_for(path, postgres_dsn, 1)
    with Writer(path, "official") as writer:
        writer.wait_for(3)
        done = transfer.cut_over(path, postgres_dsn)
    assert done.last is not None
    size = path.stat().st_size / 1e6
    sys.stdout.write(f"{size:.0f} MB: write pause {done.pause_seconds:.3f} s, {done.last.rows} rows left\n")
    assert transfer.verify(path, postgres_dsn).equal
