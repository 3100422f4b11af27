"""Asynchronous calls of the store on SQLite: those that wait go together, and fail alone."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import BaseStore, GetOp, PutOp
from langgraph.store.sqlite.base import SqliteStore as UpstreamStore

import persistence
from persistence.errors import ClosedError, SchemaError
from persistence.settings import Settings

HERE = ("a", "b")


@pytest.fixture
def dsn(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/x.db"


async def test_calls_that_wait_share_commits(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        conn: sqlite3.Connection = connect(*arguments, **options)
        conn.set_trace_callback(statements.append)
        return conn

    async with persistence.aopen(dsn) as db:
        assert db.store is not None
        monkeypatch.setattr(sqlite3, "connect", traced)
        await asyncio.gather(*(db.store.aput(HERE, str(i), {"i": i}) for i in range(1_000)))
        assert 1 <= statements.count("COMMIT") <= 10
        found = await asyncio.gather(*(db.store.aget(HERE, str(i)) for i in range(1_000)))
        assert [item.value["i"] for item in found if item] == list(range(1_000))
        assert len(await db.store.asearch(HERE, limit=2_000)) == 1_000


async def test_call_that_fails_fails_alone(dsn: str) -> None:
    async with persistence.aopen(dsn) as db:
        assert db.store is not None
        values: list[dict[str, Any]] = [{"i": i} for i in range(20)]
        values[7] = {"i": object()}
        calls = (db.store.aput(HERE, str(i), value) for i, value in enumerate(values))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [i for i, result in enumerate(results) if result is not None] == [7]
        assert isinstance(results[7], TypeError)
        assert {item.key for item in await db.store.asearch(HERE, limit=99)} == set(map(str, range(20))) - {
            "7"
        }


async def test_call_that_is_cancelled_leaves_the_others(dsn: str) -> None:
    async with persistence.aopen(dsn) as db:
        assert db.store is not None
        tasks = [asyncio.create_task(db.store.aput(HERE, str(i), {"i": i})) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[1::2] == [None] * 10
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        assert {item.key for item in await db.store.asearch(HERE, limit=99)} >= set(map(str, range(1, 20, 2)))


def test_two_event_loops_one_after_the_other(dsn: str) -> None:
    with persistence.open(dsn) as db:
        store = db.store
        assert store is not None
        for i in range(2):
            asyncio.run(store.aput(HERE, str(i), {"i": i}))
        assert len(store.search(HERE)) == 2


def test_loop_whose_threads_have_ended(dsn: str) -> None:
    async def work(store: BaseStore) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(store.aput(HERE, str(i), {"i": i}) for i in range(300)))
        waiting = [asyncio.ensure_future(store.aget(HERE, str(i))) for i in range(300)]
        await asyncio.sleep(0)
        await loop.shutdown_default_executor()
        waiting.append(asyncio.ensure_future(store.aget(HERE, "1")))
        done, left = await asyncio.wait(waiting, timeout=5)
        assert not left
        assert {type(one.exception()) for one in done} <= {RuntimeError, type(None)}
        assert isinstance(waiting[-1].exception(), RuntimeError)

    with persistence.open(dsn) as db:
        assert db.store is not None
        asyncio.run(work(db.store))
        assert len(db.store.search(HERE, limit=500)) == 300


async def test_calls_after_close(dsn: str) -> None:
    async with persistence.aopen(dsn) as db:
        store = db.store
    assert store is not None
    results = await asyncio.gather(*(store.aget(HERE, "x") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [ClosedError] * 3


def test_who_reads_and_then_writes_has_waited_before(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = UpstreamStore._batch_get_ops
    with persistence.open(dsn) as db, sqlite3.connect(dsn.removeprefix("sqlite:///"), timeout=0) as conn:
        assert db.store is not None

        def somebody_else_writes(store: UpstreamStore, *arguments: Any) -> None:
            read(store, *arguments)
            with suppress(sqlite3.OperationalError):
                conn.execute("INSERT INTO store (prefix, key, value) VALUES ('x', 'x', '{}')")
                conn.commit()

        monkeypatch.setattr(UpstreamStore, "_batch_get_ops", somebody_else_writes)
        assert db.store.batch([GetOp(HERE, "a"), PutOp(HERE, "a", {"i": 1})]) == [None, None]
        monkeypatch.undo()
        assert (item := db.store.get(HERE, "a")) is not None
        assert item.value == {"i": 1}


def test_who_waits_to_write_tries_again_soon(dsn: str) -> None:
    """SQLite's own naps grow to a tenth of a second: beside a busy saver a ``put`` took seconds."""
    settings, tries, again = Settings(sqlite_busy_timeout=5), count(), threading.Event()

    def trace(statement: str) -> None:
        if statement == "BEGIN IMMEDIATE" and next(tries) == 3:
            again.set()

    with persistence.open(dsn, settings=settings) as db, ThreadPoolExecutor(1) as thread:
        store: Any = db.store
        store.get(HERE, "a")
        store.conn.set_trace_callback(trace)
        with closing(sqlite3.connect(dsn.removeprefix("sqlite:///"), isolation_level=None)) as conn:
            conn.execute("BEGIN IMMEDIATE")
            put = thread.submit(store.put, HERE, "a", {"i": 1})
            assert again.wait(60)
            assert not put.done()
        put.result(60)
        assert store.conn.execute("PRAGMA busy_timeout").fetchone() == (5_000,)


def test_batch_that_fails_leaves_nothing(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def more_queries(store: UpstreamStore, ops: Any) -> Any:
        queries, embedding = queries_of(store, ops)
        return [*queries, ("INSERT INTO store (prefix) VALUES (NULL)", [])], embedding

    queries_of = UpstreamStore._prepare_batch_PUT_queries
    with persistence.open(dsn) as db:
        assert db.store is not None
        monkeypatch.setattr(UpstreamStore, "_prepare_batch_PUT_queries", more_queries)
        with pytest.raises(sqlite3.IntegrityError):
            db.store.put(HERE, "a", {})
        monkeypatch.undo()
        assert db.store.get(HERE, "a") is None
        db.store.put(HERE, "a", {})


def test_transaction_that_an_interrupt_left_is_ended(dsn: str) -> None:
    """Ctrl-C may come between any two steps; every later call then failed."""
    with persistence.open(dsn) as db:
        store: Any = db.store
        store.put(HERE, "a", {})
        for left in ("BEGIN", "BEGIN IMMEDIATE"):
            store.conn.execute(left)
            store.put(HERE, "b", {})
            store.conn.execute(left)
            assert store.get(HERE, "b") is not None


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_what_is_no_operation_is_awaited(kind: str, dsn: str, postgres_dsn: str) -> None:
    """An application's code is the same on both: ``await store.setup()``, as of LangGraph's own."""
    settings = Settings(setup_on_open=False)
    async with persistence.aopen(dsn if kind == "sqlite" else postgres_dsn, settings=settings) as db:
        store: Any = db.store
        with pytest.raises(SchemaError):
            await store.sweep_ttl()
        await store.setup()
        await store.setup()
        await store.aput(HERE, "a", {}, ttl=60)
        await store.start_ttl_sweeper()
        assert await store.sweep_ttl() == 0
        assert await store.stop_ttl_sweeper()
    with pytest.raises(ClosedError):
        await store.sweep_ttl()
    with pytest.raises(ClosedError):
        await store.setup()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_setup_and_sweeping(kind: str, dsn: str, postgres_dsn: str) -> None:
    settings = Settings(setup_on_open=False)
    with persistence.open(dsn if kind == "sqlite" else postgres_dsn, settings=settings) as db:
        store: Any = db.store
        with pytest.raises(SchemaError):
            store.sweep_ttl()
        store.setup()
        store.put(HERE, "a", {}, ttl=60)
        assert store.sweep_ttl() == 0
    for call in (store.sweep_ttl, store.setup):
        with pytest.raises(ClosedError):
            call()
