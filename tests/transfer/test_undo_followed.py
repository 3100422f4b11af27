"""Undo of a run that followed its source: what its first copy and its rounds inserted, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from persistence import transfer
from persistence.cli.app import run as cli
from persistence.errors import ConflictError, TransferError
from tests.transfer import make
from tests.transfer.targets import Target
from tests.transfer.test_follow import follow_for

THEIRS = "chat 9 theirs"
ONE = "1f000000-0000-6000-8000-000000000001"
TWO = "1f000000-0000-6000-8000-000000000002"


@pytest.fixture
def source(database: Path) -> Path:
    """Beside what graphs wrote, threads to which a round does one thing each."""
    with make.database(database) as saver:
        for thread in ("added", "deleted", "replaced", "written"):
            make.put(saver, thread, {"c": ["first"]}, id=ONE)
            put_writes(saver, thread)
    return database


@pytest.fixture
def file(tmp_path: Path) -> Target:
    """An empty target where it does not matter which."""
    return Target(f"sqlite:///{tmp_path / 'target.db'}")


def put_writes(saver: Any, thread: str) -> None:
    place = {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": ONE}
    saver.put_writes({"configurable": place}, [("c", 1), ("d", 2)], "task")


def change(path: Path) -> None:
    """All that a round can find."""
    make.execute(path, "UPDATE writes SET value = x'c0' WHERE thread_id = 'written' AND idx = 0")
    make.execute(path, "DELETE FROM writes WHERE thread_id = 'written' AND idx = 1")
    with make.database(path) as saver:
        make.put(saver, "added", {"c": ["second"]}, versions={"c": "2.0"}, id=TWO, parent=ONE)
        make.put(saver, "new", {"c": ["new"]})
        for thread in ("chat 0 é", "deleted", "replaced"):
            saver.delete_thread(thread)
        make.put(saver, "replaced", {"c": ["other"]}, versions={"c": "2.0"}, id=TWO)


def followed(source: Path, target: Target) -> str:
    """A run with two rounds and a cut-over; gives its id."""
    follow_for(source, target.dsn, 1)
    change(source)
    follow_for(source, target.dsn, 1)
    with make.database(source) as saver:
        make.put(saver, "added", {"c": ["third"]}, versions={"c": "3.0"}, parent=TWO)
    return transfer.cut_over(source, target.dsn).run_id


def test_nothing_of_the_run_is_left_and_all_else_is(source: Path, target: Target) -> None:
    target.chat(THEIRS)
    before = target.rows()
    run = followed(source, target)
    held = target.keys()
    target.chat("chat 8 later")
    later = target.keys()

    undone = transfer.undo(run, target.dsn)
    assert undone.followed == f"sqlite:///{source}"
    assert target.keys() == {name: keys - held[name] | theirs(held)[name] for name, keys in later.items()}
    assert undone.checkpoints == len(held["checkpoints"] - theirs(held)["checkpoints"])
    with target.official() as saver:
        saver.delete_thread("chat 8 later")
    assert target.rows() == before

    # The source is as it was, and can be moved once more.
    assert transfer.unseal(source)
    with make.database(source) as saver:
        make.put(saver, "new", {"c": ["newer"]})
    follow_for(source, target.dsn, 1)
    again = transfer.cut_over(source, target.dsn).run_id
    assert again != run
    assert transfer.verify(source, target.dsn, subset=True).equal
    transfer.undo(again, target.dsn)
    assert target.rows() == before


def theirs(keys: dict[str, set[tuple[Any, ...]]]) -> dict[str, set[tuple[Any, ...]]]:
    return {name: {key for key in found if key[0] == THEIRS} for name, found in keys.items()}


def test_what_the_run_deleted_itself_is_somebody_elses(source: Path, target: Target, tmp_path: Path) -> None:
    """The very rows that the first copy brought, there again since: row for row equal, and not the run's."""
    shutil.copy(source, tmp_path / "first.db")
    run = followed(source, target)
    again = ("deleted", "replaced")
    options = transfer.Options(select=transfer.Selection(threads=again), on_conflict="merge")
    transfer.migrate(tmp_path / "first.db", target.dsn, options=options)
    transfer.undo(run, target.dsn)
    left = {name: sorted(row[:3] for row in found) for name, found in target.rows().items()}
    assert left["checkpoints"] == [(thread, "", ONE) for thread in again]
    writes = left["writes" if "writes" in left else "checkpoint_writes"]
    assert writes == [(thread, "", ONE) for thread in again for _ in range(2)]


def test_later_work_that_builds_on_a_round(source: Path, postgres_dsn: str) -> None:
    target = Target(postgres_dsn)
    run = followed(source, target)
    with target.official() as saver:
        make.put(saver, "added", {}, parent=TWO)
    after = target.rows()
    with pytest.raises(ConflictError, match=r"later work .* builds on run .*thread 'added'"):
        transfer.undo(run, target.dsn)
    assert target.rows() == after
    kept = transfer.undo(run, target.dsn, later="keep")
    assert kept.kept_threads == 1
    for name, found in after.items():
        assert target.rows()[name] == [row for row in found if row[0] == "added"]
    transfer.unseal(source)
    with pytest.raises(ConflictError, match="already has thread 'added'"):
        follow_for(source, target.dsn, 1)


def test_a_write_that_the_run_deleted_itself_is_later_work(source: Path, target: Target) -> None:
    run = followed(source, target)
    with target.official() as saver:
        put_writes(saver, "written")  # the second of them
    with pytest.raises(ConflictError, match=r"thread 'written' .*write 1 of task"):
        transfer.undo(run, target.dsn)
    assert transfer.undo(run, target.dsn, later="remove").later_removed == 1
    assert not any(target.rows().values())


def test_a_first_copy_that_was_interrupted(source: Path, file: Target, stop: transfer.Progress) -> None:
    with pytest.raises(KeyboardInterrupt):
        transfer.follow(source, file.dsn, progress=stop)
    assert file.rows()["checkpoints"]
    transfer.undo("last", file.dsn)
    assert not any(file.rows().values())


def test_a_ledger_without_the_keys_of_a_round(source: Path, file: Target) -> None:
    """One that an older version made."""
    run = followed(source, file)
    file.execute("DELETE FROM persistence_followed_keys WHERE thread_id = 'new'")
    before = file.rows()
    with pytest.raises(TransferError, match="did not note which rows"):
        transfer.undo(run, file.dsn)
    assert file.rows() == before


def test_half_undone(source: Path, file: Target, capsys: pytest.CaptureFixture[str]) -> None:
    run = followed(source, file)
    file.execute("UPDATE persistence_transfers SET state = 'undoing'")
    with pytest.raises(ConflictError, match=r"half undone.*persistence undo"):
        follow_for(source, file.dsn, 1)
    assert cli(["undo", run, "--dsn", file.dsn]) == 0
    assert f"`persistence unseal sqlite:///{source}` lets it be written again" in capsys.readouterr().out
    assert not any(file.rows().values())
