"""LangGraph's SQLite store on a connection of its own, made at the first use."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any, cast

from langgraph.store.base import Op, Result
from langgraph.store.sqlite.base import SqliteStore as UpstreamStore

from persistence.backends.sqlite.connection import SqliteDatabase, translate, translated
from persistence.errors import ClosedError


class SqliteStore(UpstreamStore):
    """LangGraph's store, for both colours.

    It differs from LangGraph's in three ways: it connects at the first operation, a missing table
    is a clear error instead of being made then, and asynchronous calls run in a worker thread, so
    that a cancelled call still happens as a whole or not at all. ``batch`` is what every other
    method of a store goes through.
    """

    def __init__(self, database: SqliteDatabase) -> None:
        super().__init__(cast(sqlite3.Connection, _LazyConnection(database.connect)))
        self.is_setup = True  # the tables are made by persistence.schema
        self._where = database.name
        self._closed = False

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        if self._closed:
            raise ClosedError(f"the connection to {self._where} was closed")
        try:
            with translated(self._where):
                return super().batch(ops)
        except ValueError as error:
            # The store of checkpoint-sqlite 3.1.2 wraps SQLite's errors in this one when it reads.
            cause = error.__cause__
            if cause is not None and (ours := translate(cause, self._where)) is not None:
                raise ours from cause
            raise

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        return await asyncio.to_thread(self.batch, ops)

    def close(self, timeout: float) -> None:
        """Wait for the operation that runs, then close the connection."""
        self._closed = True
        self.stop_ttl_sweeper(timeout)
        if self.lock.acquire(timeout=timeout):
            try:
                self.conn.close()
            finally:
                self.lock.release()


class _LazyConnection:
    """Stands for a connection until the first statement; used under the store's lock only."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._conn: sqlite3.Connection | None = None
        self._functions: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def create_function(self, *args: Any, **kwargs: Any) -> None:
        # The store of checkpoint-sqlite 3.1.2 registers its matching function when it is made.
        self._functions.append((args, kwargs))

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()

    def __getattr__(self, name: str) -> Any:
        if self._conn is None:
            conn = self._connect()
            for args, kwargs in self._functions:
                conn.create_function(*args, **kwargs)
            self._conn = conn
        return getattr(self._conn, name)
