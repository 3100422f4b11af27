"""As ``test_batches``, for threads: operations that share a round trip and a commit on Postgres."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import errors
from psycopg_pool import PoolTimeout

import persistence
from persistence.backends.postgres import conflicts, steps
from persistence.backends.postgres import threads as threads_module
from persistence.backends.postgres.connection import make_pool
from persistence.backends.postgres.threads import ThreadBatches, _Batch
from persistence.dsn import Dsn
from persistence.errors import ConnectError
from persistence.settings import Settings
from persistence.testing.subject import at, bare
from tests.ops.test_batches import (
    _DIVIDE,
    _HOLD,
    _ID,
    _INSERT,
    _PATIENCE,
    _POOL,
    _SLOW,
    VICTIM,
    held_up,
    never_stuck,
    pauses,
    stored,
    watch,
)
from tests.ops.test_lost import KILL

__all__ = ["never_stuck", "pauses", "watch"]

_THREADS = 80


@pytest.fixture
def batches(
    request: pytest.FixtureRequest, postgres_dsn: str, watch: psycopg.Connection[Any]
) -> Iterator[ThreadBatches]:
    """With ``False``, as behind PgBouncer: nothing is prepared."""
    pgbouncer = not getattr(request, "param", True)
    settings = Settings(pool_min=_POOL, pool_max=_POOL, pool_timeout=_PATIENCE, pgbouncer=pgbouncer)
    with make_pool(Dsn.parse(postgres_dsn), settings) as pool:
        pool.wait(_PATIENCE)
        yield ThreadBatches(pool)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield pool


class Busy:
    """Connections that are in use until all who come meanwhile wait, or until :meth:`end`."""

    def __init__(
        self, batches: ThreadBatches, threads: ThreadPoolExecutor, watch: psycopg.Connection[Any]
    ) -> None:
        self.batches = batches
        self._threads = threads
        self._watch = watch
        self._held: list[Future[Any]] = []

    def begin(self, number: int = _POOL) -> None:
        self._watch.execute("SELECT pg_advisory_lock(1)")
        for already in range(number):
            self._held.append(self._threads.submit(self.batches.read, (_HOLD, {})))
            while held_up(self._watch) <= already:  # on the server: else the next one could go along
                time.sleep(0.001)

    def end(self, waiting: int = 0) -> None:
        while len(self.batches._reads) + len(self.batches._writes) < waiting:
            time.sleep(0.001)
        self._watch.execute("SELECT pg_advisory_unlock(1)")
        for one in self._held:
            one.result()


@pytest.fixture
def busy(batches: ThreadBatches, threads: ThreadPoolExecutor, watch: psycopg.Connection[Any]) -> Busy:
    return Busy(batches, threads, watch)


def insert(
    batches: ThreadBatches, threads: ThreadPoolExecutor, *ids: int, key: Any = None
) -> list[Future[Any]]:
    return [threads.submit(batches.write, (_INSERT, {"id": id_}), key) for id_ in ids]


def ended(tasks: list[Future[Any]]) -> list[Any]:
    return [task.exception(_PATIENCE) or task.result() for task in tasks]


prepared_or_not = pytest.mark.parametrize("batches", [True, False], indirect=True)


@prepared_or_not
def test_those_who_wait_share_a_transaction_and_one_key_is_written_once_in_it(
    batches: ThreadBatches,
    threads: ThreadPoolExecutor,
    watch: psycopg.Connection[Any],
    busy: Busy,
    never_stuck: None,
) -> None:
    for _ in range(3):
        busy.begin()
        tasks = insert(batches, threads, *range(40))
        same = insert(batches, threads, *range(40, 43), key=("thread", "ns", "id"))
        busy.end(waiting=43)
        assert [rows[0][0] for rows in ended(tasks)] == list(range(40))
        assert len({rows[0][1] for rows in ended(tasks)}) < 9
        assert len({rows[0][1] for rows in ended(same)}) == 3
    assert stored(watch) == sorted([*range(43)] * 3)
    assert batches._busy == 0


@prepared_or_not
def test_a_failure_stays_alone(
    batches: ThreadBatches, threads: ThreadPoolExecutor, watch: psycopg.Connection[Any], busy: Busy
) -> None:
    busy.begin()
    bad = [threads.submit(batches.write, (_DIVIDE, {"id": 0})) for _ in range(3)]
    good = insert(batches, threads, *range(20))
    broken = [threads.submit(batches.read, ("SELECT nonsense", {})) for _ in range(2)]
    reads = [threads.submit(batches.read, (_ID, {"id": id_})) for id_ in range(20)]
    busy.end(waiting=45)
    assert [type(error) for error in ended(bad)] == [errors.DivisionByZero] * 3
    assert [rows[0][0] for rows in ended(good)] == list(range(20))
    assert [type(error) for error in ended(broken)] == [errors.UndefinedColumn] * 2
    assert ended(reads) == [[(id_,)] for id_ in range(20)]
    assert stored(watch) == list(range(20))


def test_a_commit_that_fails_is_the_error_of_who_caused_it(
    batches: ThreadBatches, threads: ThreadPoolExecutor, watch: psycopg.Connection[Any], busy: Busy
) -> None:
    watch.execute("ALTER TABLE done ADD CONSTRAINT once UNIQUE (id) DEFERRABLE INITIALLY DEFERRED")
    watch.execute("INSERT INTO done VALUES (7)")
    busy.begin()
    tasks = insert(batches, threads, *range(10))
    busy.end(waiting=10)
    assert [type(one) for one in ended(tasks)].count(errors.UniqueViolation) == 1
    assert isinstance(ended(tasks)[7], errors.UniqueViolation)
    assert stored(watch) == list(range(10))


def test_the_victim_of_a_deadlock_tries_again(
    batches: ThreadBatches,
    threads: ThreadPoolExecutor,
    watch: psycopg.Connection[Any],
    busy: Busy,
    pauses: list[float],
) -> None:
    watch.execute(VICTIM)
    assert batches.write(("SELECT victim()", {})) == [("done",)]
    assert pauses == [0.005, 0.01, 0.02]
    for others in (0, 5):  # the last of a queue is a batch by itself
        watch.execute("SELECT setval('tried', 1, false)")
        busy.begin()
        victim = threads.submit(batches.write, ("SELECT victim()", {}))
        tasks = insert(batches, threads, *range(others))
        busy.end(waiting=others + 1)
        assert ended([victim]) == [[("done",)]]
        assert len(ended(tasks)) == others
    assert stored(watch) == list(range(5))


def test_who_waits_for_a_lock_does_not_hold_up_the_others(
    batches: ThreadBatches,
    threads: ThreadPoolExecutor,
    watch: psycopg.Connection[Any],
    busy: Busy,
    postgres_dsn: str,
) -> None:
    watch.execute("CREATE TABLE row (id int); INSERT INTO row VALUES (1)")
    with psycopg.connect(postgres_dsn) as other:
        other.execute("UPDATE row SET id = 1")
        busy.begin()
        update = "UPDATE row SET id = %(id)s::int RETURNING id", {"id": 2}
        locked = threads.submit(batches.write, update)
        tasks = insert(batches, threads, *range(10))
        busy.end(waiting=11)
        assert [rows[0][0] for rows in ended(tasks)] == list(range(10))
        assert not locked.done()
        other.commit()
        assert locked.result() == [(2,)]
    assert stored(watch) == list(range(10))


def test_a_slow_server_does_not_begin_again_and_again(
    batches: ThreadBatches, threads: ThreadPoolExecutor, watch: psycopg.Connection[Any]
) -> None:
    watch.execute("CREATE SEQUENCE begun")  # counts what was rolled back, too
    slow = "INSERT INTO done (id) SELECT nextval('begun')::int FROM pg_sleep(0.05) RETURNING id"
    # Together they take longer than a batch may.
    for one in [threads.submit(batches.write, (slow, {})) for _ in range(64)]:
        one.result()
    assert watch.execute("SELECT last_value FROM begun").fetchall()[0][0] < 3 * 64


def test_others_are_served_while_as_many_as_go_alone_are_stuck(batches: ThreadBatches, busy: Busy) -> None:
    busy.begin(4)
    assert batches.read((_ID, {"id": 1})) == [(1,)]
    busy.end()


def test_each_waits_for_a_connection_as_long_as_the_pool_says(
    batches: ThreadBatches, threads: ThreadPoolExecutor
) -> None:
    pool = batches._pool
    pool.timeout = 0.4
    held = [pool.getconn() for _ in range(_POOL)]
    begin = time.monotonic()
    found = ended(insert(batches, threads, *range(_THREADS)))
    assert [type(error) for error in found] == [PoolTimeout] * _THREADS
    assert {str(error) for error in found} == {"couldn't get a connection after 0.40 sec"}
    assert 0.35 < time.monotonic() - begin < 15  # one after the other would take 32 s
    pool.timeout = _PATIENCE
    for conn in held:
        pool.putconn(conn)
    assert len(ended(insert(batches, threads, *range(16)))) == 16
    assert batches._busy == 0


def test_who_lost_the_connection_is_told_so_and_the_next_call_works(
    batches: ThreadBatches, threads: ThreadPoolExecutor, watch: psycopg.Connection[Any], busy: Busy
) -> None:
    watch.execute("SELECT pg_advisory_lock(2)")
    busy.begin()
    tasks = insert(batches, threads, *range(10))
    tasks.append(threads.submit(batches.write, (_SLOW, {"id": 100})))
    busy.end(waiting=11)
    while not held_up(watch):
        time.sleep(0.001)
    watch.execute(KILL)
    found = ended(tasks)
    assert all(isinstance(one, psycopg.OperationalError) for one in found[-1:])
    assert stored(watch) == [rows[0][0] for rows in found if isinstance(rows, list)]
    assert len(ended(insert(batches, threads, *range(10)))) == 10


@pytest.mark.parametrize("is_slow", [True, False])
def test_an_interrupt_from_the_keyboard_ends_one_and_the_others_go_on(
    batches: ThreadBatches,
    threads: ThreadPoolExecutor,
    watch: psycopg.Connection[Any],
    busy: Busy,
    request: pytest.FixtureRequest,
    is_slow: bool,
) -> None:
    """While its statement is under way; or while it waits, since all connections are in use."""
    me = threading.get_ident()

    def interrupt() -> None:
        while len(batches._writes) < 5 or not batches._pool.get_stats()["requests_waiting"]:
            time.sleep(0.001)
        if is_slow:
            busy.end()
            while not held_up(watch):
                time.sleep(0.001)
        signal.pthread_kill(me, signal.SIGINT)

    # pytest-xdist has its workers ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    watch.execute("SELECT pg_advisory_lock(2)")
    busy.begin()
    tasks = insert(batches, threads, *range(5))
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        batches.write((_SLOW, {"id": 100}))
    interrupting.join()
    now = stored(watch)
    watch.execute("SELECT pg_advisory_unlock(2)")
    if not is_slow:
        busy.end()
    tasks += insert(batches, threads, *range(5, 10))
    assert [rows[0][0] for rows in ended(tasks)] == list(range(10))
    assert (100 in stored(watch)) == (100 in now)  # once it is interrupted, nothing more happens
    assert batches._busy == 0


@pytest.mark.parametrize("when", ["before it leads", "before its batch", "after its batch"])
def test_a_thread_that_ends_at_any_moment_leaves_nobody_waiting(
    batches: ThreadBatches,
    threads: ThreadPoolExecutor,
    busy: Busy,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """As some libraries raise an exception in another thread."""
    ending: list[int] = []
    lead, run = ThreadBatches._lead, _Batch.run

    def interrupted_lead(self: ThreadBatches, *args: Any) -> None:
        if threading.get_ident() in ending and when == "before it leads":
            raise SystemExit
        lead(self, *args)

    def interrupted_run(self: _Batch, *args: Any) -> None:
        if threading.get_ident() in ending and when == "before its batch":
            raise SystemExit
        run(self, *args)
        if threading.get_ident() in ending:
            raise SystemExit

    def first() -> None:  # the first that waits, and so the first to lead
        ending.append(threading.get_ident())
        with pytest.raises(SystemExit):
            batches.read((_ID, {"id": 1}))
        ending.clear()

    monkeypatch.setattr(ThreadBatches, "_lead", interrupted_lead)
    monkeypatch.setattr(_Batch, "run", interrupted_run)
    busy.begin()
    end = threads.submit(busy.end, waiting=8)

    def others() -> list[Future[Any]]:
        while not batches._reads:
            time.sleep(0.001)
        return [threads.submit(batches.read, (_ID, {"id": id_})) for id_ in range(7)]

    tasks = threads.submit(others)
    threads.submit(first).result(_PATIENCE)
    assert end.exception(_PATIENCE) is None
    assert [rows[0][0] for rows in ended(tasks.result())] == list(range(7))
    assert batches._busy == 0
    assert batches._pool.get_stats()["pool_available"] == _POOL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_between_any_two_calls_loses_neither_a_connection_nor_a_turn(
    batches: ThreadBatches, threads: ThreadPoolExecutor
) -> None:
    """As Ctrl-C, which the interpreter raises where a function begins or has called one."""
    ours = {module.__file__ for module in (threads_module, conflicts, psycopg_pool.pool)}
    calls, moment = itertools.count(), -1

    def interrupt(frame: Any, event: str, arg: Any) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename in ours and next(calls) == moment:
            raise KeyboardInterrupt

    while next(calls) > moment:  # the last one came so far
        calls, moment = itertools.count(), moment + 1
        sys.setprofile(interrupt)
        try:
            batches.read((_ID, {"id": 1}))
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        batches._pool.wait(_PATIENCE)
        assert batches._busy == 0
    assert moment > 20
    held = [batches._pool.getconn(_PATIENCE) for _ in range(_POOL)]
    for conn in held:
        batches._pool.putconn(conn)
    assert len(ended(insert(batches, threads, *range(16)))) == 16


def test_savers_share_too_and_tell_each_its_own_error(
    postgres_dsn: str, watch: psycopg.Connection[Any], threads: ThreadPoolExecutor, never_stuck: None
) -> None:
    with persistence.open(postgres_dsn, settings=Settings(pool_max=8)) as db:
        saver = db.checkpointer
        assert saver is not None
        watch.execute("ALTER TABLE checkpoints ADD CHECK (thread_id <> 't13' OR checkpoint_id < '2')")

        def walk(number: int) -> None:
            for step in ("1", "2", "3"):
                values = {"n": number, "list": [number, step]}
                versions: dict[str, Any] = dict.fromkeys(values, step)
                config = saver.put(at(f"t{number}"), bare(step, values, versions), {}, versions)
                saver.put_writes(config, [("n", number)], "task")
                found = saver.get_tuple(at(f"t{number}"))
                assert found is not None
                assert found.checkpoint["channel_values"] == values
                assert found.pending_writes == [("task", "n", number)]

        tasks = [threads.submit(walk, number) for number in range(60)]
        failed = {number: error for number, task in enumerate(tasks) if (error := task.exception(_PATIENCE))}
        assert {number: type(error) for number, error in failed.items()} == {13: errors.CheckViolation}
        found = watch.execute("SELECT count(DISTINCT xmin::text), count(*) FROM checkpoints").fetchone()
        assert found is not None
        assert found[1] == 59 * 3 + 1
        assert found[0] < 120
        watch.execute(KILL)
        lost = [threads.submit(saver.get_tuple, at(f"t{number}")) for number in range(40)]
        assert {type(task.exception(_PATIENCE)) for task in lost} <= {ConnectError, type(None)}


def test_a_copy_is_of_one_moment(
    postgres_dsn: str, watch: psycopg.Connection[Any], threads: ThreadPoolExecutor
) -> None:
    """A checkpoint that comes between the copied values and the copied checkpoints would lack its values."""
    watch.execute("""
        CREATE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_advisory_xact_lock(1); RETURN NULL;
        END $$""")
    with persistence.open(postgres_dsn, settings=Settings(pool_max=8)) as db:
        saver = db.checkpointer
        assert saver is not None
        watch.execute("CREATE TRIGGER held BEFORE INSERT ON checkpoint_writes EXECUTE FUNCTION held()")

        def put(step: str) -> None:
            saver.put(at("source"), bare(step, {"list": [step]}, {"list": step}), {}, {"list": step})

        put("1")
        watch.execute("SELECT pg_advisory_lock(1)")
        copy = threads.submit(saver.copy_thread, "source", "target")
        while not held_up(watch):
            time.sleep(0.001)
        put("2")
        watch.execute("SELECT pg_advisory_unlock(1)")
        assert copy.result(_PATIENCE) is None
        assert [found.checkpoint["channel_values"] for found in saver.list(at("target"))] == [{"list": ["1"]}]


def test_whoever_prunes_threads_takes_them_in_one_order() -> None:
    """Else two at once wait for each other in a circle, and one of them has done its work in vain."""
    operation = steps.prune(["b", "c", "a"])
    asked = [next(operation)]
    with suppress(StopIteration):
        while True:
            asked.append(operation.send([]))  # a thread without checkpoints
    assert [params.get("thread") for _, params in asked] == ["a", "b", "c"]
