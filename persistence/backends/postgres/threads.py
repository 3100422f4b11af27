"""As :mod:`persistence.backends.postgres.batches`, for threads: who has to wait shares a trip and a commit.

There is no thread beside those of the callers. Who comes back from the server wakes the one that has waited
longest, and that one takes along what the others want who wait.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Hashable
from contextlib import suppress
from enum import Enum
from time import monotonic

import psycopg
from psycopg.abc import PQGen
from psycopg_pool import PoolTimeout

from persistence.backends.postgres.arguments import Statement
from persistence.backends.postgres.batches import (
    AT_ONCE,
    ATTEMPTS,
    CONFLICTS,
    STALLED,
    STUCK,
    Rows,
    Sent,
    Size,
    next_queue,
    outcome,
    taken,
)
from persistence.backends.postgres.connection import Pool, PoolConnection
from persistence.backends.postgres.wire import LARGE, size_of


class _Turn(Enum):
    """What a thread that waits is woken for."""

    LEAD = "to take all that waits to the server"
    ALONE = "to go alone"
    ANSWER = "its rows or its error are there"


class _Call:
    """An operation whose thread waits for its turn or for its answer."""

    __slots__ = ("_answer", "_woken", "begun", "key", "size", "statement", "turn")
    is_over = False  # who gives up takes its call out of the queue

    def __init__(self, statement: Statement, size: int, key: Hashable | None) -> None:
        self.statement = statement
        self.size = size
        self.key = key
        self.begun = monotonic()
        self.turn: _Turn | None = None
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
        for _ in range(1, ATTEMPTS):
            with suppress(*CONFLICTS):
                return self._once(statement)
        return self._once(statement)

    def _once(self, statement: Statement) -> Rows:
        # Not `with pool.connection()`: that also looks for a transaction to commit, and there is none.
        conn = self._pool.getconn()
        try:
            return conn.wait(conn.wire.run(*statement))
        finally:
            self._pool.putconn(conn)

    def _run(self, statement: Statement, queue: deque[_Call], key: Hashable | None) -> Rows:
        if (size := size_of(statement[1])) >= LARGE:
            return self.alone(statement)
        call = None
        with self._lock:
            if self._busy < AT_ONCE:
                self._busy += 1
            else:
                call = _Call(statement, size, key)
                queue.append(call)
        if call is not None:
            return self._wait(call, queue)
        try:
            return self.alone(statement)
        finally:
            self._pass_on()

    def _wait(self, call: _Call, queue: deque[_Call]) -> Rows:
        while True:
            try:
                turn = call.wait(STALLED)
            except BaseException:
                self._leave(call, queue)
                raise
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
            self._busy += 1
            return True

    def _leave(self, call: _Call, queue: deque[_Call]) -> None:
        """The thread gives up, as at an interrupt from the keyboard."""
        with self._lock:
            if call in queue:
                queue.remove(call)
                return
        if call.turn is None:  # under way: come back when it is certain what has become of it
            call.wait(5)
        if call.turn is _Turn.LEAD:
            self._pass_on()

    def _pass_on(self) -> None:
        """Leave one's place to who has waited longest."""
        with self._lock:
            self._answered = monotonic()
            if (queue := next_queue(self._reads, self._writes)) is None:
                self._busy -= 1
            else:
                queue.popleft().wake(_Turn.LEAD)

    def _lead(self, call: _Call, queue: deque[_Call]) -> None:
        """Take to the server what waits, the caller's own first; then each of them is told more."""
        try:
            conn = self._connection(call)
            try:
                with self._lock:
                    call.turn = None
                    queue.appendleft(call)
                    batch = _Batch(taken(queue, self._size.most))
                batch.run(conn)
                self._size.learn(batch)
                is_lost = conn.closed
            finally:
                self._pool.putconn(conn)
            self._settle(batch, queue, lost=is_lost)
            if batch.error is not None and not isinstance(batch.error, Exception):
                self._leave(call, queue)
                raise batch.error
        finally:
            self._pass_on()

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
