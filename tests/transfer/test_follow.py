"""Followed while an application goes on writing, the target ends up equal, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psycopg
import pytest
from langgraph.checkpoint.base import CheckpointTuple

from persistence import transfer
from persistence.errors import ConflictError, UnsupportedError
from persistence.transfer.preflight import RefusedError
from tests.support import COMMAND, ROOT, clean_environment
from tests.transfer import graphs, make
from tests.transfer.conftest import (
    by_thread,
    postgres_tuples,
    rows,
    sqlite_tuples,
    without_carried_snapshots,
)

FOLLOW = [COMMAND, "migrate", "--follow"]
KILLS = int(os.environ.get("FOLLOW_KILLS", "2"))


class Writer:
    """A process of :mod:`tests.transfer.writer`, and what it was told is stored."""

    module = "tests.transfer.writer"

    def __init__(self, path: Path | str, kind: str) -> None:
        self.acknowledged: dict[str, set[str]] = {}
        self.lines = 0
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", self.module, str(path), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=clean_environment(),
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.wait_for(3)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            match line.rstrip("\n").rsplit(" ", 4):
                case ["+", *thread, checkpoint]:
                    self.acknowledged.setdefault(" ".join(thread), set()).add(checkpoint)
                case ["-", *thread]:
                    self.acknowledged.pop(" ".join(thread), None)
            self.lines += 1

    def wait_for(self, more: int) -> None:
        """Until it has written something more."""
        wanted = self.lines + more
        while self.lines < wanted:
            assert self._process.poll() is None
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end, if the seal has not made it, and check that nothing but that happened to it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def kill(command: Sequence[str], seconds: float) -> bool:
    """Run a command and kill it after so many seconds; whether it had not come to its end."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean_environment()
    ) as process:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        output, _ = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), output
    return process.returncode != 0


def follow_for(
    source: Path | str, target: str, rounds: int, then: Callable[[transfer.Round], None] | None = None
) -> None:
    """Follow until so many rounds were done."""
    stop = threading.Event()
    done = 0

    def told(found: transfer.Round) -> None:
        nonlocal done
        done += 1
        if then is not None:
            then(found)
        if done >= rounds:
            stop.set()

    transfer.follow(source, target, interval=0.1, stop=stop, told=told)


def plain(tuples: list[CheckpointTuple]) -> dict[str, list[CheckpointTuple]]:
    return by_thread([without_carried_snapshots(item) for item in tuples])


def require_equal(source: Path, target: str) -> None:
    """By our digests, and by what the official savers of both sides list."""
    assert transfer.verify(source, target).differences == []
    assert plain(sqlite_tuples(source)) == plain(postgres_tuples(target))


def require_acknowledged(writer: Writer, target: str) -> None:
    there = {
        (item.config["configurable"]["thread_id"], item.checkpoint["id"]) for item in postgres_tuples(target)
    }
    wanted = {(thread, id_) for thread, ids in writer.acknowledged.items() for id_ in ids}
    assert wanted
    assert wanted <= there


@pytest.mark.parametrize("kind", ["official", "ours"])
def test_an_application_goes_on_writing(kind: str, database: Path, postgres_dsn: str) -> None:
    with Writer(database, kind) as writer:
        follow_for(database, postgres_dsn, 4, lambda _: writer.wait_for(5))
        writer.wait_for(5)
        done = transfer.cut_over(database, postgres_dsn)
    assert done.sealed
    require_equal(database, postgres_dsn)
    require_acknowledged(writer, postgres_dsn)
    transfer.undo(done.run_id, postgres_dsn)
    assert not any(rows(postgres_dsn).values())
    assert done.last is not None
    sys.stdout.write(f"{kind}: write pause {done.pause_seconds:.3f} s with {done.last.rows} rows left\n")


def test_into_a_file(database: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    with Writer(database, "official") as writer:
        follow_for(database, f"sqlite:///{target}", 3, lambda _: writer.wait_for(5))
        transfer.cut_over(database, f"sqlite:///{target}")
    assert transfer.verify(database, target).differences == []
    assert by_thread(sqlite_tuples(database)) == by_thread(sqlite_tuples(target))


def test_killed_at_random_instants(database: Path, postgres_dsn: str) -> None:
    choose = random.Random(17)  # noqa: S311 - instants, not secrets
    with Writer(database, "official") as writer:
        for _ in range(KILLS):
            command = [*FOLLOW, "--follow-interval", "0.1", f"sqlite:///{database}", postgres_dsn]
            assert kill(command, choose.uniform(0.6, 3.0))
        writer.wait_for(5)
        transfer.cut_over(database, postgres_dsn)
    require_equal(database, postgres_dsn)
    require_acknowledged(writer, postgres_dsn)


def test_the_second_is_refused(database: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.backends.postgres.transfer_sink._LOCK_WAIT", 0.3)

    def another(_: transfer.Round) -> None:
        with pytest.raises(ConflictError, match="under way"):
            transfer.follow(database, postgres_dsn)
        with pytest.raises(ConflictError, match="under way"):
            transfer.cut_over(database, postgres_dsn)

    follow_for(database, postgres_dsn, 1, another)
    assert not transfer.follow(database, postgres_dsn, stop=stopped()).last.rows


def stopped() -> threading.Event:
    """An end after the first round."""
    stop = threading.Event()
    stop.set()
    return stop


def test_rows_at_rowids_that_were_free_again(database: Path, postgres_dsn: str) -> None:
    """The newest conversation is deleted and made again: the same keys, the same rowids, another content."""
    with make.database(database) as saver:
        make.put(saver, "zz", {"c": ["first"]}, id="1f0")
        follow_for(database, postgres_dsn, 1)
        saver.delete_thread("zz")
        make.put(saver, "zz", {"c": ["other"]}, id="1f0")
    follow_for(database, postgres_dsn, 1)
    require_equal(database, postgres_dsn)


def test_a_file_that_was_vacuumed(database: Path, postgres_dsn: str) -> None:
    follow_for(database, postgres_dsn, 1)
    with make.database(database) as saver:
        saver.delete_thread("chat 0 é")
        make.put(saver, "a", {"c": ["new"]})
    make.execute(database, "VACUUM")
    follow_for(database, postgres_dsn, 1)
    require_equal(database, postgres_dsn)


def test_only_what_was_added_is_written(database: Path, postgres_dsn: str) -> None:
    follow_for(database, postgres_dsn, 1)
    seen: list[transfer.Round] = []
    with make.database(database) as saver:
        make.put(saver, "log", {"c": ["new"]})
        follow_for(database, postgres_dsn, 1, seen.append)
        saver.put_writes(graphs.config("log"), [], "none")
    assert [(r.threads, r.rows) for r in seen] == [(1, 1)]
    make.execute(database, "UPDATE writes SET value = x'c0' WHERE thread_id = 'log' AND rowid % 2 = 0")
    follow_for(database, postgres_dsn, 1)
    require_equal(database, postgres_dsn)


def test_somebody_else_wrote_to_the_target(database: Path, postgres_dsn: str) -> None:
    follow_for(database, postgres_dsn, 1)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("DELETE FROM checkpoint_writes WHERE thread_id = 'log'")
    with make.database(database) as saver:
        make.put(saver, "log", {"c": ["new"]})
    with pytest.raises(ConflictError, match=r"'log' .* not as this transfer left it"):
        follow_for(database, postgres_dsn, 1)


def test_a_migration_does_not_end_a_run_that_follows(database: Path, tmp_path: Path) -> None:
    """Else a cut-over would find nothing to do, and leave behind what is written until then."""
    target = f"sqlite:///{tmp_path / 'target.db'}"
    follow_for(database, target, 1)
    with pytest.raises(ConflictError, match=r"follows this source .*cut-over"):
        transfer.migrate(database, target)
    assert [found.severity for found in transfer.plan(database, target).findings].count("conflict") == 1
    with make.database(database) as saver:
        make.put(saver, "log", {"c": ["new"]})
    assert not transfer.cut_over(database, target).already_done
    assert transfer.verify(database, target).equal


def test_a_thread_that_the_run_did_not_bring(database: Path, postgres_dsn: str) -> None:
    with make.database(database.with_name("other.db")) as other:
        make.put(other, "theirs", {"c": ["theirs"]})
    transfer.migrate(database.with_name("other.db"), postgres_dsn)
    follow_for(database, postgres_dsn, 1)
    before = rows(postgres_dsn)
    with make.database(database) as saver:
        make.put(saver, "theirs", {"c": ["ours"]})
    with pytest.raises(ConflictError, match="'theirs'"):
        follow_for(database, postgres_dsn, 1)
    assert rows(postgres_dsn) == before


def test_what_the_target_cannot_hold_stops_it(database: Path, postgres_dsn: str) -> None:
    follow_for(database, postgres_dsn, 1)
    bad = "INSERT INTO writes VALUES ('bad', '', '1', 't', '', 1 << 40, 'c', 'msgpack', x'c0')"
    make.execute(database, bad)
    with pytest.raises(RefusedError, match=r"out of range.*goes on"):
        follow_for(database, postgres_dsn, 1)
    with make.database(database) as saver:
        saver.delete_thread("bad")
    follow_for(database, postgres_dsn, 1)
    require_equal(database, postgres_dsn)


def test_what_cannot_be_followed(database: Path, postgres_dsn: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    transfer.export(database, archive)
    for side in (archive, "memory://"):
        for move in (transfer.follow, transfer.cut_over):
            with pytest.raises(UnsupportedError, match=r"cannot be followed.*persistence (import|migrate)"):
                move(side, postgres_dsn)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number: signal.Signals, database: Path, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path / 'target.db'}"
    process = subprocess.Popen(
        [*FOLLOW, f"sqlite:///{database}", target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    with process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("round 1: "))
        assert line.rstrip().endswith(" s behind")
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "stopped; the same command goes on" in output
    assert transfer.verify(database, tmp_path / "target.db").equal


def test_a_state_changed_in_place_by_the_graph(database: Path, postgres_dsn: str) -> None:
    """Another value under the version of one that has arrived: all of the thread tells which is the blob."""
    with make.database(database) as saver:
        make.put(saver, "mutated", {"c": ["first"]})
        follow_for(database, postgres_dsn, 1)
        make.put(saver, "mutated", {"c": ["second"]})
        make.put(saver, "mutated", {}, versions={"c": "1.0"})
    follow_for(database, postgres_dsn, 1)
    assert transfer.verify(database, postgres_dsn).differences == []
