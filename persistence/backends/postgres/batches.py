"""Operations of many tasks in one round trip and one commit.

Half of what a small operation costs, here and on the server, is the way there and back: waking up,
sending, waiting, committing. So while :data:`AT_ONCE` connections are busy, what arrives waits, and the
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
from functools import partial
from time import monotonic
from typing import Any, Generic, NamedTuple, Protocol, TypeGuard, TypeVar

import psycopg
from psycopg import capabilities, errors
from psycopg.abc import PQGen
from psycopg_pool import PoolTimeout

from persistence.backends.postgres.arguments import Statement
from persistence.backends.postgres.conflicts import CONFLICTS, again_async
from persistence.backends.postgres.connection import AsyncPool, AsyncPoolConnection
from persistence.backends.postgres.wire import LARGE, size_of

Rows = list[tuple[Any, ...]]

AT_ONCE = 4 if capabilities.has_pipeline() else sys.maxsize
"""Connections in use, above which operations wait for each other: enough for what one event loop can send."""
MOST = 32
"""Operations in one batch."""
STALLED = 0.05
"""Seconds without any answer, after which those who wait get a further connection."""
STUCK = 1.0
"""Seconds after which a batch is given up: the lock that stops one operation must not stop the others."""
_LONG = STUCK / 4
"""Seconds that a batch may take and the next ones be larger."""


class Waiting(Protocol):
    """An operation that waits, as those who choose the next batch see it."""

    begun: float
    key: Hashable | None
    size: int

    @property
    def is_over(self) -> bool:
        """Nobody waits for it any more."""


C = TypeVar("C")
W = TypeVar("W", bound=Waiting)


class Sent(Generic[C]):
    """Calls that are on their way together, or were."""

    def __init__(self, calls: Sequence[C]) -> None:
        self.calls = calls
        self.found: list[Rows] = []
        """The answers that came; those to writes are true only when all is done."""
        self.is_done = False
        self.is_stuck = False
        """It was given up because it took too long."""
        self.seconds = 0.0
        """It took until it was back."""
        self.error: BaseException | None = None


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

    @property
    def is_over(self) -> bool:
        """Nobody waits for it any more."""
        return self.future.done()

    async def leave(self) -> None:
        """The caller gives up: come back when it is certain what has become of the operation."""
        if self.work is not None and self.stop is not None:
            self.stop()
            await asyncio.wait([self.work])


class _Batch(Sent[_Call]):
    """A batch of tasks."""

    def __init__(self, conn: AsyncPoolConnection, calls: Sequence[_Call]) -> None:
        super().__init__(calls)
        self._conn = conn
        self._interrupted = False
        self._work = asyncio.ensure_future(self._do())
        for call in calls:
            call.start(self._work, self._interrupt)

    async def run(self) -> None:
        """Come back when the server has answered or is lost; what went wrong is in ``error``."""
        timer = None
        if len(self.calls) > 1:
            timer = asyncio.get_running_loop().call_later(STUCK, self._give_up)
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
        try:
            yield from self._conn.wire.run_all([call.statement for call in self.calls], self.found.append)
        except psycopg.Error as error:
            # Not through the driver, which drops what it cancels and what then ends with another error.
            self.error = error
        else:
            self.is_done = True


class Batches:
    """Runs single statements on a pool, for the tasks of one event loop."""

    def __init__(self, pool: AsyncPool) -> None:
        self._pool = pool
        # Apart, because who reads must not see what may be rolled back with its batch.
        self._reads: deque[_Call] = deque()
        self._writes: deque[_Call] = deque()
        self._size = Size()
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

    def alone(self, statement: Statement) -> Awaitable[Rows]:
        """Run a statement now, on a connection of its own."""
        return again_async(partial(self._once, statement))

    async def _once(self, statement: Statement) -> Rows:
        conn = await self._pool.getconn()
        try:
            return await conn.exchange(*statement)
        finally:
            await self._pool.putconn(conn)

    async def _run(self, statement: Statement, queue: deque[_Call], key: Hashable | None) -> Rows:
        if (size := size_of(statement[1])) >= LARGE:
            return await self.alone(statement)
        if self._busy < AT_ONCE:
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
            self._timer = asyncio.get_running_loop().call_later(STALLED, self._look)
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
            if monotonic() - self._answered > STALLED and self._busy < self._pool.max_size:
                self._begin()
            self._timer = asyncio.get_running_loop().call_later(STALLED, self._look)

    async def _work(self) -> None:
        try:
            while (queue := next_queue(self._reads, self._writes)) is not None:
                await self._serve(queue)
                self._answered = monotonic()
                await asyncio.sleep(0)  # who has its answer asks for more
        finally:
            self._busy -= 1

    async def _serve(self, queue: deque[_Call]) -> None:
        try:
            conn = await self._pool.getconn(max(0.0, queue[0].begun + self._pool.timeout - monotonic()))
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            self._refuse(queue, error)
            return
        calls = taken(queue, self._size.most)
        try:
            if calls:
                batch = _Batch(conn, calls)
                await batch.run()
                self._size.learn(batch)
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

    def _settle(self, batch: _Batch, queue: deque[_Call], *, lost: bool) -> None:
        """Give each call its answer or its error, or another turn."""
        for call in batch.calls:
            call.wait()
        end = outcome(batch, is_read=queue is self._reads, lost=lost)
        for call, answer in end.answers:
            if isinstance(answer, Exception):
                call.fail(answer)
            else:
                call.answer(answer)
        for call in end.alone:
            self._go_alone(call)
        for call in reversed(end.again):
            call.begun = monotonic()
            queue.appendleft(call)

    def _go_alone(self, call: _Call) -> None:
        async def go() -> None:
            try:
                call.answer(await self.alone(call.statement))
            except Exception as error:  # noqa: BLE001 - it belongs to the one who waits
                call.fail(error)

        if not call.future.done():
            task = self._spawn(go())
            call.start(task, task.cancel)


def next_queue(reads: deque[W], writes: deque[W]) -> deque[W] | None:
    """Where the one is that has waited longest; ``None`` if nobody waits."""
    for queue in (reads, writes):
        while queue and queue[0].is_over:
            queue.popleft()
    if reads and writes:
        return min(reads, writes, key=lambda queue: queue[0].begun)
    return reads or writes or None


def taken(queue: deque[W], most: int) -> list[W]:
    """The calls of the next batch, out of their queue."""
    calls: list[W] = []
    keys: set[Hashable] = set()
    size = 0
    while queue and len(calls) < most and size < LARGE:
        call = queue[0]
        if call.key is not None and call.key in keys:
            break
        queue.popleft()
        if not call.is_over:
            calls.append(call)
            keys.add(call.key)
            size += call.size
    return calls


class Size:
    """How many operations go together: as many as this server manages in time; the rest would be lost."""

    def __init__(self) -> None:
        self.most = MOST

    def learn(self, batch: Sent[Any]) -> None:
        """See how a batch fared."""
        if batch.is_stuck:
            self.most = max(1, len(batch.found) // 2)
        elif batch.is_done and batch.seconds < _LONG:
            self.most = min(MOST, self.most * 2)


class Outcome(NamedTuple, Generic[C]):
    """What becomes of the calls of a batch."""

    answers: list[tuple[C, Rows | Exception]]
    alone: list[C]
    again: list[C]


def outcome(batch: Sent[C], *, is_read: bool, lost: bool) -> Outcome[C]:
    """Who of a batch has an answer, who is to go alone, who once more with others."""
    calls, at = list(batch.calls), len(batch.found)
    answers: list[tuple[C, Rows | Exception]] = []
    if batch.is_done or is_read:
        answers += zip(calls, batch.found, strict=False)
        calls, at = calls[at:], 0
    if lost:  # what became of them nobody knows
        text = str(batch.error or "the server did not end a batch")
        answers += [(call, psycopg.OperationalError(text)) for call in calls]
    elif len(batch.calls) == 1 and _is_final(batch.error):
        answers += [(call, batch.error) for call in calls]
    elif at < len(calls):
        return Outcome(answers, [calls.pop(at)], calls)
    else:  # the commit failed, if any are left
        return Outcome(answers, calls, [])
    return Outcome(answers, [], [])


def _is_final(error: BaseException | None) -> TypeGuard[Exception]:
    # What was prepared is gone after a DEALLOCATE ALL, and alone it goes without: see Wire.run.
    again = (*CONFLICTS, errors.InvalidSqlStatementName)
    return isinstance(error, Exception) and not isinstance(error, again)
