"""Operations that share a round trip and a commit on Postgres: what each of them notices of the others."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from psycopg import errors
from psycopg_pool import PoolTimeout

import persistence
from persistence.backends.postgres.batches import Batches, _Batch, _Call
from persistence.backends.postgres.connection import make_async_pool
from persistence.dsn import Dsn
from persistence.errors import ClosedError, ConnectError, WrongLoopError
from persistence.settings import Settings
from persistence.testing.subject import at, bare
from tests.ops.test_lost import KILL, kill_all

_INSERT = "INSERT INTO done (id) VALUES (%(id)s::int) RETURNING id, pg_current_xact_id()::text"
_DIVIDE = "INSERT INTO done (id) SELECT 1 / %(id)s::int RETURNING id"
_SLOW = "INSERT INTO done (id) SELECT %(id)s::int FROM pg_advisory_xact_lock_shared(2) RETURNING id"
_HOLD = "SELECT pg_advisory_xact_lock_shared(1)::text"
_ID = "SELECT %(id)s::int / 1"
VICTIM = """
CREATE SEQUENCE tried;
CREATE FUNCTION victim() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('tried') < 4 THEN RAISE 'deadlock detected' USING ERRCODE = '40P01'; END IF;
    RETURN 'done';
END $$"""
STUBBORN = """
CREATE FUNCTION stubborn() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock_shared(2);
EXCEPTION WHEN query_canceled THEN RAISE division_by_zero;
END $$"""
_POOL = 6
_PATIENCE = 60
"""Seconds for what takes milliseconds, on a machine that may be slow."""


@pytest.fixture
def watch(postgres_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection beside the pool."""
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE done (id int)")
        yield conn


@pytest.fixture
async def batches(
    request: pytest.FixtureRequest, postgres_dsn: str, watch: psycopg.Connection[Any]
) -> AsyncIterator[Batches]:
    """With ``False``, as behind PgBouncer: nothing is prepared."""
    pgbouncer = not getattr(request, "param", True)
    settings = Settings(pool_min=_POOL, pool_max=_POOL, pool_timeout=_PATIENCE, pgbouncer=pgbouncer)
    async with make_async_pool(Dsn.parse(postgres_dsn), settings) as pool:
        await pool.wait(_PATIENCE)
        yield Batches(pool)


@pytest.fixture
def never_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that takes long, as when the machine stands still, is not given up."""
    monkeypatch.setattr("persistence.backends.postgres.batches.STUCK", 3600)
    monkeypatch.setattr("persistence.backends.postgres.threads.STUCK", 3600)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The longest time that each attempt which met a conflict could have waited."""
    longest: list[float] = []

    def uniform(least: float, most: float) -> float:
        longest.append(most)
        return least

    monkeypatch.setattr("persistence.backends.postgres.conflicts.random.uniform", uniform)
    return longest


def stored(watch: psycopg.Connection[Any]) -> list[int]:
    return [id_ for (id_,) in watch.execute("SELECT id FROM done ORDER BY id")]


def insert(batches: Batches, *ids: int, key: Any = None) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(batches.write((_INSERT, {"id": id_}), key)) for id_ in ids]


def held_up(watch: psycopg.Connection[Any]) -> int:
    """How many statements wait on the server for a lock of the test."""
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    return int(watch.execute(locks).fetchall()[0][0])


async def until_held_up(watch: psycopg.Connection[Any], number: int) -> None:
    while held_up(watch) < number:  # noqa: ASYNC110 - nothing tells it
        await asyncio.sleep(0.001)


@asynccontextmanager
async def busy(
    batches: Batches, watch: psycopg.Connection[Any], number: int = _POOL, waiting: int = 0
) -> AsyncIterator[None]:
    """All connections, or some, are in use until so many as are said wait, so that these go together."""
    watch.execute("SELECT pg_advisory_lock(1)")
    held = []
    for already in range(number):
        held.append(asyncio.ensure_future(batches.read((_HOLD, {}))))
        await until_held_up(watch, already + 1)  # else the next one could go along
    yield
    while len(batches._reads) + len(batches._writes) < waiting:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.001)
    watch.execute("SELECT pg_advisory_unlock(1)")
    await asyncio.gather(*held)


prepared_or_not = pytest.mark.parametrize("batches", [True, False], indirect=True)


@prepared_or_not
async def test_those_who_wait_share_a_transaction_and_the_others_do_not(
    batches: Batches, watch: psycopg.Connection[Any], never_stuck: None
) -> None:
    for _ in range(8):  # prepared at last, where anything is
        results = await asyncio.gather(*insert(batches, *range(40)))
        assert [rows[0][0] for rows in results] == list(range(40))
        transactions = [rows[0][1] for rows in results]
        assert len(set(transactions[:4])) == 4
        assert len(set(transactions)) < 12
    assert stored(watch) == sorted([*range(40)] * 8)


@prepared_or_not
async def test_a_failure_stays_alone(batches: Batches, watch: psycopg.Connection[Any]) -> None:
    async with busy(batches, watch, waiting=45):
        bad = [asyncio.ensure_future(batches.write((_DIVIDE, {"id": 0}))) for _ in range(3)]
        good = insert(batches, *range(20))
        broken = [asyncio.ensure_future(batches.read(("SELECT nonsense", {}))) for _ in range(2)]
        reads = [asyncio.ensure_future(batches.read((_ID, {"id": id_}))) for id_ in range(20)]
    ended: list[Any] = await asyncio.gather(*bad, *good, *broken, *reads, return_exceptions=True)
    assert [type(error) for error in ended[:3]] == [errors.DivisionByZero] * 3
    assert [rows[0][0] for rows in ended[3:23]] == list(range(20))
    assert [type(error) for error in ended[23:25]] == [errors.UndefinedColumn] * 2
    assert ended[25:] == [[(id_,)] for id_ in range(20)]
    assert stored(watch) == list(range(20))


async def test_statements_that_are_prepared_no_more_are_sent_again(
    batches: Batches, watch: psycopg.Connection[Any], never_stuck: None
) -> None:
    """psycopg says DEALLOCATE ALL after a transaction that failed, as of a copy to a thread that is there."""
    connections = [await batches._pool.getconn() for _ in range(_POOL)]
    for conn in connections:
        for _ in range(7):
            await conn.wait(conn.wire.run(_ID, {"id": 1}))
        await conn.execute("DEALLOCATE ALL")
        await batches._pool.putconn(conn)
    for number in (1, 2):
        async with busy(batches, watch, waiting=number):
            reads = [asyncio.ensure_future(batches.read((_ID, {"id": id_}))) for id_ in range(number)]
        assert await asyncio.gather(*reads) == [[(id_,)] for id_ in range(number)]


async def test_a_commit_that_fails_is_the_error_of_who_caused_it(
    batches: Batches, watch: psycopg.Connection[Any]
) -> None:
    watch.execute("ALTER TABLE done ADD CONSTRAINT once UNIQUE (id) DEFERRABLE INITIALLY DEFERRED")
    watch.execute("INSERT INTO done VALUES (7)")
    async with busy(batches, watch, waiting=10):
        tasks = insert(batches, *range(10))
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in ended].count(errors.UniqueViolation) == 1
    assert isinstance(ended[7], errors.UniqueViolation)
    assert stored(watch) == list(range(10))


async def test_the_victim_of_a_deadlock_tries_again(
    batches: Batches, watch: psycopg.Connection[Any], pauses: list[float]
) -> None:
    watch.execute(VICTIM)
    assert await batches.write(("SELECT victim()", {})) == [("done",)]
    assert pauses == [0.005, 0.01, 0.02]
    for others in (0, 5):  # the last of a queue is a batch by itself
        watch.execute("SELECT setval('tried', 1, false)")
        async with busy(batches, watch, waiting=others + 1):
            victim = asyncio.ensure_future(batches.write(("SELECT victim()", {})))
            tasks = insert(batches, *range(others))
        await asyncio.gather(*tasks)
        assert await victim == [("done",)]
    assert stored(watch) == list(range(5))


async def test_one_key_is_written_once_in_a_transaction(
    batches: Batches, watch: psycopg.Connection[Any]
) -> None:
    async with busy(batches, watch, waiting=6):
        tasks = insert(batches, *range(6), key=("thread", "ns", "id"))
    same = await asyncio.gather(*tasks)
    assert len({rows[0][1] for rows in same}) == 6


async def test_a_batch_leaves_nothing_to_the_collector(batches: Batches) -> None:
    """It would hold all its rows until then, and finding them took a sixth of the client's time."""
    await asyncio.gather(*insert(batches, *range(40)))
    gc.collect()
    gc.disable()
    try:
        await asyncio.gather(*insert(batches, *range(40)))
        deadline = time.monotonic() + 10
        while [one for one in gc.get_objects() if isinstance(one, (_Batch, _Call))]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    finally:
        gc.enable()


async def test_who_is_cancelled_before_its_turn_does_nothing(
    batches: Batches, watch: psycopg.Connection[Any]
) -> None:
    async with busy(batches, watch):
        tasks = insert(batches, *range(10))
        await asyncio.sleep(0)
        tasks[3].cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(ended[3], asyncio.CancelledError)
    assert stored(watch) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


async def test_who_is_cancelled_on_the_way_leaves_the_others_alone(
    batches: Batches, watch: psycopg.Connection[Any], never_stuck: None
) -> None:
    watch.execute("SELECT pg_advisory_lock(2)")
    async with busy(batches, watch, waiting=11):
        tasks = insert(batches, *range(5))
        slow = asyncio.ensure_future(batches.write((_SLOW, {"id": 100})))
        tasks += insert(batches, *range(5, 10))
    await until_held_up(watch, 1)
    tasks[3].cancel()
    done, _ = await asyncio.wait([tasks[3]], timeout=_PATIENCE)
    assert done  # the server was told; nobody waits for the slow one
    now = stored(watch)
    watch.execute("SELECT pg_advisory_unlock(2)")
    ended = await asyncio.gather(*tasks, slow, return_exceptions=True)
    assert isinstance(ended[3], asyncio.CancelledError)
    assert (3 in stored(watch)) == (3 in now)  # once it is cancelled, nothing more happens
    assert [rows[0][0] for rows in ended if not isinstance(rows, BaseException)] == [
        0, 1, 2, 4, 5, 6, 7, 8, 9, 100,
    ]  # fmt: skip
    assert [id_ for id_ in stored(watch) if id_ != 3] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 100]


async def test_a_cancelled_batch_that_ends_otherwise_loses_nothing(
    batches: Batches, watch: psycopg.Connection[Any], never_stuck: None
) -> None:
    """As one does whose deadlock is found while it is cancelled."""
    watch.execute(STUBBORN)
    watch.execute("SELECT pg_advisory_lock(2)")
    async with busy(batches, watch, waiting=11):
        tasks = insert(batches, *range(5))
        stubborn = asyncio.ensure_future(batches.write(("SELECT stubborn()", {})))
        tasks += insert(batches, *range(5, 10))
    await until_held_up(watch, 1)
    stubborn.cancel()
    assert [rows[0][0] for rows in await asyncio.gather(*tasks)] == list(range(10))
    assert stored(watch) == list(range(10))
    assert "returns_bad" not in batches._pool.get_stats()


async def test_who_waits_for_a_lock_does_not_hold_up_the_others(
    batches: Batches, watch: psycopg.Connection[Any], postgres_dsn: str
) -> None:
    watch.execute("CREATE TABLE row (id int); INSERT INTO row VALUES (1)")
    with psycopg.connect(postgres_dsn) as other:
        other.execute("UPDATE row SET id = 1")
        async with busy(batches, watch, waiting=11):
            update = "UPDATE row SET id = %(id)s::int RETURNING id", {"id": 2}
            locked = asyncio.ensure_future(batches.write(update))
            tasks = insert(batches, *range(10))
        assert len(await asyncio.wait_for(asyncio.gather(*tasks), _PATIENCE)) == 10
        assert not locked.done()
        other.commit()
        assert await locked == [(2,)]
    assert stored(watch) == list(range(10))


async def test_a_slow_server_does_not_begin_again_and_again(
    batches: Batches, watch: psycopg.Connection[Any]
) -> None:
    watch.execute("CREATE SEQUENCE begun")  # counts what was rolled back, too
    slow = "INSERT INTO done (id) SELECT nextval('begun')::int FROM pg_sleep(0.05) RETURNING id"
    # Together they take longer than a batch may.
    tasks = [asyncio.ensure_future(batches.write((slow, {}))) for _ in range(64)]
    assert len(await asyncio.gather(*tasks)) == 64
    assert watch.execute("SELECT last_value FROM begun").fetchall()[0][0] < 3 * 64


async def test_others_are_served_while_as_many_as_go_alone_are_stuck(
    batches: Batches, watch: psycopg.Connection[Any]
) -> None:
    async with busy(batches, watch, 4):
        assert await asyncio.wait_for(batches.read((_ID, {"id": 1})), _PATIENCE) == [(1,)]


async def test_each_waits_for_a_connection_as_long_as_the_pool_says(batches: Batches) -> None:
    pool = batches._pool
    pool.timeout = 0.4
    held = [await pool.getconn() for _ in range(_POOL)]
    begin = time.monotonic()
    tasks = insert(batches, *range(1000))
    await asyncio.sleep(0.2)
    tasks += insert(batches, *range(1000))
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in ended] == [PoolTimeout] * 2000
    assert {str(error) for error in ended} == {"couldn't get a connection after 0.40 sec"}
    assert 0.55 < time.monotonic() - begin < 15  # one batch after the other would take 25 s
    pool.timeout = _PATIENCE
    for conn in held:
        await pool.putconn(conn)
    assert len(await asyncio.gather(*insert(batches, *range(16)))) == 16


async def test_a_pool_that_closes_refuses_all_who_wait(batches: Batches) -> None:
    held = [await batches._pool.getconn() for _ in range(_POOL)]
    tasks = insert(batches, *range(10))
    await asyncio.sleep(0.05)
    for conn in held:
        await conn.close()
        await batches._pool.putconn(conn)
    await batches._pool.close()
    ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), _PATIENCE)
    assert all(isinstance(one, (psycopg.Error, list)) for one in ended)
    assert any(isinstance(one, psycopg.Error) for one in ended)


async def test_who_lost_the_connection_is_told_so_and_the_next_call_works(
    batches: Batches, watch: psycopg.Connection[Any], never_stuck: None
) -> None:
    watch.execute("SELECT pg_advisory_lock(2)")
    async with busy(batches, watch, waiting=11):
        tasks = insert(batches, *range(10))
        tasks.append(asyncio.ensure_future(batches.write((_SLOW, {"id": 100}))))
    await until_held_up(watch, 1)
    watch.execute(KILL)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, psycopg.OperationalError) for one in ended)
    assert stored(watch) == []
    assert len(await asyncio.gather(*insert(batches, *range(10)))) == 10


def config_of(number: int) -> Any:
    return at(f"t{number}")


async def test_savers_share_too_and_tell_each_its_own_error(
    postgres_dsn: str, watch: psycopg.Connection[Any], never_stuck: None
) -> None:
    """A row that the database refuses, among many; and what is stored is what each one stored."""
    async with persistence.aopen(postgres_dsn, settings=Settings(pool_max=8)) as db:
        saver = db.checkpointer
        assert saver is not None
        watch.execute("ALTER TABLE checkpoints ADD CHECK (thread_id <> 't13' OR checkpoint_id < '2')")

        async def walk(number: int) -> None:
            for step in ("1", "2", "3"):
                values = {"n": number, "list": [number, step]}
                versions: dict[str, Any] = dict.fromkeys(values, step)
                config = await saver.aput(config_of(number), bare(step, values, versions), {}, versions)
                await saver.aput_writes(config, [("n", number)], "task")
                found = await saver.aget_tuple(config_of(number))
                assert found is not None
                assert found.checkpoint["channel_values"] == values
                assert found.pending_writes == [("task", "n", number)]

        ended = await asyncio.gather(*(walk(number) for number in range(60)), return_exceptions=True)
        assert [number for number, one in enumerate(ended) if one is not None] == [13]
        assert isinstance(ended[13], errors.CheckViolation)
        transactions = watch.execute("SELECT count(DISTINCT xmin::text) FROM checkpoints").fetchone()
        rows = watch.execute("SELECT count(*) FROM checkpoints").fetchone()
        assert transactions is not None
        assert rows == (59 * 3 + 1,)
        assert transactions[0] < 120

    with pytest.raises(ClosedError):
        await saver.aget_tuple(config_of(1))


async def test_savers_that_lose_the_server_say_so_in_our_words(postgres_dsn: str) -> None:
    async with persistence.aopen(postgres_dsn, settings=Settings(pool_min=4, pool_max=8)) as db:
        saver = db.checkpointer
        assert saver is not None
        stop = asyncio.Event()
        seen: list[BaseException] = []

        async def walk(number: int) -> None:
            step = 0
            while not stop.is_set():
                step += 1
                try:
                    await saver.aput(
                        config_of(number), bare(f"{step:06}", {"n": step}, {"n": f"{step:06}"}), {}, {}
                    )
                    await saver.aget_tuple(config_of(number))
                except Exception as error:  # noqa: BLE001 - looked at below
                    seen.append(error)

        tasks = [asyncio.create_task(walk(number)) for number in range(40)]
        for _ in range(100):  # one that is idle is replaced, and nobody notices
            await asyncio.sleep(0.2)
            await asyncio.to_thread(kill_all, postgres_dsn)
            if seen:
                break
        await asyncio.sleep(0.2)
        stop.set()
        await asyncio.gather(*tasks)
        assert seen
        assert {type(error) for error in seen} == {ConnectError}


def test_nobody_waits_for_an_event_loop_that_ended(postgres_dsn: str) -> None:
    """Of a thread and of another loop the call is under way when the saver's own loop ends."""
    loop = asyncio.new_event_loop()
    db = loop.run_until_complete(persistence.aopen(postgres_dsn))
    saver = db.checkpointer
    assert saver is not None
    config = at("t", "1")
    with psycopg.connect(postgres_dsn) as other, ThreadPoolExecutor() as threads:
        other.execute("LOCK checkpoint_writes")
        calls = [
            threads.submit(saver.put_writes, config, [("a", 1)], "task"),
            threads.submit(lambda: asyncio.run(saver.aput_writes(config, [("a", 2)], "task"))),
        ]
        loop.run_until_complete(asyncio.sleep(0.2))
        assert [type(call.exception(_PATIENCE)) for call in calls] == [WrongLoopError] * 2
        other.rollback()
    loop.run_until_complete(asyncio.sleep(0.2))  # what was under way goes on
    loop.run_until_complete(db.close())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
