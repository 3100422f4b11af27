"""As :mod:`persistence.backends.postgres.batches`, for threads: who has to wait shares a trip and a commit.

There is no thread beside those of the callers. Who comes back from the server wakes the one that has waited
longest, and that one takes along what the others want who wait.

The main thread always goes alone: Ctrl-C interrupts it, between any two lines, so nobody may depend on it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Hashable
from contextlib import suppress
from enum import Enum
from functools import partial
from threading import current_thread, main_thread
from time import monotonic

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg_pool import PoolTimeout

from persistence.backends.postgres.arguments import Statement
from persistence.backends.postgres.batches import (
    AT_ONCE,
    STALLED,
    STUCK,
    Rows,
    Sent,
    Size,
    next_queue,
    outcome,
    taken,
)
from persistence.backends.postgres.conflicts import again
from persistence.backends.postgres.connection import Pool, PoolConnection
from persistence.backends.postgres.wire import LARGE, size_of


class _Turn(Enum):
    """What a thread that waits is woken for."""

    LEAD = "to take all that waits to the server"
    ALONE = "to go alone"
    ANSWER = "its rows or its error are there"


class _Call:
    """An operation whose thread waits for its turn or for its answer."""

    __slots__ = ("_answer", "_woken", "begun", "has_place", "is_over", "key", "size", "statement", "turn")

    def __init__(self, statement: Statement, size: int, key: Hashable | None) -> None:
        self.statement = statement
        self.size = size
        self.key = key
        self.begun = monotonic()
        self.turn: _Turn | None = None
        self.has_place = False
        """It is one of those that are counted as busy."""
        self.is_over = False
        """Its thread has given up."""
        self._answer: Rows | Exception
        self._woken = threading.Lock()
        self._woken.acquire()

    def wait(self, seconds: float) -> _Turn | None:
        """What it is woken for; ``None`` if nobody does in this time."""
        return self.turn if self._woken.acquire(timeout=seconds) else None

    def wake(self, turn: _Turn) -> None:
        self.turn = turn
        self._woken.release()

    def give(self, answer: Rows | Exception) -> None:
        self._answer = answer
        self.wake(_Turn.ANSWER)

    def rows(self) -> Rows:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class _Batch(Sent[_Call]):
    """A batch of threads."""

    def run(self, conn: PoolConnection) -> None:
        """Come back when the server has answered or is lost; what went wrong is in ``error``."""
        begin = monotonic()
        try:
            conn.wait(self._steps(conn))
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait
            self.error = error
        self.seconds = monotonic() - begin

    def _steps(self, conn: PoolConnection) -> PQGen[None]:
        work = conn.wire.run_all([call.statement for call in self.calls], self.found.append)
        until = monotonic() + STUCK if len(self.calls) > 1 else math.inf
        with suppress(StopIteration):
            state = next(work)
            while True:
                ready = yield state  # at times without anything: then it looks at the clock
                if monotonic() > until:  # have the server end what it is doing
                    until = math.inf
                    self.is_stuck = True
                    with suppress(psycopg.Error):
                        conn.cancel_safe(timeout=5)
                state = work.send(ready)
        self.is_done = True


class ThreadBatches:
    """Runs single statements on a pool, for many threads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        # Apart, because who reads must not see what may be rolled back with its batch.
        self._reads: deque[_Call] = deque()
        self._writes: deque[_Call] = deque()
        self._size = Size()
        self._busy = 0
        self._answered = 0.0

    def read(self, statement: Statement) -> Rows:
        """Run a statement that changes nothing."""
        return self._run(statement, self._reads, None)

    def write(self, statement: Statement, key: Hashable | None = None) -> Rows:
        """Run a statement; no other one with the same key in the same transaction."""
        return self._run(statement, self._writes, key)

    def alone(self, statement: Statement) -> Rows:
        """Run a statement now, on a connection of its own."""
        return again(partial(self._once, statement))

    def _once(self, statement: Statement) -> Rows:
        # Not `with pool.connection()`: that also looks for a transaction to commit, and there is none.
        conn = self._pool.getconn()
        try:
            return conn.wait(conn.wire.run(*statement))
        finally:
            self._pool.putconn(conn)

    def _run(self, statement: Statement, queue: deque[_Call], key: Hashable | None) -> Rows:
        if (size := size_of(statement[1])) >= LARGE or current_thread() is main_thread():
            return self.alone(statement)
        call = _Call(statement, size, key)
        try:
            with self._lock:
                if self._busy < AT_ONCE:
                    self._take_place(call)
                else:
                    queue.append(call)
            return self.alone(statement) if call.has_place else self._wait(call, queue)
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt from the keyboard, wherever it came
                self._leave(call, queue)
            raise
        finally:
            if call.has_place:
                self._pass_on(call)

    def _wait(self, call: _Call, queue: deque[_Call]) -> Rows:
        while True:
            turn = call.wait(STALLED)
            if turn is _Turn.ANSWER:
                return call.rows()
            if turn is _Turn.ALONE:
                return self.alone(call.statement)
            if turn is _Turn.LEAD or self._is_left_waiting(call, queue):
                self._lead(call, queue)

    def _is_left_waiting(self, call: _Call, queue: deque[_Call]) -> bool:
        """Whether nobody has had an answer for long, and who waits gets a further connection."""
        with self._lock:
            is_stalled = monotonic() - self._answered > STALLED and self._busy < self._pool.max_size
            if not is_stalled or call not in queue:
                return False
            queue.remove(call)
            self._take_place(call)
            return True

    def _leave(self, call: _Call, queue: deque[_Call]) -> None:
        """The thread gives up: come back when it is certain what has become of the operation."""
        with self._lock:
            call.is_over = True
            is_under_way = call.turn is None and not call.has_place and call not in queue
        if is_under_way:
            call.wait(5)

    def _take_place(self, call: _Call) -> None:
        self._busy += 1
        call.has_place = True

    def _pass_on(self, call: _Call) -> None:
        """Leave one's place to who has waited longest."""
        with self._lock:
            self._answered = monotonic()
            call.has_place = False
            if (queue := next_queue(self._reads, self._writes)) is None:
                self._busy -= 1
            else:
                longest = queue.popleft()
                longest.has_place = True
                longest.wake(_Turn.LEAD)

    def _lead(self, call: _Call, queue: deque[_Call]) -> None:
        """Take to the server what waits, the caller's own first; then each of them is told more."""
        batch, is_lost = _Batch([]), True
        conn = self._connection(call)
        try:
            try:
                with self._lock:
                    call.turn = None
                    queue.appendleft(call)
                    batch = _Batch(taken(queue, self._size.most))
                batch.run(conn)
                self._size.learn(batch)
            finally:
                is_lost = conn.pgconn.transaction_status != TransactionStatus.IDLE
                self._pool.putconn(conn)
        finally:
            self._settle(batch, queue, lost=is_lost)
            if call.has_place:
                self._pass_on(call)
        if batch.error is not None and not isinstance(batch.error, Exception):
            raise batch.error

    def _connection(self, call: _Call) -> PoolConnection:
        timeout = self._pool.timeout
        try:
            return self._pool.getconn(max(0.0, call.begun + timeout - monotonic()))
        except PoolTimeout:
            raise PoolTimeout(f"couldn't get a connection after {timeout:.2f} sec") from None

    def _settle(self, batch: _Batch, queue: deque[_Call], *, lost: bool) -> None:
        """Give each call its answer or its error, or another turn."""
        end = outcome(batch, is_read=queue is self._reads, lost=lost)
        for call, answer in end.answers:
            call.give(answer)
        for call in end.alone:
            call.wake(_Turn.ALONE)
        with self._lock:
            for call in reversed(end.again):
                call.begun = monotonic()
                queue.appendleft(call)
