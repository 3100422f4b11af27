"""LangGraph's Postgres stores on the pool of a handle.

What an operation means is LangGraph's, and most statements are taken from there. But LangGraph's store waits
for the answer to each before it sends the next; here all that is asked at once is one round trip.
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import tzinfo
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import psycopg
from langgraph.store.base import GetOp, Item, ListNamespacesOp, Op, PutOp, Result, SearchItem, SearchOp
from langgraph.store.base.batch import _dedupe_ops
from langgraph.store.postgres.aio import AsyncPostgresStore as UpstreamAsyncStore
from langgraph.store.postgres.base import BasePostgresStore, _group_ops
from langgraph.store.postgres.base import PostgresStore as UpstreamStore
from psycopg import capabilities
from psycopg.abc import PQGen
from psycopg.types.json import Jsonb

from persistence.backends.postgres.connection import (
    AsyncPool,
    AsyncPoolConnection,
    Pool,
    PoolConnection,
    translated,
)
from persistence.backends.postgres.home import Home
from persistence.backends.postgres.wire import LARGE, Params
from persistence.errors import PersistenceError

_GET = "SELECT value, created_at, updated_at FROM store WHERE prefix = %(prefix)s AND key = %(key)s"
_REFRESH = f"""
WITH refreshed AS (
    UPDATE store SET expires_at = NOW() + (ttl_minutes || ' minutes')::interval
    WHERE prefix = %(prefix)s AND key = %(key)s AND ttl_minutes IS NOT NULL
)
{_GET}"""

P = ParamSpec("P")
T = TypeVar("T")

_Rows = list[tuple[Any, ...]]
_Take = Callable[[_Rows, tzinfo], Result]
_Asked = tuple[asyncio.Future[Result], Op]


class PostgresStore(UpstreamStore):
    """LangGraph's store; a missing table or a closed pool is one of our errors.

    ``batch`` is what every other method of a LangGraph store goes through.
    """

    __slots__ = ()

    def __init__(self, pool: Pool) -> None:
        super().__init__(cast(Any, pool))

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        pool, ops = cast(Pool, self.conn), list(ops)
        with translated(pool.name):
            if (trip := _trip(self, ops)) is None or not self._make(trip, pool):
                return super().batch(ops)
            if trip.puts:
                super().batch(trip.puts)
            return trip.results

    def setup(self) -> None:
        """Make LangGraph's tables; ``persistence setup`` does more."""
        with translated(cast(Pool, self.conn).name):
            super().setup()

    def sweep_ttl(self) -> int:
        """Delete the items whose time is over."""
        with translated(cast(Pool, self.conn).name):
            return super().sweep_ttl()

    def _make(self, trip: _Trip, pool: Pool) -> bool:
        if not trip.statements:
            return True
        conn = pool.getconn()
        try:
            conn.wait(trip.steps(conn))
        except _FAILURES:
            if conn.closed:
                raise
            return False
        finally:
            pool.putconn(conn)
        return True


_Async = Callable[Concatenate["AsyncPostgresStore", P], Coroutine[Any, Any, T]]
_Sync = Callable[Concatenate["AsyncPostgresStore", P], T]


def _at_home(method: _Async[P, T]) -> _Async[P, T]:
    """Have it run on the loop that the store belongs to."""

    @wraps(method)
    async def call(self: AsyncPostgresStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._home.here(method(self, *args, **kwargs))

    return call


def _waiting(upstream: _Sync[P, T], method: _Async[P, T]) -> _Sync[P, T]:
    """The same from another thread; LangGraph's refuses it on the loop itself."""

    @wraps(upstream)
    def call(self: AsyncPostgresStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if asyncio._get_running_loop() is self._home.loop:
            return upstream(self, *args, **kwargs)
        return self._home.wait(method(self, *args, **kwargs))

    return call


class AsyncPostgresStore(UpstreamAsyncStore):
    """As :class:`PostgresStore`, for the running event loop; of what goes together each fails alone."""

    __slots__ = ("_home",)

    def __init__(self, pool: AsyncPool) -> None:
        super().__init__(cast(Any, pool))
        self._home = Home(type(self).__name__)

    @_at_home
    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        pool, ops = cast(AsyncPool, self.conn), list(ops)
        with translated(pool.name):
            if (trip := _trip(self, ops)) is None or not await self._make(trip, pool):
                return await super().abatch(ops)
            if trip.puts:
                await super().abatch(trip.puts)
            return trip.results

    aget = _at_home(UpstreamAsyncStore.aget)
    asearch = _at_home(UpstreamAsyncStore.asearch)
    aput = _at_home(UpstreamAsyncStore.aput)
    adelete = _at_home(UpstreamAsyncStore.adelete)
    alist_namespaces = _at_home(UpstreamAsyncStore.alist_namespaces)
    batch = _waiting(UpstreamAsyncStore.batch, abatch)
    get = _waiting(UpstreamAsyncStore.get, UpstreamAsyncStore.aget)
    search = _waiting(UpstreamAsyncStore.search, UpstreamAsyncStore.asearch)
    put = _waiting(UpstreamAsyncStore.put, UpstreamAsyncStore.aput)
    delete = _waiting(UpstreamAsyncStore.delete, UpstreamAsyncStore.adelete)
    list_namespaces = _waiting(UpstreamAsyncStore.list_namespaces, UpstreamAsyncStore.alist_namespaces)

    @_at_home
    async def setup(self) -> None:
        """As :meth:`PostgresStore.setup`."""
        with translated(cast(AsyncPool, self.conn).name):
            await super().setup()

    @_at_home
    async def sweep_ttl(self) -> int:
        """As :meth:`PostgresStore.sweep_ttl`."""
        with translated(cast(AsyncPool, self.conn).name):
            return await super().sweep_ttl()

    async def _make(self, trip: _Trip, pool: AsyncPool) -> bool:
        if not trip.statements:
            return True
        conn = await pool.getconn()
        try:
            await conn.wait(trip.steps(conn))
        except _FAILURES:
            if conn.closed:
                raise
            return False
        finally:
            await pool.putconn(conn)
        return True

    # AsyncBatchedBaseStore of langgraph-checkpoint 4.3.2 calls it before it queues an operation; its own task
    # gives one operation's error to all. ``test_what_fails_fails_alone`` tells when that is no longer so.
    def _ensure_task(self) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(_serve(self._aqueue, weakref.ref(self)))


async def _serve(queue: asyncio.Queue[_Asked], store: weakref.ref[AsyncPostgresStore]) -> None:
    """Have what all tasks ask in one turn of the event loop go together, while there is a store."""
    while True:
        asked = [await queue.get()]
        while not queue.empty():
            asked.append(queue.get_nowait())
        if (here := store()) is None:
            return
        await _answer(here, [one for one in asked if not one[0].done()])
        del here, asked


async def _answer(store: AsyncPostgresStore, asked: Sequence[_Asked]) -> None:
    """Give each its answer or its own error; LangGraph's store gives the error of one to all."""
    listen, ops = _dedupe_ops([op for _, op in asked])
    try:
        results = await store.abatch(ops)
    except Exception as error:  # noqa: BLE001 - it belongs to those who asked
        if len(asked) > 1 and not isinstance(error, PersistenceError):
            for one in asked:
                await _answer(store, [one])
            return
        for future, _ in asked:
            if not future.done():
                future.set_exception(error)
    else:
        for at, (future, _) in zip(listen or range(len(asked)), asked, strict=True):
            if not future.done():
                future.set_result(results[at])


_FAILURES = (psycopg.Error, KeyError)
"""A statement that fails, or a parameter of a type that the wire does not know. Nothing was done: once more,
as LangGraph does it, one after the other."""


class _Trip:
    """What is asked at once: reads, and a write that is alone."""

    def __init__(self, store: BasePostgresStore[Any], ops: Sequence[Op]) -> None:
        grouped, number = _group_ops(ops)
        self.results: list[Result] = [None] * number
        self.statements: list[tuple[str, Params]] = []
        self._takes: list[tuple[int, _Take]] = []
        params: Params
        for at, get in cast(list[tuple[int, GetOp]], grouped.get(GetOp, [])):
            key = {"prefix": ".".join(get.namespace), "key": get.key}
            self._ask(at, _REFRESH if get.refresh_ttl else _GET, key, partial(_item, get))
        searches = cast(list[tuple[int, SearchOp]], grouped.get(SearchOp, []))
        for (at, _), (query, params) in zip(
            searches, store._prepare_batch_search_queries(searches)[0], strict=True
        ):
            self._ask(at, query, params, _found)
        lists = cast(list[tuple[int, ListNamespacesOp]], grouped.get(ListNamespacesOp, []))
        for (at, _), (query, params) in zip(
            lists, store._get_batch_list_namespaces_queries(lists), strict=True
        ):
            self._ask(at, query, params, _namespaces)
        writes = cast(list[tuple[int, PutOp]], grouped.get(PutOp, []))
        self.puts = [put for _, put in writes]
        """What is left to LangGraph's store, which makes one statement of many."""
        if len(writes) == 1 and writes[0][1].ttl is None:
            ((query, given),), _ = store._prepare_batch_PUT_queries(writes)
            texts = [json.dumps(each.obj) if isinstance(each, Jsonb) else each for each in given]
            if sum(len(text or "") for text in texts) < LARGE:
                self._ask(writes[0][0], query, texts, _nothing)
                self.puts = []

    def _ask(self, at: int, query: str, params: Params, take: _Take) -> None:
        self.statements.append((query, params))
        self._takes.append((at, take))

    def steps(self, conn: PoolConnection | AsyncPoolConnection) -> PQGen[None]:
        """Ask all of it; for the connection's ``wait``."""
        answers: list[_Rows] = []
        if len(self.statements) == 1:
            answers.append((yield from conn.wire.run(*self.statements[0])))
        else:
            yield from conn.wire.run_all(self.statements, answers.append)
        zone = conn.info.timezone
        for (at, take), rows in zip(self._takes, answers, strict=True):
            self.results[at] = take(rows, zone)


def _trip(store: BasePostgresStore[Any], ops: Sequence[Op]) -> _Trip | None:
    """``None`` if only LangGraph's own code knows what is to be done."""
    if store.index_config or store.ttl_config or not capabilities.has_pipeline():
        return None
    return _Trip(store, ops)


def _item(op: GetOp, rows: _Rows, zone: tzinfo) -> Item | None:
    for value, created, updated in rows:
        return Item(
            value=value,
            key=op.key,
            namespace=op.namespace,
            created_at=_in(zone, created),
            updated_at=_in(zone, updated),
        )
    return None


def _found(rows: _Rows, zone: tzinfo) -> list[SearchItem]:
    return [
        SearchItem(
            value=value,
            key=key,
            namespace=tuple(prefix.split(".")),
            created_at=_in(zone, created),
            updated_at=_in(zone, updated),
        )
        for prefix, key, value, created, updated, _ in rows  # the last is a score, which needs an index
    ]


def _in(zone: tzinfo, moment: Any) -> Any:
    """As LangGraph's store gives it; a column that holds no time gives none."""
    return None if moment is None else moment.astimezone(zone)


def _namespaces(rows: _Rows, zone: tzinfo) -> list[tuple[str, ...]]:
    return [tuple(prefix.split(".")) for prefix, *_ in rows]


def _nothing(rows: _Rows, zone: tzinfo) -> None:
    return None
