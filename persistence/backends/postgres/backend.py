"""An open Postgres database: one pool, the saver and the store on it."""

from __future__ import annotations

import threading
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

from persistence.backends.postgres.connection import AsyncPool, Pool, server_info, translated
from persistence.backends.postgres.savers import AsyncPostgresSaver, PostgresSaver
from persistence.backends.postgres.store import AsyncPostgresStore, PostgresStore
from persistence.contract import ServerInfo
from persistence.serializer import make_serializer
from persistence.settings import Settings


class PostgresBackend:
    """One pool, for synchronous code."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self.pool = pool
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

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the contract's name
        """As :meth:`PostgresBackend.close`."""
        await self._saver.aclose()
        if self._store is not None:
            await self._store.stop_ttl_sweeper(timeout)
        await self.pool.close(timeout)
