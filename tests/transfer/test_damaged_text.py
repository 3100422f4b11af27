"""Text in a SQLite file that is not UTF-8 stops no more than its own rows, and these are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from persistence import transfer
from persistence.errors import SourceError
from persistence.registry import provider_for
from persistence.settings import Settings
from tests.transfer import make
from tests.transfer.targets import Target
from tests.transfer.test_follow import follow_for
from tests.transfer.test_refusals import config

ASIDE = transfer.Options(on_reject="set-aside")
NOT_UTF8 = b"bad \xc3\xa9 \xff \xed\xa0\x80"
PLACES = {
    "checkpoints": ("thread_id", "checkpoint_ns", "checkpoint_id", "parent_checkpoint_id", "type"),
    "writes": ("thread_id", "checkpoint_ns", "checkpoint_id", "task_id", "task_path", "channel", "type"),
}
CONTENT = [("checkpoints", "checkpoint"), ("checkpoints", "metadata"), ("writes", "value")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Threads before and after one, ``bad``, that has another checkpoint and another write."""
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for thread in ("a", "bad", "bad x", "ü"):
            for number in ("1", "2"):
                make.put(saver, thread, {"c": [number]}, versions={"c": number}, id=number)
                saver.put_writes(config(thread, number), [("c", 1)], "task")
    return path


def damage(path: Path, table: str, column: str, stored: bytes = NOT_UTF8) -> None:
    """Of one row of ``bad``."""
    row = "thread_id = 'bad' AND checkpoint_id = '1'"
    make.execute(path, f"UPDATE {table} SET {column} = CAST(? AS TEXT) WHERE {row}", stored)


def everywhere() -> list[Any]:
    return [(table, column) for table, columns in PLACES.items() for column in columns] + CONTENT


@pytest.mark.parametrize(("table", "column"), everywhere())
def test_one_row(path: Path, target: Target, table: str, column: str) -> None:
    if (table, column) == ("writes", "task_path"):
        return  # this layout does not have it
    damage(path, table, column)
    reason = f"text that is not UTF-8 in {column}"
    with pytest.raises(transfer.RefusedError) as refused:
        transfer.migrate(path, target.dsn)
    (problem,) = refused.value.problems
    assert (problem.reason, problem.count) == (reason, 1)
    assert problem.examples[0].startswith("thread 'bad")
    plan = transfer.plan(path, target.dsn)
    assert [(f.kind, f.count) for f in plan.findings if f.severity == "refused"] == [("damaged", 1)]
    with pytest.raises(transfer.RefusedError, match=reason):
        transfer.export(path, path.parent / "archive")
    assert not (path.parent / "archive").exists()

    report = transfer.migrate(path, target.dsn, options=ASIDE)
    assert (report.set_aside, report.verified) == (1, True)
    assert reason in report.rejects[0]
    assert report.totals.checkpoints + report.totals.writes == 15
    with provider_for(target.dsn).sink() as sink:
        (row,) = sink.ledger()._tables.query("SELECT raw FROM persistence_transfer_rejects")
    assert NOT_UTF8 in msgspec.msgpack.decode(bytes(row[0]))
    with pytest.raises(SourceError, match=reason):
        transfer.verify(path, target.dsn)
    if column == "thread_id" or (table, column) == ("checkpoints", "checkpoint_id"):
        with pytest.raises(SourceError, match="UTF-8"):  # or LangGraph's saver would just not see it
            transfer.verify(path, target.dsn, check=transfer.Check(depth="semantic"))


def test_a_row_that_is_mended(path: Path, target: Target) -> None:
    damage(path, "checkpoints", "metadata")
    assert transfer.migrate(path, target.dsn, options=ASIDE).set_aside == 1
    damage(path, "checkpoints", "metadata", b"{}")
    assert transfer.retry_rejects("last", path, target.dsn).set_aside == 0
    assert transfer.verify(path, target.dsn).equal


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_without_a_name(
    path: Path, target: Target, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Two that would be called the same, and one that is called so; all of their rows are found."""
    monkeypatch.setattr("persistence.transfer.workers._PATIENCE", 0.0)
    with make.database(path) as saver:
        for thread in ("one", "two", r"bad \xff\xfe"):
            make.put(saver, thread, {"c": [1]}, id="1")
            saver.put_writes(config(thread, "1"), [("c", 1)], "task")
    for thread, stored in (("one", b"bad \\xff\xfe"), ("two", b"bad \xff\\xfe")):
        for table in ("checkpoints", "writes"):
            statement = f"UPDATE {table} SET thread_id = CAST(? AS TEXT) WHERE thread_id = ?"
            make.execute(path, statement, stored, thread)
    plan = transfer.plan(path, target.dsn, settings=Settings(transfer_workers=workers))
    assert [f.count for f in plan.findings if f.kind == "damaged"] == [4]
    report = transfer.migrate(path, target.dsn, options=ASIDE)
    assert (report.set_aside, report.verified) == (4, True)
    assert {one.thread_id for one in transfer.rejects("last", target.dsn)} == {r"bad \xff\xfe"}
    assert {key[0] for key in target.keys()["checkpoints"]} == {"a", "bad", "bad x", "ü", r"bad \xff\xfe"}


def test_many_rows(path: Path, target: Target) -> None:
    """They are counted by reason, and the others of their threads move."""
    for table, column in CONTENT:
        statement = f"UPDATE {table} SET {column} = CAST(? AS TEXT) WHERE checkpoint_id = '2'"
        make.execute(path, statement, NOT_UTF8)
    with pytest.raises(transfer.RefusedError, match=r"^8 rows") as refused:
        transfer.migrate(path, target.dsn)
    assert [problem.count for problem in refused.value.problems] == [4, 4]
    report = transfer.migrate(path, target.dsn, options=ASIDE)
    assert (report.set_aside, report.totals.checkpoints, report.totals.writes) == (8, 4, 4)


def test_while_it_is_followed(path: Path, target: Target) -> None:
    follow_for(path, target.dsn, 1)
    damage(path, "checkpoints", "metadata")
    with pytest.raises(SourceError, match="not UTF-8 in metadata"):
        transfer.cut_over(path, target.dsn)
    damage(path, "checkpoints", "metadata", b"{}")
    transfer.cut_over(path, target.dsn)
    assert transfer.verify(path, target.dsn).equal
