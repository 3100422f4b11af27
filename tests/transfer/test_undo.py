"""Undo removes what a run inserted, and nothing that was written later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langgraph.types import Command

from persistence import transfer
from persistence.errors import ConflictError, TransferError
from persistence.transfer import removal
from tests.transfer import make
from tests.transfer.targets import Target

OTHER = "chat 9 theirs"


@pytest.fixture
def before(target: Target) -> dict[str, list[Any]]:
    """The target has a thread of its own."""
    target.chat(OTHER)
    return target.rows()


def test_nothing_of_the_run_is_left_and_all_else_is(
    filled: Path, target: Target, before: dict[str, list[Any]]
) -> None:
    report = transfer.migrate(filled, target.dsn)
    assert report.run_id is not None
    undone = transfer.undo(report.run_id, target.dsn)
    assert target.rows() == before
    assert (undone.threads, undone.checkpoints) == (report.totals.threads, report.totals.checkpoints)
    assert undone.writes == report.totals.writes
    assert [run.state for run in transfer.runs(target.dsn)] == ["undone"]
    with pytest.raises(TransferError, match="undone already"):
        transfer.undo(report.run_id, target.dsn)
    again = transfer.migrate(filled, target.dsn)
    assert again.verified
    assert again.run_id != report.run_id


def test_later_work_that_builds_on_the_run_is_not_lost(filled: Path, target: Target) -> None:
    report = transfer.migrate(filled, target.dsn)
    moved = target.keys()
    target.chat("chat 0 é")
    target.chat("chat 1 é", Command(resume="yes"))
    target.chat(OTHER)
    after = target.rows()
    with pytest.raises(ConflictError, match=r"later work .* builds on run .*thread 'chat 0 é'.*--later keep"):
        transfer.undo(str(report.run_id), target.dsn)
    assert target.rows() == after
    assert [run.state for run in transfer.runs(target.dsn)] == ["finished"]

    kept = transfer.undo(str(report.run_id), target.dsn, later="keep")
    assert kept.kept_threads == 2
    threads = {key[0] for key in target.keys()["checkpoints"]}
    assert threads == {"chat 0 é", "chat 1 é", OTHER}
    for name, found in after.items():
        assert [row for row in found if row[0] in threads] == target.rows()[name]
    assert moved["checkpoints"] & target.keys()["checkpoints"]


def test_later_work_can_be_removed_too(filled: Path, target: Target, before: dict[str, list[Any]]) -> None:
    report = transfer.migrate(filled, target.dsn)
    target.chat("chat 0 é")
    undone = transfer.undo(str(report.run_id), target.dsn, later="remove")
    assert undone.later_removed > 5
    left, was = target.rows(), before
    assert {key[0] for key in target.keys()["checkpoints"]} == {OTHER}
    assert left["checkpoints"] == was["checkpoints"]


@pytest.mark.parametrize("deleted", [True, False])
def test_what_a_later_run_brought_again_stays(filled: Path, target: Target, deleted: bool) -> None:
    """The same rows: those of the first run were deleted, by hand or by ``replace``."""
    first = transfer.migrate(filled, target.dsn)
    if deleted:
        for table in target.rows():
            target.execute(f"DELETE FROM {table}")
    second = transfer.migrate(filled, target.dsn, options=transfer.Options(on_conflict="replace"))
    rows = target.rows()
    undone = transfer.undo(str(first.run_id), target.dsn)
    assert (undone.threads, undone.checkpoints, undone.writes, undone.values) == (0, 0, 0, 0)
    assert target.rows() == rows
    assert transfer.undo(str(second.run_id), target.dsn).threads == second.totals.threads
    assert not any(target.rows().values())


def test_a_row_that_was_changed_since_stays(tmp_path: Path, target: Target) -> None:
    with make.database(tmp_path / "a.db") as saver:
        first = make.put(saver, "t", {"c": [1]})
        make.put(saver, "t", {"c": [1]}, parent=first)
        make.put(saver, "u", {"c": [2]})
    report = transfer.migrate(tmp_path / "a.db", target.dsn)
    with target.official() as saver:
        config: Any = {"configurable": {"thread_id": "u", "checkpoint_ns": ""}}
        found = saver.get_tuple(config)
        assert found is not None
        saver.put(config, found.checkpoint, {"source": "update", "step": 99}, {})
    found_by = Target.keys(target)
    if "sqlite" in target.dsn:  # there the checkpoint holds its values and needs nothing of the run
        undone = transfer.undo(str(report.run_id), target.dsn)
    else:
        with pytest.raises(ConflictError, match="thread 'u'"):
            transfer.undo(str(report.run_id), target.dsn)
        undone = transfer.undo(str(report.run_id), target.dsn, later="keep")
        assert undone.kept_threads == 1
    assert {key[0] for key in target.keys()["checkpoints"]} == {"u"}
    assert found_by["checkpoints"] >= target.keys()["checkpoints"]


def test_an_interrupted_run_can_be_undone(
    filled: Path, target: Target, before: dict[str, list[Any]], stop: transfer.Progress
) -> None:
    with pytest.raises(KeyboardInterrupt):
        transfer.migrate(filled, target.dsn, progress=stop)
    (run,) = transfer.runs(target.dsn)
    assert target.rows() != before
    assert run.state == "running"
    transfer.undo(run.run_id[:8], target.dsn)
    assert target.rows() == before


def test_a_run_that_went_on_after_a_later_one_was_undone(
    filled: Path, database: Path, target: Target, stop: transfer.Progress
) -> None:
    """What the later one had brought and lost again, the earlier one brought then."""
    with pytest.raises(KeyboardInterrupt):
        transfer.migrate(filled, target.dsn, progress=stop)
    with make.database(database) as saver:
        make.put(saver, "one more", {"c": [1]})
    later = transfer.migrate(database, target.dsn, options=transfer.Options(on_conflict="merge"))
    transfer.undo(str(later.run_id), target.dsn)
    report = transfer.migrate(filled, target.dsn)
    assert report.batches_skipped
    transfer.undo(str(report.run_id), target.dsn)
    assert not any(target.rows().values())


def test_interrupted_and_run_again(
    filled: Path, target: Target, before: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread removed, and the next one in a transaction; tests/transfer/kills kills it anywhere."""
    report = transfer.migrate(filled, target.dsn)
    count, threads = removal._count, 0

    def stop(*args: Any) -> None:
        nonlocal threads
        threads += 1
        if threads == 2:
            raise KeyboardInterrupt
        count(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(removal, "_THREADS_AT_ONCE", 1)
        patch.setattr(removal, "_count", stop)
        transfer.undo(str(report.run_id), target.dsn)
    with pytest.raises(ConflictError, match="half undone"):
        transfer.migrate(filled, target.dsn)
    undone = transfer.undo(str(report.run_id), target.dsn)
    assert 0 < undone.checkpoints < report.totals.checkpoints
    assert target.rows() == before


def test_a_run_that_is_not_there(target: Target, before: dict[str, list[Any]]) -> None:
    with pytest.raises(TransferError, match=r"no run '4711'.*persistence runs"):
        transfer.undo("4711", target.dsn)


def test_a_run_without_keys_is_refused(filled: Path, target: Target) -> None:
    """One that an older version made."""
    report = transfer.migrate(filled, target.dsn)
    after = target.rows()
    target.execute("DELETE FROM persistence_transfer_keys")
    with pytest.raises(TransferError, match="did not note which rows"):
        transfer.undo(str(report.run_id), target.dsn)
    assert target.rows() == after
