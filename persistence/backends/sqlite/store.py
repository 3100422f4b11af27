"""LangGraph's SQLite store on a connection of its own, made at the first use."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain, islice
from typing import Any, cast
from weakref import WeakKeyDictionary

from langgraph.store.base import Op, PutOp, Result
from langgraph.store.sqlite.base import SqliteStore as UpstreamStore

from persistence.backends.sqlite.connection import SqliteDatabase, error_code, translate, translated
from persistence.errors import ClosedError

_MOST_CALLS = 256
# Milliseconds for one try to get the write lock.
_TRY = 5
_Calls = list[tuple[list[Op], asyncio.Future[list[Result]]]]


class _Queue:
    """The calls of one event loop that wait."""

    def __init__(self) -> None:
        self.calls: _Calls = []
        self.is_running = False


class SqliteStore(UpstreamStore):
    """LangGraph's store, for both colours.

    It differs from LangGraph's in three ways: it connects at the first operation, a missing table
    is a clear error instead of being made then, and asynchronous calls run in a worker thread, so
    that a cancelled call still happens as a whole or not at all. Those that wait go together, and pay for one
    commit; if one fails, it fails alone. ``batch`` is what every other method of a store goes through.
    """

    def __init__(self, database: SqliteDatabase) -> None:
        super().__init__(cast(sqlite3.Connection, _LazyConnection(database.connect)))
        self.is_setup = True  # the tables are made by persistence.schema
        self._where, self._busy_timeout = database.name, database.busy_timeout
        self._closed = False
        self._thread = threading.local()
        self._queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue] = WeakKeyDictionary()

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        self._check_open()
        ops = list(ops)
        self._thread.writes = any(isinstance(op, PutOp) for op in ops)
        try:
            with translated(self._where):
                return super().batch(ops)
        except ValueError as error:
            # The store of checkpoint-sqlite 3.1.2 wraps SQLite's errors in this one when it reads.
            cause = error.__cause__
            if cause is not None and (ours := translate(cause, self._where)) is not None:
                raise ours from cause
            raise

    @contextmanager
    def _cursor(self, *, transaction: bool = True) -> Iterator[sqlite3.Cursor]:
        """As LangGraph's, but what has read and then writes has waited before, and what fails leaves nothing.

        A transaction that has read cannot write, and may not wait, once somebody else has written.
        """
        with self.lock, closing(self.conn.cursor()) as cursor:
            if not transaction:
                yield cursor
                return
            if self.conn.in_transaction:  # left by an interrupt
                self.conn.rollback()
            if self._thread.writes:
                self._begin(cursor)
            else:
                cursor.execute("BEGIN")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                if self.conn.in_transaction:
                    cursor.execute("ROLLBACK")
                raise

    def _begin(self, cursor: sqlite3.Cursor) -> None:
        """Wait for who writes by short naps, as the saver does: SQLite's own grow to a tenth of a second."""
        deadline = time.monotonic() + self._busy_timeout
        cursor.execute(f"PRAGMA busy_timeout = {_TRY}")
        try:
            while True:
                try:
                    cursor.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    if error_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise
                else:
                    return
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {round(self._busy_timeout * 1000)}")

    def setup(self) -> None:
        """Make LangGraph's tables; ``persistence setup`` does more."""
        self._check_open()
        self.is_setup = False
        with translated(self._where):
            super().setup()

    def sweep_ttl(self) -> int:
        """Delete the items whose time is over."""
        self._check_open()
        self._thread.writes = True
        with translated(self._where):
            return super().sweep_ttl()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the connection to {self._where} was closed")

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        loop = asyncio.get_running_loop()
        if (queue := self._queues.get(loop)) is None:
            queue = self._queues[loop] = _Queue()
        future: asyncio.Future[list[Result]] = loop.create_future()
        queue.calls.append((list(ops), future))
        if not queue.is_running:
            queue.is_running = True
            loop.call_soon(self._send, queue, loop)  # after the other tasks of this turn have called
        return await future

    def _send(self, queue: _Queue, loop: asyncio.AbstractEventLoop) -> None:
        calls, queue.calls = queue.calls[:_MOST_CALLS], queue.calls[_MOST_CALLS:]
        try:
            work = loop.run_in_executor(None, self._batches, [ops for ops, _ in calls])
        except RuntimeError as error:  # the loop, or the interpreter, has ended its threads
            queue.is_running = False
            for _, future in (*calls, *queue.calls):
                if not future.done():
                    future.set_exception(error)
            queue.calls = []
            return

        def deliver(done: asyncio.Future[list[list[Result] | Exception]]) -> None:
            queue.is_running = bool(queue.calls)
            if queue.is_running:
                self._send(queue, loop)
            _deliver(calls, done)

        work.add_done_callback(deliver)

    def _batches(self, many: list[list[Op]]) -> list[list[Result] | Exception]:
        if len(many) > 1:
            with suppress(Exception):  # whose it is, is seen below; to do them again changes nothing
                results = iter(self.batch(chain(*many)))
                return [list(islice(results, len(ops))) for ops in many]
        return [self._alone(ops) for ops in many]

    def _alone(self, ops: list[Op]) -> list[Result] | Exception:
        try:
            return self.batch(ops)
        except Exception as error:  # noqa: BLE001 - it belongs to the one who asked
            return error

    def close(self, timeout: float) -> None:
        """Wait for the operation that runs, then close the connection."""
        self._closed = True
        UpstreamStore.stop_ttl_sweeper(self, timeout)
        if self.lock.acquire(timeout=timeout):
            try:
                self.conn.close()
            finally:
                self.lock.release()


class AsyncSqliteStore(SqliteStore):
    """The store of an event loop: also what is no operation is awaited, as LangGraph has it."""

    async def setup(self) -> None:  # type: ignore[override]
        """As :meth:`SqliteStore.setup`."""
        await asyncio.to_thread(super().setup)

    async def sweep_ttl(self) -> int:  # type: ignore[override]
        """As :meth:`SqliteStore.sweep_ttl`."""
        return await asyncio.to_thread(super().sweep_ttl)

    async def start_ttl_sweeper(  # type: ignore[override]
        self, sweep_interval_minutes: int | None = None
    ) -> asyncio.Future[None]:
        """Does nothing, as for all stores of ours: they have no configuration of a time to live."""
        (done := asyncio.get_running_loop().create_future()).set_result(None)
        return done

    async def stop_ttl_sweeper(  # type: ignore[override]
        self,
        timeout: float | None = None,  # noqa: ASYNC109 - LangGraph's name
    ) -> bool:
        """Does nothing."""
        return True

    def __del__(self) -> None:
        """LangGraph's stops the sweeper, which is not there."""


def _deliver(calls: _Calls, done: asyncio.Future[list[list[Result] | Exception]]) -> None:
    if done.cancelled():  # the loop ends
        for _, future in calls:
            future.cancel()
        return
    for (_, future), result in zip(calls, done.result(), strict=True):
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


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
