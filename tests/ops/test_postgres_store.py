"""The store on Postgres: what is asked at once goes by one round trip, and answers are LangGraph's."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest
from langgraph.store.base import GetOp, ListNamespacesOp, MatchCondition, Op, PutOp, SearchOp
from langgraph.store.postgres.aio import AsyncPostgresStore as UpstreamAsyncStore
from langgraph.store.postgres.base import PostgresStore as UpstreamStore
from psycopg import errors
from psycopg.rows import dict_row

import persistence
from persistence.backends.postgres.wire import LARGE, Wire
from persistence.errors import ClosedError, SchemaError, WrongLoopError
from persistence.settings import Settings

HERE = ("user_1", "ü")
PUTS: list[Op] = [
    *(PutOp((*HERE, str(i % 3)), f"note {i}", {"i": i, "text": "ü" * i, "none": None}) for i in range(9)),
    PutOp(("user%1",), "%s", {"a": {"b": [1.5, 2**70]}}),
    PutOp(HERE, "short", {"i": 1}, ttl=5),
    PutOp(HERE, "gone", {"i": 1}),
]
READS: list[Op] = [
    GetOp((*HERE, "0"), "note 0"),
    GetOp((*HERE, "0"), "note 3", refresh_ttl=False),
    GetOp((*HERE, "0"), "absent"),
    GetOp(("user%1",), "%s"),
    GetOp(HERE, "gone"),
    SearchOp(("user_1",), limit=3, offset=2),
    SearchOp((), limit=50),
    SearchOp(("user_1",), filter={"i": {"$gte": 3, "$ne": 5}}),
    SearchOp(("user_1",), filter={"i": 4}, query="ignored", refresh_ttl=False),
    SearchOp(("nobody",)),
    ListNamespacesOp(max_depth=2),
    ListNamespacesOp(match_conditions=(MatchCondition("suffix", ("*", "1")),), limit=5),
]


@pytest.fixture(params=[None, "5%s"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(db_schema=request.param, pgbouncer=request.param is not None)


@pytest.fixture
def no_statement_of_langgraph(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """LangGraph's own store, which asks for one thing after the other, is not used."""
    monkeypatch.setattr(UpstreamStore, "batch", None)
    monkeypatch.setattr(UpstreamAsyncStore, "abatch", None)
    yield


def official(dsn: str, settings: Settings, ops: Sequence[Op]) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
        if settings.db_schema:
            conn.execute('SET search_path TO "5%s"')
        return UpstreamStore(conn).batch(ops)


async def test_answers_are_those_of_langgraph(postgres_dsn: str, settings: Settings) -> None:
    with persistence.open(postgres_dsn, settings=settings) as db:
        assert db.store is not None
        db.store.batch(PUTS)
        for put in PUTS:  # created then, updated now, one after the other
            db.store.batch([put, READS[0]])
        db.store.delete(HERE, "gone")
        expected = official(postgres_dsn, settings, READS)
        assert [len(found) for found in expected[5:]] == [3, 11, 5, 1, 0, 2, 1]
        for _ in range(7):  # prepared at last
            assert db.store.batch(READS) == expected
        assert [db.store.batch([op])[0] for op in READS] == expected
        assert expected[0].created_at.tzinfo == db.store.batch(READS)[0].created_at.tzinfo  # type: ignore[union-attr]
    async with persistence.aopen(postgres_dsn, settings=settings) as adb:
        assert adb.store is not None
        assert await adb.store.abatch(READS) == expected
        item = await adb.store.aget((*HERE, "0"), "note 0")
        assert item == expected[0]


@pytest.mark.usefixtures("no_statement_of_langgraph")
async def test_reads_of_many_tasks_and_a_write_alone_are_one_round_trip(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips: list[int] = []
    run_all = Wire.run_all

    def counted(self: Wire, statements: Sequence[Any], take: Any) -> Any:
        trips.append(len(statements))
        return run_all(self, statements, take)

    monkeypatch.setattr(Wire, "run_all", counted)
    async with persistence.aopen(postgres_dsn) as db:
        assert db.store is not None
        await db.store.aput(HERE, "a", {"i": 1})
        found = await asyncio.gather(*(db.store.aget(HERE, "a", refresh_ttl=bool(i % 2)) for i in range(60)))
        assert {item.value["i"] for item in found if item} == {1}
        other = [db.store.aget(HERE, f"b{i}") for i in range(50)]
        await asyncio.gather(db.store.aput(HERE, "a", {"i": 2}), *other, db.store.asearch(HERE))
        assert trips == [2, 52]  # those that ask the same are asked once
        await db.store.adelete(HERE, "a")
        assert await db.store.aget(HERE, "a") is None
    with persistence.open(postgres_dsn) as again:
        assert again.store is not None
        again.store.put(HERE, "a", {"i": 1})
        assert [item.key for item in again.store.search(HERE)] == ["a"]


async def test_what_fails_fails_as_in_langgraph(postgres_dsn: str) -> None:
    bad: list[Op] = [*READS[:3], PutOp(HERE, "x", {"number": float("nan")})]
    async with persistence.aopen(postgres_dsn) as adb:
        assert adb.store is not None
        with pytest.raises(errors.InvalidTextRepresentation):
            await adb.store.abatch(bad)
    with persistence.open(postgres_dsn) as db:
        assert db.store is not None
        with pytest.raises(errors.InvalidTextRepresentation):
            db.store.batch(bad)
        with pytest.raises(ValueError, match="nonsense"):
            db.store.search(HERE, filter={"i": {"nonsense": 1}})
        assert db.store.search(()) == []
        db.store.put(HERE, "large", {"text": "x" * LARGE})
        assert len(db.store.batch([GetOp(HERE, "large"), GetOp(HERE, "x")])[0].value["text"]) == LARGE  # type: ignore[union-attr]
        with psycopg.connect(postgres_dsn, autocommit=True) as conn:
            conn.execute("DROP TABLE store CASCADE")
        with pytest.raises(SchemaError):
            db.store.batch(READS)


async def test_what_fails_fails_alone(postgres_dsn: str) -> None:
    """The tasks ask in the same turn of the event loop, and so together."""
    async with persistence.aopen(postgres_dsn) as db:
        store = db.store
        assert store is not None
        await store.aput(HERE, "old", {"i": 0})
        ended = await asyncio.gather(
            store.aput(HERE, "first", {"i": 1}),
            store.aput(HERE, "NUL \0", {"i": 2}),
            store.aget(HERE, "old"),
            store.asearch(HERE, filter={"i": {"nonsense": 1}}),
            store.aput(HERE, "last", {"i": 3}),
            store.aput(HERE, "last", {"i": 4}),
            return_exceptions=True,
        )
        assert [type(one).__name__ for one in ended] == [
            "NoneType", "DataError", "Item", "ValueError", "NoneType", "NoneType",
        ]  # fmt: skip
        stored = {item.key: item.value["i"] for item in await store.asearch(HERE)}
        assert stored == {"old": 0, "first": 1, "last": 4}


def test_reading_starts_the_time_of_an_item_anew(postgres_dsn: str) -> None:
    with (
        persistence.open(postgres_dsn) as db,
        psycopg.connect(postgres_dsn, autocommit=True) as conn,
    ):
        assert db.store is not None
        db.store.put(HERE, "a", {"i": 1}, ttl=5)
        expires = "SELECT expires_at > now() + interval '4 minutes' FROM store"
        conn.execute("UPDATE store SET expires_at = now()")
        db.store.get(HERE, "a", refresh_ttl=False)
        assert conn.execute(expires).fetchone() == (False,)
        db.store.get(HERE, "a")
        assert conn.execute(expires).fetchone() == (True,)


_ASYNC: list[tuple[str, tuple[Any, ...]]] = [
    ("aput", (HERE, "a", {"i": 1})),
    ("aget", (HERE, "a")),
    ("asearch", (HERE,)),
    ("alist_namespaces", ()),
    ("adelete", (HERE, "b")),
    ("abatch", ([GetOp(HERE, "a")],)),
    ("sweep_ttl", ()),
    ("setup", ()),
]


def test_store_of_an_event_loop_that_ended_says_so(postgres_dsn: str) -> None:
    """No raw error of the loop, no coroutine that nobody awaits (pytest reports it), and closing closes."""

    async def open_() -> tuple[persistence.AsyncPersistence, Any]:
        db = await persistence.aopen(postgres_dsn)
        return db, db.store

    async def afterwards() -> None:
        for name, args in _ASYNC:
            with pytest.raises(WrongLoopError, match="does not run"):
                await getattr(store, name)(*args)
        for name, args in _ASYNC[:-2]:
            with pytest.raises(WrongLoopError, match="does not run"):
                await asyncio.to_thread(getattr(store, name[1:]), *args)
        await db.close()
        await db.close()

    db, store = asyncio.run(open_())
    asyncio.run(afterwards())
    gc.collect()
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        others = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND client_port IS NOT NULL"
        )
        until = time.monotonic() + 60
        while conn.execute(others).fetchall() != [(1,)]:
            assert time.monotonic() < until
            time.sleep(0.01)


async def test_store_answers_and_closes_from_another_event_loop(postgres_dsn: str) -> None:
    async def elsewhere() -> None:
        found = [await getattr(store, name)(*args) for name, args in _ASYNC]
        assert found[1].value == found[2][0].value == {"i": 1}
        assert found[3] == [HERE]
        assert store.get(HERE, "a").value == {"i": 1}
        await db.close()

    db = await persistence.aopen(postgres_dsn)
    store: Any = db.store
    with pytest.raises(asyncio.InvalidStateError, match="await"):
        store.get(HERE, "a")
    await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    with pytest.raises(ClosedError):
        await store.aget(HERE, "a")
