"""Asynchronous calls of the store on SQLite: those that wait go together, and fail alone."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import BaseStore

import persistence
from persistence.errors import ClosedError

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
