"""Rows that cannot be moved are set aside, said, and moved once the cause is mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

from persistence import transfer
from persistence.cli.app import run as cli
from persistence.errors import ConfigurationError, TransferError
from tests.transfer import graphs, make
from tests.transfer.targets import Target
from tests.transfer.test_refusals import CASES, config

ASIDE = transfer.Options(on_reject="set-aside")
FOR_POSTGRES_ONLY = ("nul_", "backslash_", "long_", "no_format")


def rows_of(found: dict[str, list[Any]], thread: str) -> list[Any]:
    return [row for rows in found.values() for row in rows if row[0] == thread]


@pytest.mark.parametrize("make_bad", CASES, ids=[case.__name__ for case in CASES])
def test_the_others_move(tmp_path: Path, target: Target, make_bad: Callable[[SqliteSaver], None]) -> None:
    if "sqlite" in target.dsn and make_bad.__name__.startswith(FOR_POSTGRES_ONLY):
        return  # SQLite can hold it
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "a good one", {"c": [1]})
        make.put(saver, "good too", {"c": [2], "d": "text"})
        make_bad(saver)
    report = transfer.migrate(path, target.dsn, options=ASIDE)
    assert report.verified
    assert report.set_aside >= 1
    assert all("bad" in one or "b" * 99 in one for one in report.rejects)
    assert {key[0] for key in target.keys()["checkpoints"]} >= {"a good one", "good too"}
    rejects = transfer.rejects("last", target.dsn)
    assert len(rejects) == report.set_aside
    assert all(one.thread_id.startswith("b") for one in rejects)
    again = transfer.migrate(path, target.dsn, options=ASIDE)
    assert again.already_done
    assert again.set_aside == report.set_aside


def test_a_damaged_row_is_moved_once_it_is_mended(tmp_path: Path, target: Target) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for thread in ("t", "u"):
            graphs.chat(saver).invoke({"messages": ["one"]}, graphs.config(thread))
        last = saver.get_tuple(graphs.config("t"))
        assert last is not None
        damaged = last.config["configurable"]["checkpoint_id"]
        whole = saver.conn.execute(
            "SELECT checkpoint FROM checkpoints WHERE thread_id = 't' AND checkpoint_id = ?", (damaged,)
        ).fetchone()[0]
    update = "UPDATE checkpoints SET checkpoint = ? WHERE thread_id = 't' AND checkpoint_id = ?"
    make.execute(path, update, whole[:60], damaged)

    report = transfer.migrate(path, target.dsn, options=ASIDE)
    assert (report.set_aside, report.verified) == (1, True)
    assert damaged in report.rejects[0]
    still = transfer.retry_rejects("last", path, target.dsn)
    assert still.set_aside == 1
    make.execute(path, update, whole, damaged)
    done = transfer.retry_rejects("last", path, target.dsn)
    assert (done.set_aside, done.verified) == (0, True)
    assert transfer.verify(path, target.dsn).equal
    with pytest.raises(TransferError, match="nothing aside"):
        transfer.retry_rejects(str(still.run_id), path, target.dsn)


def test_what_was_mended_can_be_undone_alone(tmp_path: Path, target: Target) -> None:
    """The row's children came before it, with the first run, and are no later work."""
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        graphs.chat(saver).invoke({"messages": ["one"]}, graphs.config("t"))
    first = "(SELECT min(checkpoint_id) FROM checkpoints)"
    make.execute(path, f"UPDATE checkpoints SET type = 'odd' WHERE checkpoint_id = {first}")
    run = transfer.migrate(path, target.dsn, options=ASIDE).run_id
    before = target.rows()
    make.execute(path, "UPDATE checkpoints SET type = 'msgpack'")
    assert transfer.retry_rejects("last", path, target.dsn).verified
    assert transfer.verify(path, target.dsn).equal
    assert transfer.undo("last", target.dsn).checkpoints == 1
    assert target.rows() == before
    transfer.undo(str(run), target.dsn)
    assert not any(target.rows().values())


def test_values_that_only_such_checkpoints_use_stay_behind(tmp_path: Path, target: Target) -> None:
    if "sqlite" in target.dsn:
        return  # it can hold them all
    path = tmp_path / "a.db"
    long_id = "b" * 3000
    with make.database(path) as saver:
        make.put(saver, "alone", {"c": [1]}, id=long_id)
        first = {"own": "1", "shared": "1"}
        make.put(saver, "some", {"own": [1], "shared": [2]}, versions=first, id="0")
        make.put(saver, "some", {"own": [3], "shared": [2]}, versions=first | {"own": "2"}, id=f"1{long_id}")
        make.put(saver, "some", {"own": [4], "shared": [2]}, versions=first | {"own": "3"}, id="2")
        make.put(saver, "later", {"own": [1], "shared": [2]}, versions=first, id=f"1{long_id}")
        make.put(saver, "later", {"own": [3], "shared": [2]}, versions=first | {"own": "2"}, id="2")
    report = transfer.migrate(path, target.dsn, options=ASIDE)
    assert (report.set_aside, report.verified) == (3, True)
    assert sorted(key[::2] + key[3:] for key in target.keys()["checkpoint_blobs"]) == [
        ("later", "own", "2"),
        ("later", "shared", "1"),
        ("some", "own", "1"),
        ("some", "own", "3"),
        ("some", "shared", "1"),
    ]


def test_what_it_held_is_kept(tmp_path: Path, target: Target) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        saver.put_writes(config("bad"), [("c", "the content")], "task")
        saver.conn.execute("UPDATE writes SET type = 'strange'")
        saver.conn.commit()
    transfer.migrate(path, target.dsn, options=ASIDE)
    from persistence.registry import provider_for

    with provider_for(target.dsn).sink() as sink:
        (row,) = sink.ledger()._tables.query("SELECT raw FROM persistence_transfer_rejects")
    assert b"the content" in bytes(row[0])


def test_it_reads_no_more_than_it_must(tmp_path: Path, target: Target) -> None:
    """Once to find the rows, with progress, and then only the threads that have such rows."""
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for number in range(70):
            make.put(saver, f"good {number}", {"c": [1]})
        make.put(saver, "bad", {"c": [1]})
        saver.put_writes(config("bad"), [("c", 1)], "task")
    told: list[tuple[int, int]] = []

    def tell(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        if phase == "rejects":
            told.append((done, total))

    assert transfer.migrate(path, target.dsn, options=ASIDE, progress=tell).set_aside == 0
    assert told == [(0, 71), (64, 71), (71, 71)]
    transfer.undo("last", target.dsn)
    make.execute(path, "UPDATE writes SET type = 'strange'")
    told.clear()
    report = transfer.migrate(path, target.dsn, options=ASIDE, progress=tell)
    assert (report.set_aside, report.verified, "rejects" in report.phases) == (1, True, True)
    assert told == [(0, 71), (64, 71), (71, 71), (0, 1), (1, 1)]


def test_an_archive_sets_nothing_aside(tmp_path: Path, target: Target) -> None:
    with pytest.raises(ConfigurationError, match="archive cannot set rows aside"):
        transfer.migrate(tmp_path / "a.db", target.dsn, archive=tmp_path / "b", options=ASIDE)


def test_the_command_never_says_success(
    tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "good", {"c": [1]})
        saver.put_writes(config("bad"), [("c", 1)], "task")
        saver.conn.execute("UPDATE writes SET type = 'strange'")
        saver.conn.commit()
    argv = ["migrate", f"sqlite:///{path}", target.dsn]
    assert cli(argv) == 6
    assert cli([*argv, "--on-reject", "set-aside", "--report", str(tmp_path / "report.html")]) == 6
    out = capsys.readouterr().out
    assert "migrated in part: 1 rows are set aside" in out
    assert "set aside: thread 'bad'" in out
    assert "'strange'" in out
    assert "in part" in (tmp_path / "report.html").read_text()
    assert cli(["rejects", "last", "--dsn", target.dsn]) == 0
    assert "thread 'bad'" in capsys.readouterr().out
    make.execute(path, "UPDATE writes SET type = 'msgpack'")
    assert cli(["retry-rejects", "last", f"sqlite:///{path}", "--dsn", target.dsn]) == 0
    assert "moved, verified" in capsys.readouterr().out
    assert transfer.verify(path, target.dsn).equal
