"""Threads that the target has already: refused, skipped, replaced or merged, as was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persistence import transfer
from persistence.errors import ConflictError
from tests.transfer import graphs, make
from tests.transfer.targets import Target

SHARED = "chat 1 é"


def options(on_conflict: transfer.OnConflict) -> transfer.Options:
    return transfer.Options(on_conflict=on_conflict)


def of_thread(found: dict[str, list[Any]], thread: str) -> dict[str, list[Any]]:
    return {name: [row for row in rows if row[0] == thread] for name, rows in found.items()}


@pytest.fixture
def theirs(target: Target) -> dict[str, list[Any]]:
    """The target has a thread of the source's with another content."""
    target.chat(SHARED, "theirs")
    return target.rows()


def test_refused_before_anything_is_written(
    filled: Path, target: Target, theirs: dict[str, list[Any]]
) -> None:
    with pytest.raises(ConflictError, match=r"already has thread 'chat 1 é'.*--on-conflict"):
        transfer.migrate(filled, target.dsn)
    assert target.rows() == theirs
    assert not transfer.runs(target.dsn)


def test_skip_leaves_theirs(filled: Path, target: Target, theirs: dict[str, list[Any]]) -> None:
    report = transfer.migrate(filled, target.dsn, options=options("skip"))
    assert (report.verified, report.conflicts) == (True, {"skip": 1})
    assert of_thread(target.rows(), SHARED) == theirs
    verdict = transfer.verify(filled, target.dsn)
    assert {difference.thread_id for difference in verdict.differences} == {SHARED}
    assert report.totals.threads == verdict.threads - 1
    assert report.totals.checkpoints < verdict.checkpoints
    again = transfer.migrate(filled, target.dsn, options=options("skip"))
    assert again.conflicts == {"skip": verdict.threads}
    assert again.totals.checkpoints == 0
    transfer.undo(str(report.run_id), target.dsn)
    assert target.rows() == theirs


def test_replace(filled: Path, target: Target, theirs: dict[str, list[Any]]) -> None:
    report = transfer.migrate(filled, target.dsn, options=options("replace"))
    assert (report.verified, report.conflicts) == (True, {"replace": 1})
    assert json.loads(report.to_json())["conflicts"] == {"replace": 1}
    assert transfer.verify(filled, target.dsn).equal
    target.chat("chat 0 é")
    assert not transfer.verify(filled, target.dsn).equal
    transfer.migrate(filled, target.dsn, options=options("replace"))
    assert transfer.verify(filled, target.dsn).equal


def test_a_run_whose_threads_another_replaced_is_not_finished(
    filled: Path, target: Target, tmp_path: Path
) -> None:
    """The target holds something else by now, so it is no success that all was moved once."""
    transfer.migrate(filled, target.dsn)
    with make.database(tmp_path / "other.db") as saver:
        graphs.chat(saver).invoke({"messages": ["other"]}, graphs.config(SHARED))
    transfer.migrate(tmp_path / "other.db", target.dsn, options=options("replace"))
    with pytest.raises(ConflictError, match="already has thread"):
        transfer.migrate(filled, target.dsn)
    assert not transfer.plan(filled, target.dsn).would_move
    transfer.migrate(filled, target.dsn, options=options("replace"))
    assert transfer.verify(filled, target.dsn).equal
    assert transfer.migrate(filled, target.dsn).already_done


def test_merge_adds_what_is_lacking(tmp_path: Path, target: Target) -> None:
    """Two copies of one thread that went on apart."""
    source = tmp_path / "a.db"
    with make.database(source) as saver:
        graphs.chat(saver).invoke({"messages": ["one"]}, graphs.config("t"))
    transfer.migrate(source, target.dsn)
    target.chat("t", "theirs")
    theirs = target.rows()
    with make.database(source) as saver:
        graphs.chat(saver).invoke({"messages": ["ours"]}, graphs.config("t"))
        graphs.chat(saver).invoke({"messages": ["new"]}, graphs.config("u"))
    report = transfer.migrate(source, target.dsn, options=options("merge"))
    assert (report.verified, report.conflicts) == (True, {"merge": 1})
    for name, found in target.rows().items():
        assert [row for row in found if row in theirs[name]] == theirs[name]
    with target.official() as saver, make.database(source) as ours:
        listed = {item.config["configurable"]["checkpoint_id"]: item for item in saver.list(None)}
        for item in ours.list(None):
            assert listed[item.config["configurable"]["checkpoint_id"]] == item
    transfer.undo(str(report.run_id), target.dsn)
    assert target.rows() == theirs


def test_merge_refuses_another_content(tmp_path: Path, target: Target) -> None:
    source = tmp_path / "a.db"
    with make.database(source) as saver:
        parent = make.put(saver, "t", {"c": [1]}, versions={"c": "1"})
        make.put(saver, "u", {"c": [1]})
    transfer.migrate(source, target.dsn)
    theirs = target.rows()
    with make.database(source) as saver:
        make.put(saver, "t", {"c": [1]}, versions={"c": "1"}, id=parent, metadata={"source": "input"})
        make.put(saver, "v", {})
    with pytest.raises(ConflictError, match=r"has 1 rows with another content .*thread 't', checkpoint"):
        transfer.migrate(source, target.dsn, options=options("merge"))
    assert target.rows() == theirs


def test_merge_refuses_another_value_under_a_version(tmp_path: Path, postgres_dsn: str) -> None:
    """Two branches may have come to the same version number with different values."""
    source = tmp_path / "a.db"
    with make.database(source) as saver:
        make.put(saver, "t", {"c": [1]}, versions={"c": "1"})
    transfer.migrate(source, postgres_dsn)
    theirs = Target(postgres_dsn).rows()
    make.execute(source, "DELETE FROM checkpoints")
    with make.database(source) as saver:
        make.put(saver, "t", {"c": [2]}, versions={"c": "1"})
    with pytest.raises(ConflictError, match="channel 'c', version '1'"):
        transfer.migrate(source, postgres_dsn, options=options("merge"))
    assert Target(postgres_dsn).rows() == theirs


@pytest.mark.parametrize("on_conflict", ["skip", "replace", "merge"])
def test_an_interrupted_run_goes_on_as_it_began(
    filled: Path, target: Target, on_conflict: transfer.OnConflict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 20)
    part = transfer.Options(select=transfer.Selection(threads=[SHARED, "log"]))
    transfer.migrate(filled, target.dsn, options=part)
    if on_conflict != "merge":
        target.chat(SHARED, "theirs")

    def stop(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        if phase == "write" and done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.migrate(filled, target.dsn, options=options(on_conflict), progress=stop)
    report = transfer.migrate(filled, target.dsn, options=options(on_conflict))
    assert report.batches_skipped > 0
    assert report.verified
    assert report.conflicts == {on_conflict: 2}
    assert transfer.verify(filled, target.dsn).equal == (on_conflict != "skip")


def test_the_rate_is_limited(tmp_path: Path, target: Target) -> None:
    with make.database(tmp_path / "a.db") as saver:
        for number in range(4):
            make.put(saver, f"t {number}", {"c": ["x" * 500_000]})
    report = transfer.migrate(tmp_path / "a.db", target.dsn, options=transfer.Options(max_mbps=2.0))
    assert report.totals.bytes / report.phases["write"] < 2_100_000


@pytest.mark.parametrize("name", ["postgres", "same.db", "symbolic.db", "hard.db"])
def test_into_itself(database: Path, postgres_dsn: str, tmp_path: Path, name: str) -> None:
    """Replacing deletes a thread before it is read to its end, and undoing would delete it altogether."""
    source = f"sqlite:///{database}"
    target = f"sqlite:///{tmp_path / name}"
    if name == "postgres":
        transfer.migrate(database, postgres_dsn)
        source, target = postgres_dsn, f"{postgres_dsn}&schema=public"
    elif name == "symbolic.db":
        (tmp_path / name).symlink_to(database)
    elif name == "hard.db":
        (tmp_path / name).hardlink_to(database)
    else:
        target = f"sqlite:///{tmp_path}/./{database.name}"
    for again in (
        lambda: transfer.migrate(source, target, options=transfer.Options(on_conflict="replace")),
        lambda: transfer.migrate(source, target, archive=tmp_path / "archive"),
        lambda: transfer.plan(source, target),
    ):
        with pytest.raises(ConflictError, match="are the same database"):
            again()
