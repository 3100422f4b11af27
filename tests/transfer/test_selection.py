"""Some threads only: by id, pattern, metadata and age, from every kind of source."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from persistence import transfer
from persistence.errors import SourceError
from tests.transfer import make

NOW = datetime.now(UTC)


@pytest.fixture(params=["sqlite", "postgres", "archive"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for number, owner in enumerate(["alice", "bob", "alice"]):
            ts = (NOW - timedelta(days=10 * number)).isoformat()
            metadata = {"source": "loop", "user_id": owner, "seat": number}
            parent = make.put(saver, f"user-{number}", {"c": [number]}, metadata=metadata, ts=ts)
            make.put(saver, f"user-{number}", {"c": [number]}, parent=parent, ts=ts)
        make.put(saver, "Über*", {}, ts="no time")
        saver.put_writes(
            {"configurable": {"thread_id": "writes", "checkpoint_ns": "", "checkpoint_id": "c"}},
            [("c", 1)],
            "t",
        )
    if request.param == "postgres":
        dsn = request.getfixturevalue("postgres_dsn")
        transfer.migrate(path, dsn)
        return dsn
    if request.param == "archive":
        transfer.export(path, tmp_path / "archive")
        return tmp_path / "archive"
    return path


@pytest.mark.parametrize(
    ("selection", "threads"),
    [
        ({"threads": ["user-1"]}, ["user-1"]),
        ({"threads": ["user-1", "Über*"]}, ["user-1", "Über*"]),
        ({"threads": ["writes"]}, ["writes"]),
        ({"match": ["user-[02]"]}, ["user-0", "user-2"]),
        ({"match": ["USER-*"]}, []),
        ({"match": ["Ü*"], "threads": ["user-0"]}, ["user-0", "Über*"]),
        ({"where": {"user_id": "alice"}}, ["user-0", "user-2"]),
        ({"where": {"user_id": "alice", "seat": 2.0}}, ["user-2"]),
        ({"where": {"user_id": "alice"}, "match": ["*-0"]}, ["user-0"]),
        ({"newer_than": NOW - timedelta(days=15)}, ["user-0", "user-1"]),
        ({"older_than": NOW - timedelta(days=5)}, ["user-1", "user-2"]),
        ({"older_than": NOW - timedelta(days=5), "newer_than": NOW - timedelta(days=15)}, ["user-1"]),
    ],
)
def test_what_is_selected_moves(
    source: Any, tmp_path: Path, selection: dict[str, Any], threads: list[str]
) -> None:
    select = transfer.Selection(**selection)
    report = transfer.migrate(source, f"sqlite:///{tmp_path}/b.db", options=transfer.Options(select=select))
    assert report.verified
    assert report.totals.threads == len(threads)
    verdict = transfer.verify(source, tmp_path / "b.db")
    missing = {difference.thread_id for difference in verdict.differences}
    assert sorted({"user-0", "user-1", "user-2", "writes", "Über*"} - missing) == threads
    assert transfer.verify(source, tmp_path / "b.db", select=select).equal
    transfer.export(source, tmp_path / "part", options=transfer.Options(select=select))
    assert transfer.verify(tmp_path / "part", tmp_path / "b.db").equal


def test_a_thread_that_is_not_there(source: Any, tmp_path: Path) -> None:
    select = transfer.Selection(threads=["user-0", "user-9"])
    with pytest.raises(SourceError, match="has no thread 'user-9'"):
        transfer.migrate(source, f"sqlite:///{tmp_path}/b.db", options=transfer.Options(select=select))
    assert not (tmp_path / "b.db").exists()


def test_a_row_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    with make.database(tmp_path / "a.db") as saver:
        make.put(saver, "good", {}, metadata={"user_id": "alice"})
        make.put(saver, "bad", {}, metadata={"user_id": "alice"})
    make.execute(tmp_path / "a.db", "UPDATE checkpoints SET metadata = '{' WHERE thread_id = 'bad'")
    select = transfer.Selection(where={"user_id": "alice"})
    with pytest.raises(transfer.RefusedError, match="thread 'bad'"):
        transfer.migrate(
            tmp_path / "a.db", f"sqlite:///{tmp_path}/b.db", options=transfer.Options(select=select)
        )
