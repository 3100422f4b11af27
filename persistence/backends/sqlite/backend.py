"""An open SQLite database: the saver and the store on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

from persistence.backends.sqlite.connection import SqliteDatabase
from persistence.backends.sqlite.savers import AsyncSqliteSaver, SqliteSaver
from persistence.backends.sqlite.store import AsyncSqliteStore, SqliteStore
from persistence.contract import Probe, ServerInfo
from persistence.serializer import make_serializer
from persistence.settings import Settings


class _Sqlite:
    """What both colours share."""

    _store_class: type[SqliteStore]

    def __init__(self, database: SqliteDatabase, saver: SqliteSaver | AsyncSqliteSaver) -> None:
        self._database = database
        self._saver = saver
        self._store: SqliteStore | None = None
        self._lock = threading.Lock()

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """The saver."""
        return self._saver

    def store(self) -> BaseStore:
        """The store, on a connection that the first operation makes."""
        with self._lock:
            if self._store is None:
                self._store = self._store_class(self._database)
            return self._store

    def figures(self) -> Mapping[str, float]:
        """The writer's."""
        return self._saver.figures()

    def _probe(self, timeout: float) -> Probe:
        return self._saver.probe(timeout)

    def _ping(self) -> ServerInfo:
        conn = self._database.connect(readonly=True)
        conn.close()
        return self._database.describe()

    def _close_database(self, timeout: float) -> None:
        if self._store is not None:
            self._store.close(timeout)
        self._database.close()


class SqliteBackend(_Sqlite):
    """A SQLite database for synchronous code."""

    _store_class = SqliteStore

    def __init__(self, database: SqliteDatabase, settings: Settings) -> None:
        super().__init__(database, SqliteSaver(database, serde=make_serializer(settings)))

    def ping(self) -> ServerInfo:
        """Read the file's header."""
        return self._ping()

    def probe(self, timeout: float) -> Probe:
        """By the saver's writer and readers."""
        return self._probe(timeout)

    def close(self, timeout: float) -> None:
        """Wait for what the writer has taken, then close every connection."""
        self._saver.close(timeout)
        self._close_database(timeout)


class AsyncSqliteBackend(_Sqlite):
    """A SQLite database for an event loop."""

    _store_class = AsyncSqliteStore

    def __init__(self, database: SqliteDatabase, settings: Settings) -> None:
        super().__init__(database, AsyncSqliteSaver(database, serde=make_serializer(settings)))

    async def ping(self) -> ServerInfo:
        """As :meth:`SqliteBackend.ping`."""
        return await asyncio.to_thread(self._ping)

    async def probe(self, timeout: float) -> Probe:  # noqa: ASYNC109 - the contract's name
        """As :meth:`SqliteBackend.probe`, in a thread of its own: the loop's own ones may all be busy."""
        thread = ThreadPoolExecutor(1, "persistence-health")
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, self._probe, timeout)
        finally:
            thread.shutdown(wait=False)

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the contract's name
        """As :meth:`SqliteBackend.close`."""
        await self._saver.aclose(timeout)
        await asyncio.to_thread(self._close_database, timeout)
