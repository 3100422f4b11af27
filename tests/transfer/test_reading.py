"""What several processes read is exactly what one reads, in all that is said of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from persistence import transfer
from persistence.backends.postgres.transfer_preflight import PostgresPreflight
from persistence.errors import SourceError, TransferError
from persistence.registry import provider_for
from persistence.transfer import Options, Selection, reading, workers
from persistence.transfer.engine import Clock, Scan, look
from persistence.transfer.included import included
from persistence.transfer.preflight import Findings
from persistence.transfer.reading import Looking, Pieces
from persistence.transfer.records import Preflight, Source
from persistence.transfer.report import Totals, no_progress
from persistence.transfer.selection import without
from persistence.transfer.spool import Entry, Spool
from persistence.transfer.workers import ALONE, Crew
from tests.transfer import make
from tests.transfer.conftest import rows

DIES = """import sys; sys.path[:] = {path!r}
import os, signal
from persistence.transfer import copying, reading, workers
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
WHERE = die
workers.main()"""


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something of everything that a reading notes, in more threads than are given as examples."""
    path = tmp_path_factory.mktemp("varied") / "chat.db"
    with make.database(path) as saver:
        for number in range(14):
            thread = f"thread {number:02} é"
            # Under one version several values, with and without bytes of their own.
            for step in range(3):
                values = {"c": ["x" * (step % 2)], "n": step, "same": ["y" * 40], "none": [step]}
                make.put(saver, thread, values, versions={"c": "1", "n": "1", "same": "2"}, id=f"{step}", v=4)
            make.put(saver, thread, {"c": [number % 5]}, ns="sub", id="own", parent="own", v=3)
            make.put(saver, thread, {}, ns="sub", id="a", parent="b")
            make.put(saver, thread, {}, ns="sub", id="b", parent="a")
            make.put(saver, thread, {"c\0": 1}, ns="sub|task", id="lost", parent="missing")
            for step in range(2):  # and in the namespace that is the last one
                make.put(saver, thread, {"c": ["x" * step]}, versions={"c": "1"}, ns="sub|z", id=f"{step}")
            for checkpoint, task in (("0", "task"), ("gone", "back\\slash")):
                config: Any = {
                    "configurable": {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": checkpoint}
                }
                saver.put_writes(config, [("c", {"w" * number})], task)
            if number % 3 == 0:
                make.put(saver, thread, {"c": ["z" * 3000]}, id="large")
        saver.conn.execute("UPDATE writes SET type = 'pickle' WHERE thread_id LIKE '%3 é'")
        saver.conn.execute("UPDATE checkpoints SET checkpoint = x'c1' WHERE rowid % 11 = 0")
        saver.conn.execute("UPDATE writes SET idx = 3000000000 WHERE rowid % 5 = 0")
        saver.conn.commit()
    return path


@pytest.fixture
def clean(varied: Path, tmp_path: Path) -> Path:
    """The same without what cannot be moved."""
    path = Path(shutil.copy(varied, tmp_path / "clean.db"))
    make.execute(path, "DELETE FROM writes WHERE type = 'pickle' OR idx > 9 OR task_id = 'back\\slash'")
    make.execute(path, "DELETE FROM checkpoints WHERE checkpoint = x'c1' OR checkpoint_id = 'lost'")
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one thread."""
    monkeypatch.setattr(reading, "_FIRST", 1)
    monkeypatch.setattr(reading, "_MOST", 1)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Whoever reads here waits after its first piece until others have done some, too."""
    crews: list[Crew] = []
    enter, original = Crew.__enter__, Looking._look
    seen: list[int] = []

    def entered(crew: Crew) -> Crew:
        crews.append(crew)
        return enter(crew)

    def patient(self: Looking, source: Source, threads: Sequence[str], tell: workers.Tell) -> Any:
        found = original(self, source, threads, tell)
        work = crews[-1]._round
        while work is not None and not seen:
            tell(Totals())
            seen.extend(number for number in work.results if number not in seen)
            time.sleep(0.005)
        return found

    monkeypatch.setattr(Crew, "__enter__", entered)
    monkeypatch.setattr(Looking, "_look", patient)
    yield seen


def scanned(source: Source, preflight: Preflight, crew: Crew) -> tuple[Scan, list[Entry]]:
    with Spool() as spool:
        return look(source, spool, Clock(no_progress), preflight, crew=crew), list(spool.entries())


def few(source: Source) -> Source:
    """As a selection and threads that are skipped make it."""
    return without(included(source, Options(select=Selection(match=["*1*"]))), ["thread 11 é"])


@pytest.mark.parametrize("chosen", [lambda source: source, few])
def test_several_read_what_one_reads(
    varied: Path,
    postgres_dsn: str,
    tmp_path: Path,
    small: None,
    shares: list[int],
    chosen: Callable[[Source], Source],
) -> None:
    with ExitStack() as stack:
        source = chosen(stack.enter_context(provider_for(f"sqlite:///{varied}").source(allow_pickle=True)))
        crew = stack.enter_context(Crew(2))
        sinks = [
            stack.enter_context(provider_for(dsn).sink())
            for dsn in (postgres_dsn, f"sqlite:///{tmp_path}/target.db")
        ]
        problems = set[str]()
        for make_one in (Findings, *(sink.preflight for sink in sinks)):
            one, other = make_one(), make_one()
            shares.clear()
            alone = scanned(source, one, ALONE)
            assert scanned(source, other, crew) == alone
            problems.update(problem.reason for problem in alone[0].problems)
            assert shares, "the other process has read nothing"
            if isinstance(one, PostgresPreflight) and isinstance(other, PostgresPreflight):
                assert other._versions._special == one._versions._special != {}
                assert other._versions._carrying == one._versions._carrying
        assert len(problems) > 3
        kinds = {finding.kind for finding in alone[0].findings}
        assert kinds >= {"changed-in-place", "no-version", "old-format", "orphaned-write", "own-parent"}
        assert kinds >= {"parent-cycle", "parent-missing"}


def test_a_postgres_source(varied: Path, postgres_dsn: str, small: None, shares: list[int]) -> None:
    options = Options(on_reject="set-aside", allow_pickle=True, workers=1)
    transfer.migrate(varied, postgres_dsn, options=options)
    provider = provider_for(postgres_dsn)
    with provider.source(allow_pickle=True) as source, provider.sink() as sink, Crew(2) as crew:
        one, other = sink.preflight(), sink.preflight()
        assert scanned(source, other, crew) == scanned(source, one, ALONE)
    assert shares
    assert isinstance(one, PostgresPreflight)
    assert isinstance(other, PostgresPreflight)
    assert other._versions._special == one._versions._special != {}
    assert other._versions._carrying == one._versions._carrying != set()


def test_progress_moves(varied: Path, small: None, shares: list[int]) -> None:
    """Also for what others read; in the end all of it was told."""
    told: list[tuple[int, int]] = []
    with provider_for(f"sqlite:///{varied}").source() as source, Crew(2) as crew, Spool() as spool:
        clock = Clock(lambda phase, done, total, size: told.append((done, size)))
        found = look(source, spool, clock, Findings(), crew=crew)
    assert told == sorted(told)
    assert told[-1] == (found.totals.checkpoints, found.totals.bytes)
    assert len(set(told)) > 10


def test_the_error_of_a_reader(varied: Path, tmp_path: Path, small: None, shares: list[int]) -> None:
    """A file that somebody writes to meanwhile."""
    path = Path(shutil.copy(varied, tmp_path / "chat.db"))
    with (
        provider_for(f"sqlite:///{path}").source() as source,
        Crew(2) as crew,
        Spool() as spool,
        pytest.raises(SourceError, match="was written to while it was read"),
    ):
        clock = Clock(no_progress)
        threads = source.threads

        def traced() -> Iterator[str]:
            for number, thread in enumerate(threads()):
                if number == 5:
                    make.execute(path, "DELETE FROM writes")
                yield thread

        source.threads = traced  # type: ignore[method-assign]
        look(source, spool, clock, Findings(), crew=crew)


def wait_for_the_end(*args: Any) -> Any:
    """A piece that is never done: only the end of a worker is told of meanwhile."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        args[-1](Totals())
        time.sleep(0.01)


def test_a_killed_worker(
    clean: Path, postgres_dsn: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each phase: the same clear error, and the next run goes on."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    monkeypatch.setattr("persistence.transfer.engine.SEGMENT_BATCHES", 1)
    for function in ("reading.Looking._look", "copying._move", "reading._digest"):
        with monkeypatch.context() as patch:
            patch.setattr(workers, "_PROGRAM", DIES.replace("WHERE", function))
            patch.setattr(f"persistence.transfer.{function}", wait_for_the_end)
            with pytest.raises(TransferError, match="a worker of the transfer ended"):
                transfer.migrate(clean, postgres_dsn, options=Options(workers=2))
    assert [run.state for run in transfer.runs(postgres_dsn)] == ["copied"]
    assert transfer.migrate(clean, postgres_dsn, options=Options(workers=2)).verified
    transfer.migrate(clean, f"{postgres_dsn}&schema=alone", options=Options(workers=1))
    assert rows(postgres_dsn) == rows(postgres_dsn, "alone")


def test_comparisons(clean: Path, tmp_path: Path, small: None) -> None:
    """The verdict does not depend on the number of processes."""
    other = Path(shutil.copy(clean, tmp_path / "other.db"))
    make.execute(other, "UPDATE checkpoints SET metadata = '{}' WHERE thread_id LIKE '%1%'")
    for table in ("checkpoints", "writes"):
        make.execute(other, f"DELETE FROM {table} WHERE thread_id LIKE '%05%'")
    alone = transfer.verify(clean, other, workers=1)
    assert transfer.verify(clean, other, workers=2) == alone
    assert alone.differing_threads > 3


def test_results_are_in_order_and_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does a piece that takes long does not have all others pile up."""
    monkeypatch.setattr(workers, "_AHEAD", 4)
    taken: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    def long(piece: int, tell: workers.Tell) -> int:
        quiet, deadline = 0, time.monotonic() + 60
        while piece == 0 and quiet < 30 and time.monotonic() < deadline:  # until nobody takes another one
            tell(Totals())
            time.sleep(0.01)
            quiet += len(taken) >= 4
        if piece == 0:
            assert taken == [0, 1, 2, 3]
        return piece * 2

    class Long:
        def begun(self) -> Any:
            return workers.itself(long)()

    with Crew(2) as crew:
        given = [
            (done.piece, done.result) for done in crew.each(Long(), Doubling(), pieces(), lambda totals: None)
        ]
    assert given == [(number, number * 2) for number in range(20)]


class Doubling:
    """A job that can be sent."""

    def begun(self) -> Any:
        return workers.itself(double)()


def double(piece: int, tell: workers.Tell) -> int:
    tell(Totals())
    return piece * 2


def test_nobody_is_started_for_little(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unasked, and with little to do; with much to do somebody is."""
    started: list[int] = []
    worker = workers._worker

    def traced(lent: Sequence[int]) -> Any:
        started.append(1)
        return worker(lent)

    monkeypatch.setattr(workers, "_worker", traced)
    monkeypatch.setattr(workers, "_PATIENCE", 60.0)
    monkeypatch.setattr(workers, "sensible", lambda asked: asked or 2)
    assert transfer.verify(clean, clean).equal
    assert started == []
    monkeypatch.setattr(workers, "_PATIENCE", 0.0)
    assert transfer.verify(clean, clean).equal
    assert started == [1]


def test_pieces_grow_until_they_take_a_moment() -> None:
    class Database:
        divisible = True

    pieces = Pieces(map(str, range(10_000)), Database())  # type: ignore[arg-type]
    sizes = []
    for piece, seconds in zip(pieces, [0.01] * 3 + [1.0] * 2 + [4.0] + [1.0] * 2, strict=False):
        sizes.append(len(piece))
        pieces.took(piece, seconds)
    assert sizes == [1, 2, 4, 8, 8, 8, 4, 4]
