"""Operations of many tasks in one round trip and one commit.

Half of what a small operation costs, here and on the server, is the way there and back: waking up,
sending, waiting, committing. So while :data:`_AT_ONCE` connections are busy, what arrives waits, and the
next one that is free takes all of it, as one pipeline: an implicit transaction, behind PgBouncer, too.
Who finds a connection free goes at once and alone.

Each operation keeps its own error. If one fails in a batch, nothing of the batch is stored; that one
goes alone, and the others together again. An operation is acknowledged after the commit.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextvars import Context
from time import monotonic
from typing import Any

import psycopg
from psycopg import capabilities
from psycopg.abc import PQGen
from psycopg_pool import PoolTimeout

from persistence.backends.postgres.arguments import Statement
from persistence.backends.postgres.connection import AsyncPool, AsyncPoolConnection
from persistence.backends.postgres.wire import LARGE, size_of

Rows = list[tuple[Any, ...]]

_AT_ONCE = 4 if capabilities.has_pipeline() else sys.maxsize
"""Connections in use, above which operations wait for each other: enough for what one event loop can send."""
_MOST = 32
"""Operations in one batch."""
_STALLED = 0.05
"""Seconds without any answer, after which those who wait get a further connection."""
_STUCK = 1.0
"""Seconds after which a batch is given up: the lock that stops one operation must not stop the others."""
_LONG = _STUCK / 4
"""Seconds that a batch may take and the next ones be larger."""


class _Call:
    """An operation that waits for its turn or for its answer."""

    __slots__ = ("begun", "future", "key", "size", "statement", "stop", "work")

    def __init__(self, statement: Statement, size: int, key: Hashable | None) -> None:
        self.statement = statement
        self.size = size
        self.key = key
        self.begun = monotonic()
        self.future: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self.wait()

    def wait(self) -> None:
        """It is not under way, or not any more."""
        self.work: asyncio.Future[None] | None = None
        self.stop: Callable[[], object] | None = None  # it leads to the batch: so no cycle is left behind

    def start(self, work: asyncio.Future[None], stop: Callable[[], object]) -> None:
        """It is under way until ``work`` is over, which ``stop`` brings about."""
        self.work, self.stop = work, stop

    def answer(self, rows: Rows) -> None:
        if not self.future.done():  # else the caller has gone
            self.future.set_result(rows)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    async def leave(self) -> None:
        """The caller gives up: come back when it is certain what has become of the operation."""
        if self.work is not None and self.stop is not None:
            self.stop()
            await asyncio.wait([self.work])


class _Batch:
    """Calls that are on their way together."""

    def __init__(self, conn: AsyncPoolConnection, calls: Sequence[_Call]) -> None:
        self.calls = calls
        self.found: list[Rows] = []
        """The answers until now; those to writes are true only when all is done."""
        self.is_done = False
        self.is_stuck = False
        self.seconds = 0.0
        self.error: Exception | None = None
        self._conn = conn
        self._interrupted = False
        self._work = asyncio.ensure_future(self._do())
        for call in calls:
            call.start(self._work, self._interrupt)

    async def run(self) -> None:
        """Come back when the server has answered or is lost; what went wrong is in ``error``."""
        timer = None
        if len(self.calls) > 1:
            timer = asyncio.get_running_loop().call_later(_STUCK, self._give_up)
        begin = monotonic()
        try:
            await asyncio.wait([self._work])
            self.seconds = monotonic() - begin
        except asyncio.CancelledError:  # the event loop ends
            self._interrupt()
            await asyncio.wait([self._work])
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _give_up(self) -> None:
        self.is_stuck = True
        self._interrupt()

    def _interrupt(self) -> None:
        """Have the server end what it is doing."""
        if not self._interrupted:  # at a second time the driver would drop the connection
            self._interrupted = True
            self._work.cancel()

    async def _do(self) -> None:
        try:
            await self._conn.wait(self._steps())
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            self.error = error

    def _steps(self) -> PQGen[None]:
        yield from self._conn.wire.run_all([call.statement for call in self.calls], self.found.append)
        self.is_done = True


class Batches:
    """Runs single statements on a pool, for the tasks of one event loop."""

    def __init__(self, pool: AsyncPool) -> None:
        self._pool = pool
        # Apart, because who reads must not see what may be rolled back with its batch.
        self._reads: deque[_Call] = deque()
        self._writes: deque[_Call] = deque()
        self._most = _MOST
        self._busy = 0
        self._answered = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def read(self, statement: Statement) -> Awaitable[Rows]:
        """Run a statement that changes nothing."""
        return self._run(statement, self._reads, None)

    def write(self, statement: Statement, key: Hashable | None = None) -> Awaitable[Rows]:
        """Run a statement; no other one with the same key in the same transaction."""
        return self._run(statement, self._writes, key)

    async def alone(self, statement: Statement) -> Rows:
        """Run a statement now, on a connection of its own."""
        conn = await self._pool.getconn()
        try:
            return await conn.exchange(*statement)
        finally:
            await self._pool.putconn(conn)

    async def _run(self, statement: Statement, queue: deque[_Call], key: Hashable | None) -> Rows:
        if (size := size_of(statement[1])) >= LARGE:
            return await self.alone(statement)
        if self._busy < _AT_ONCE:
            self._busy += 1
            try:
                return await self.alone(statement)
            finally:
                self._busy -= 1
                self._answered = monotonic()
                if self._reads or self._writes:
                    self._begin()
        call = _Call(statement, size, key)
        queue.append(call)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_STALLED, self._look)
        try:
            return await call.future
        except asyncio.CancelledError:
            await call.leave()
            raise

    def _begin(self) -> None:
        self._busy += 1
        self._spawn(self._work())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # In a context of its own: it has nothing to do with the task that happens to be here.
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _look(self) -> None:
        """See whether those who wait are served."""
        self._timer = None
        if self._reads or self._writes:
            if monotonic() - self._answered > _STALLED and self._busy < self._pool.max_size:
                self._begin()
            self._timer = asyncio.get_running_loop().call_later(_STALLED, self._look)

    async def _work(self) -> None:
        try:
            while (queue := self._longest_waiting()) is not None:
                await self._serve(queue)
                self._answered = monotonic()
                await asyncio.sleep(0)  # who has its answer asks for more
        finally:
            self._busy -= 1

    def _longest_waiting(self) -> deque[_Call] | None:
        for queue in (self._reads, self._writes):
            while queue and queue[0].future.done():  # cancelled
                queue.popleft()
        if self._reads and self._writes:
            return min(self._reads, self._writes, key=lambda queue: queue[0].begun)
        return self._reads or self._writes or None

    async def _serve(self, queue: deque[_Call]) -> None:
        try:
            conn = await self._pool.getconn(max(0.0, queue[0].begun + self._pool.timeout - monotonic()))
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            self._refuse(queue, error)
            return
        calls = _taken(queue, self._most)
        try:
            if calls:
                batch = _Batch(conn, calls)
                await batch.run()
                self._adapt(batch)
                self._settle(batch, queue, lost=conn.closed)
        except BaseException:
            for call in calls:
                call.future.cancel()
            raise
        finally:
            await self._pool.putconn(conn)

    def _refuse(self, queue: deque[_Call], error: Exception) -> None:
        """There is no connection: an error for all whose time is up, or for all if it is not about time."""
        is_late = isinstance(error, PoolTimeout)
        if is_late:
            error = PoolTimeout(f"couldn't get a connection after {self._pool.timeout:.2f} sec")
        bound = monotonic() - self._pool.timeout
        while queue and (not is_late or queue[0].begun <= bound):
            queue.popleft().fail(error)

    def _adapt(self, batch: _Batch) -> None:
        """Batches are as large as this server manages in time: what it did of a larger one is lost."""
        if batch.is_stuck:
            self._most = max(1, len(batch.found) // 2)
        elif batch.is_done and batch.seconds < _LONG:
            self._most = min(_MOST, self._most * 2)

    def _settle(self, batch: _Batch, queue: deque[_Call], *, lost: bool) -> None:
        """Give each call its answer or its error, or another turn."""
        calls, at = list(batch.calls), len(batch.found)
        for call in calls:
            call.wait()
        if batch.is_done or queue is self._reads:
            for call, rows in zip(calls, batch.found, strict=False):
                call.answer(rows)
            calls, at = calls[at:], 0
        if not calls:
            return
        if lost:  # what became of them nobody knows
            for call in calls:
                call.fail(psycopg.OperationalError(str(batch.error or "the server did not end a batch")))
        elif len(batch.calls) == 1 and batch.error is not None:
            calls[0].fail(batch.error)
        elif at < len(calls):
            self._go_alone(calls.pop(at))
            for call in reversed(calls):
                call.begun = monotonic()
                queue.appendleft(call)
        else:  # the commit failed
            for call in calls:
                self._go_alone(call)

    def _go_alone(self, call: _Call) -> None:
        async def go() -> None:
            try:
                call.answer(await self.alone(call.statement))
            except Exception as error:  # noqa: BLE001 - it belongs to the one who waits
                call.fail(error)

        if not call.future.done():
            task = self._spawn(go())
            call.start(task, task.cancel)


def _taken(queue: deque[_Call], most: int) -> list[_Call]:
    """The calls of the next batch."""
    calls: list[_Call] = []
    keys: set[Hashable] = set()
    size = 0
    while queue and len(calls) < most and size < LARGE:
        call = queue[0]
        if call.key is not None and call.key in keys:
            break
        queue.popleft()
        if not call.future.done():
            calls.append(call)
            keys.add(call.key)
            size += call.size
    return calls
