"""An open Postgres database: one pool, the saver and the store on it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

from persistence.backends.postgres.connection import AsyncPool, Pool, server_info, translated
from persistence.backends.postgres.home import Home
from persistence.backends.postgres.probe import aprobe, probe
from persistence.backends.postgres.savers import AsyncPostgresSaver, PostgresSaver
from persistence.backends.postgres.store import AsyncPostgresStore, PostgresStore
from persistence.contract import Probe, ServerInfo
from persistence.serializer import make_serializer
from persistence.settings import Settings

# What of the pool's own statistics is told, and by which name.
_FIGURES = {
    "pool_max": "pool_max",
    "pool_size": "pool_size",
    "pool_available": "pool_available",
    "pool_waiting": "requests_waiting",
    "pool_requests": "requests_num",
    "pool_requests_queued": "requests_queued",
    "pool_wait_ms": "requests_wait_ms",
    "pool_errors": "requests_errors",
    "pool_connections_lost": "connections_lost",
}


class PostgresBackend:
    """One pool, for synchronous code."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self.pool = pool
        self._schema = settings.db_schema
        self._saver = PostgresSaver(pool, serde=make_serializer(settings))
        self._store: PostgresStore | None = None
        self._lock = threading.Lock()

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """The saver on the pool."""
        return self._saver

    def store(self) -> BaseStore:
        """The store on the same pool."""
        with self._lock:
            if self._store is None:
                self._store = PostgresStore(self.pool)
            return self._store

    def ping(self) -> ServerInfo:
        """One round trip."""
        with translated(self.pool.name), self.pool.connection() as conn:
            conn.execute("")
            return server_info(conn)

    def probe(self, timeout: float) -> Probe:
        """By a connection of the pool."""
        return probe(self.pool, self._schema, timeout)

    def figures(self) -> Mapping[str, float]:
        """The pool's."""
        return _figures(self.pool)

    def close(self, timeout: float) -> None:
        """Close the pool; a connection in use is closed when its user gives it back."""
        self._saver.close()
        if self._store is not None:
            self._store.stop_ttl_sweeper(timeout)
        self.pool.close(timeout)


class AsyncPostgresBackend:
    """As :class:`PostgresBackend`, for an event loop."""

    def __init__(self, pool: AsyncPool, settings: Settings) -> None:
        self.pool = pool
        self._schema = settings.db_schema
        self._home = Home("the pool")
        self._saver = AsyncPostgresSaver(pool, serde=make_serializer(settings))
        self._store: AsyncPostgresStore | None = None

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """The saver on the pool."""
        return self._saver

    def store(self) -> BaseStore:
        """The store on the same pool."""
        if self._store is None:
            self._store = AsyncPostgresStore(self.pool)
        return self._store

    async def ping(self) -> ServerInfo:
        """One round trip."""
        with translated(self.pool.name):
            async with self.pool.connection() as conn:
                await conn.execute("")
                return server_info(conn)

    async def probe(self, timeout: float) -> Probe:  # noqa: ASYNC109 - the contract's name
        """As :meth:`PostgresBackend.probe`."""
        return await aprobe(self.pool, self._schema, timeout)

    def figures(self) -> Mapping[str, float]:
        """As :meth:`PostgresBackend.figures`."""
        return _figures(self.pool)

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the contract's name
        """As :meth:`PostgresBackend.close`; on another event loop, if the pool's own has ended."""
        await self._saver.aclose()
        if not self._home.runs:
            self.pool.abandon()
            return
        await self._home.here(self._close(timeout))

    async def _close(self, timeout: float) -> None:  # noqa: ASYNC109 - the contract's name
        if self._store is not None:
            await self._store.stop_ttl_sweeper(timeout)
        await self.pool.close(timeout)


def _figures(pool: Pool | AsyncPool) -> dict[str, float]:
    found = pool.get_stats()
    return {name: found.get(key, 0) for name, key in _FIGURES.items()}
