"""Who takes part: our savers, the official ones as their documentation opens them, the bare driver."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.store.base import BaseStore
from langgraph.store.postgres import AsyncPostgresStore
from langgraph.store.sqlite.aio import AsyncSqliteStore
from psycopg import AsyncConnection, Connection
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

import persistence
from persistence.backends.postgres.connection import make_async_pool
from persistence.dsn import Dsn
from tools.benchmarks import bare
from tools.benchmarks.clients import AsyncClient, AsyncSaverClient, Client, SaverClient

POOL = 20
"""Connections at most, for everybody: what the official documentation suggests."""

OURS, OFFICIAL, NO_LOCK, BARE = "ours", "official", "official without its lock", "bare driver"
SHARED = "bare driver, trips shared"

SyncOpener = Callable[[str], AbstractContextManager[Client]]
AsyncOpener = Callable[[str], AbstractAsyncContextManager[AsyncClient]]
StoreOpener = Callable[[str], AbstractAsyncContextManager[BaseStore]]


@dataclass(frozen=True)
class Contender:
    """One who takes part; a place is a SQLite file or a conninfo."""

    name: str
    open: SyncOpener | AsyncOpener


def _settings() -> persistence.Settings:
    return persistence.Settings(pool_max=POOL)


@contextmanager
def ours(place: str) -> Iterator[Client]:
    """Our saver as ``open`` gives it."""
    with persistence.open(place, settings=_settings()) as db:
        assert db.checkpointer is not None  # noqa: S101
        yield SaverClient(db.checkpointer)


@asynccontextmanager
async def aours(place: str) -> AsyncIterator[AsyncClient]:
    """Our saver as ``aopen`` gives it."""
    async with persistence.aopen(place, settings=_settings()) as db:
        assert db.checkpointer is not None  # noqa: S101
        yield AsyncSaverClient(db.checkpointer)


@contextmanager
def official_memory(place: str) -> Iterator[Client]:
    """The official saver in memory."""
    yield SaverClient(InMemorySaver())


@contextmanager
def official_sqlite(place: str) -> Iterator[Client]:
    """The official saver as its documentation opens it."""
    with SqliteSaver.from_conn_string(place) as saver:
        saver.setup()
        saver.conn.execute("PRAGMA synchronous = FULL")  # the default of most builds of SQLite, not of all
        yield SaverClient(saver)


@asynccontextmanager
async def aofficial_sqlite(place: str) -> AsyncIterator[AsyncClient]:
    """As :func:`official_sqlite`."""
    async with AsyncSqliteSaver.from_conn_string(place) as saver:
        await saver.setup()
        await saver.conn.execute("PRAGMA synchronous = FULL")
        yield AsyncSaverClient(saver)


OFFICIAL_KWARGS: dict[str, Any] = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}


@contextmanager
def official_postgres(place: str) -> Iterator[Client]:
    """The official saver on a pool."""
    pool: ConnectionPool[Connection[DictRow]] = ConnectionPool(
        place, max_size=POOL, open=False, kwargs=OFFICIAL_KWARGS
    )
    with pool:
        saver = PostgresSaver(pool)
        saver.setup()
        yield SaverClient(saver)


@asynccontextmanager
async def _official_postgres(place: str) -> AsyncIterator[AsyncPostgresSaver]:
    pool: AsyncConnectionPool[AsyncConnection[DictRow]] = AsyncConnectionPool(
        place, max_size=POOL, open=False, kwargs=OFFICIAL_KWARGS
    )
    async with pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        yield saver


@asynccontextmanager
async def aofficial_postgres(place: str) -> AsyncIterator[AsyncClient]:
    """The official saver on a pool."""
    async with _official_postgres(place) as saver:
        yield AsyncSaverClient(saver)


@asynccontextmanager
async def unlocked_postgres(place: str) -> AsyncIterator[AsyncClient]:
    """The official saver on a pool, and nobody waits for anybody.

    In 3.2.0 ``AsyncPostgresSaver._cursor`` takes ``self.lock`` and then a connection of its own from the
    pool, so with a pool the lock protects nothing.
    """
    async with _official_postgres(place) as saver:
        saver.lock = cast(Any, nullcontext())
        yield AsyncSaverClient(saver)


@contextmanager
def bare_sqlite(place: str) -> Iterator[Client]:
    """The ``sqlite3`` module."""
    client = bare.Sqlite(Path(place))
    try:
        yield client
    finally:
        client.close()


@contextmanager
def bare_postgres(place: str) -> Iterator[Client]:
    """Psycopg."""
    with PostgresSaver.from_conn_string(place) as saver:
        saver.setup()
    pool: ConnectionPool[Connection[Any]] = ConnectionPool(
        place, max_size=POOL, open=False, kwargs={"autocommit": True}
    )
    with pool:
        yield bare.Postgres(pool)


@asynccontextmanager
async def abare_postgres(place: str) -> AsyncIterator[AsyncClient]:
    """As :func:`bare_postgres`."""
    async with AsyncPostgresSaver.from_conn_string(place) as saver:
        await saver.setup()
    pool: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
        place, max_size=POOL, open=False, kwargs={"autocommit": True}
    )
    async with pool:
        yield bare.AsyncPostgres(pool)


@asynccontextmanager
async def shared_postgres(place: str) -> AsyncIterator[AsyncClient]:
    """The bare driver's rows by the round trips of our saver."""
    async with abare_postgres(place):  # makes the tables
        pass
    settings = _settings()
    async with make_async_pool(Dsn.parse(place), settings) as pool:
        yield bare.SharedPostgres(pool)


def _sqlite_dsn(opener: Any) -> Any:
    """Ours takes a DSN where the others take a path."""
    return lambda place: opener(f"sqlite:///{place}")


SAVERS: dict[tuple[str, str], tuple[Contender, ...]] = {
    ("memory", "sync"): (
        Contender(OURS, lambda place: ours("memory://")),
        Contender(OFFICIAL, official_memory),
    ),
    ("sqlite", "sync"): (
        Contender(OURS, _sqlite_dsn(ours)),
        Contender(OFFICIAL, official_sqlite),
        Contender(BARE, bare_sqlite),
    ),
    ("sqlite", "async"): (
        Contender(OURS, _sqlite_dsn(aours)),
        Contender(OFFICIAL, aofficial_sqlite),
        Contender(BARE, bare_sqlite),
    ),
    ("postgres", "sync"): (
        Contender(OURS, ours),
        Contender(OFFICIAL, official_postgres),
        Contender(BARE, bare_postgres),
    ),
    ("postgres", "async"): (
        Contender(OURS, aours),
        Contender(OFFICIAL, aofficial_postgres),
        Contender(NO_LOCK, unlocked_postgres),
        Contender(BARE, abare_postgres),
        Contender(SHARED, shared_postgres),
    ),
}
"""By backend and colour. The bare ``sqlite3`` has one colour: it is the limit of both."""


@asynccontextmanager
async def our_store(place: str) -> AsyncIterator[BaseStore]:
    """Our store as ``aopen`` gives it."""
    async with persistence.aopen(place, settings=_settings()) as db:
        assert db.store is not None  # noqa: S101
        yield db.store


@asynccontextmanager
async def official_sqlite_store(place: str) -> AsyncIterator[BaseStore]:
    """The official store as its documentation opens it, in the journal mode of our database."""
    sqlite3.connect(place).execute("PRAGMA journal_mode = WAL").connection.close()
    async with AsyncSqliteStore.from_conn_string(place) as store:
        await store.setup()
        await store.conn.execute("PRAGMA synchronous = FULL")
        yield store


@asynccontextmanager
async def official_postgres_store(place: str) -> AsyncIterator[BaseStore]:
    """The official store on a pool, as its documentation opens it."""
    config: Any = {"min_size": 4, "max_size": POOL}
    async with AsyncPostgresStore.from_conn_string(place, pool_config=config) as store:
        await store.setup()
        yield store


STORES: dict[str, dict[str, StoreOpener]] = {
    "sqlite": {OURS: _sqlite_dsn(our_store), OFFICIAL: official_sqlite_store},
    "postgres": {OURS: our_store, OFFICIAL: official_postgres_store},
}
