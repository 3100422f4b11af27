"""Group commit and readers beside it: how both colours run SQL on SQLite.

SQLite has one writer at a time, and a durable commit waits for the disk. So what waits to be written
is taken together, run in one transaction, and acknowledged after the commit: a hundred waiting
writers pay for one. Readers have connections of their own, and never wait for the writer.

A thread hop costs more than a small write, so a thread that finds nobody writing does its own write.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, Generic, TypeVar

from persistence.backends.sqlite.codec import load_metadata
from persistence.backends.sqlite.connection import SqliteDatabase, error_code, translate
from persistence.backends.sqlite.log import Log
from persistence.backends.sqlite.recent import Recent
from persistence.errors import ClosedError
from persistence.metadata import comparable, matches, run_text

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

_READERS = 4
_BATCH = 512
# Milliseconds for one try to get the write lock.
_TRY = 5


class _Job(Generic[T]):
    """Work that another thread does, for a thread that waits."""

    __slots__ = ("_done", "cancelled", "error", "result", "work")

    def __init__(self, work: Work[T]) -> None:
        self.work = work
        self.result: T
        self.error: BaseException | None = None
        self.cancelled = False
        self._done = threading.Lock()
        self._done.acquire()

    def settle(self) -> None:
        self._done.release()

    def wait(self, timeout: float = -1) -> T:
        try:
            if not self._done.acquire(timeout=timeout):
                raise TimeoutError
        except BaseException:  # an interrupt, too: what did not begin shall not happen
            self.cancelled = True
            raise
        return self.outcome()

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result


class _LoopJob(Generic[T]):
    """Work that another thread does, for a task of an event loop."""

    __slots__ = ("error", "future", "outbox", "result", "work")

    def __init__(self, work: Work[T], outbox: _Outbox) -> None:
        self.work = work
        self.result: T
        self.error: BaseException | None = None
        self.outbox = outbox
        self.future: asyncio.Future[T] = outbox.loop.create_future()

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()

    def settle(self) -> None:
        self.outbox.post(self)

    def deliver(self) -> None:
        if self.future.done():  # cancelled meanwhile; what it wrote is written
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class _Outbox:
    """What other threads finished for one event loop; it is woken once for all that waits.

    Waking a loop is a system call, and gives the interpreter lock away.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._jobs: deque[_LoopJob[Any]] = deque()
        self._woken = False

    def post(self, job: _LoopJob[Any]) -> None:
        self._jobs.append(job)
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, nobody waits
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before looking: what comes after the last look wakes the loop again
        while self._jobs:
            self._jobs.popleft().deliver()


class Engine:
    """Runs reads and writes on one database, for any number of threads and event loops."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self.recent = Recent()
        self._jobs: deque[_Job[Any] | _LoopJob[Any]] = deque()
        self._bell: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # Guards the promise that what was accepted before the close is carried out.
        self._accepting = threading.Lock()
        self._closed = False
        self._readers = None if database.path is None else _Readers(database)
        self._outbox: _Outbox | None = None
        # Held by whoever uses the writer's connection.
        self._writing = threading.Lock()
        self._conn: sqlite3.Connection | None = None
        self._log: Log | None = None
        # Who wrote last finds its rows in that connection's cache; the others' have to look them up.
        self._last: int | None = None
        self._commits = 0
        self._committed = 0
        self._drained = threading.Event()
        self._writer = threading.Thread(target=self._write, name="persistence-sqlite-writer", daemon=True)
        self._writer.start()

    def write(self, work: Work[T], *, atomic: bool = False) -> T:
        """Run ``work`` in a transaction of its own, as far as anybody can tell; it may run twice.

        Returns when the result is on disk. An interrupt before it began means that nothing is
        done; after that all of it is, or nothing. With ``atomic`` it writes by a single statement, a
        transaction by itself.
        """
        if self._jobs or self._writing.locked():
            job = _Job(work)
            self._enqueue(job)
            return job.wait()
        with self._writing:
            self.check_open()
            result = self._alone(work, atomic)
            self._last = threading.get_ident()
        return result

    def write_within(self, work: Work[T], timeout: float) -> T:
        """As :meth:`write`, but raise ``TimeoutError`` where it takes longer."""
        job = _Job(work)
        self._enqueue(job)
        return job.wait(timeout)

    def read_within(self, work: Work[T], timeout: float) -> T:
        """As :meth:`read`, but raise ``TimeoutError`` where it takes longer."""
        if self._readers is None:
            return self.write_within(work, timeout)
        job = _Job(work)
        with self._accepting:
            self.check_open()
            self._readers.submit(job)
        return job.wait(timeout)

    def figures(self) -> dict[str, float]:
        """How busy the writer is, and how many writes shared a commit so far."""
        return {
            "queue_length": len(self._jobs),
            "commits": self._commits,
            "committed_operations": self._committed,
        }

    def awrite(self, work: Work[T]) -> asyncio.Future[T]:
        """As :meth:`write`, in another thread."""
        job = _LoopJob(work, self._outbox_here())
        self._enqueue(job)
        return job.future

    def read(self, work: Work[T]) -> T:
        """Run ``work`` on one consistent snapshot."""
        if self._readers is None:  # in memory a reader would wait for the writer's lock
            return self.write(work)
        if self._last == threading.get_ident() and not self._jobs and not self._writing.locked():
            with self._writing:
                self.check_open()
                try:
                    return _run(self._connected(), work, self._database.name)
                except sqlite3.OperationalError as error:
                    if not _is_busy(error):
                        raise
        self.check_open()
        return self._readers.run(work)

    def aread(self, work: Work[T]) -> asyncio.Future[T]:
        """As :meth:`read`, in another thread."""
        if self._readers is None:
            return self.awrite(work)
        job = _LoopJob(work, self._outbox_here())
        with self._accepting:
            self.check_open()
            self._readers.submit(job)
        return job.future

    def check_open(self) -> None:
        """Raise ``ClosedError`` after the close."""
        if self._closed:
            raise ClosedError(f"the connection to {self._database.name} was closed")

    def close(self, timeout: float) -> None:
        """Finish what was accepted, within ``timeout`` seconds, and let go of all connections."""
        with self._accepting:
            if self._closed:
                return
            self._closed = True
            self._bell.put(False)
        deadline = time.monotonic() + timeout
        if self._readers is not None:
            # The writer goes last: only a connection that may write empties the log into the file.
            self._readers.close(timeout)
        self._drained.set()
        self._writer.join(max(0.0, deadline - time.monotonic()))

    def _enqueue(self, job: _Job[Any] | _LoopJob[Any]) -> None:
        with self._accepting:
            self.check_open()
            self._jobs.append(job)
            self._bell.put(True)

    def _outbox_here(self) -> _Outbox:
        loop = asyncio.get_running_loop()
        outbox = self._outbox
        if outbox is None or outbox.loop is not loop:
            outbox = self._outbox = _Outbox(loop)
        return outbox

    def _write(self) -> None:
        """The writer's thread."""
        while self._bell.get():
            self._write_waiting()
        self._drained.wait()
        with self._writing:
            if self._conn is not None:
                self._conn.close()
            if self._log is not None:
                self._log.close()

    def _write_waiting(self) -> None:
        # Its own function, so that nothing keeps a large value until there is more to write.
        with self._writing:
            waiting = [self._jobs.popleft() for _ in range(min(len(self._jobs), _BATCH))]
            batch = [job for job in waiting if not job.cancelled]
            if batch:
                self._commit(batch)
        for job in batch:
            job.settle()

    def _commit(self, batch: Sequence[_Job[Any] | _LoopJob[Any]]) -> None:
        """Do the jobs in one transaction; if one fails, each in its own, so that it fails alone."""
        try:
            conn = self._connected()
            self._begin(conn)
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            for job in batch:
                job.error = self._ours(error)
            return
        try:
            for job in batch:
                job.result = job.work(conn)
            conn.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - as above
            self._undo()
            if len(batch) == 1:
                batch[0].error = self._ours(error)
                return
        else:
            self._count(len(batch))
            return
        for job in batch:
            try:
                job.result = self._alone(job.work)
            except Exception as error:  # noqa: BLE001 - as above
                job.error = error

    def _alone(self, work: Work[T], atomic: bool = False) -> T:
        """Do one work in a transaction of its own."""
        try:
            conn = self._connected()
            if not atomic:
                self._begin(conn)
            result = work(conn)
            if not atomic:
                conn.execute("COMMIT")
        except BaseException as error:
            self._undo()
            if not isinstance(error, Exception):
                raise
            if not (atomic and _is_busy(error)):
                if (ours := self._ours(error)) is error:
                    raise
                raise ours from error
        else:
            self._count(1)
            return result
        return self._alone(work)

    def _count(self, operations: int) -> None:
        self._commits += 1
        self._committed += operations
        if self._log is not None:
            self._log.extend()

    def _undo(self) -> None:
        self.recent.clear()
        if self._conn is not None and self._conn.in_transaction:
            self._conn.rollback()

    def _connected(self) -> sqlite3.Connection:
        conn = self._conn
        if conn is None:
            conn = self._conn = _prepared(self._database.connect())
            conn.execute(f"PRAGMA busy_timeout = {_TRY}")
            self._log = self._database.log()
        self.recent.begin()
        if conn.in_transaction:  # interrupted twice, the second time before the first was undone
            conn.rollback()
        return conn

    def _begin(self, conn: sqlite3.Connection) -> None:
        """Wait for other processes, with short naps: those of SQLite grow to a tenth of a second.

        With six processes that write all the time it was 3 seconds until each had its turn.
        """
        deadline = time.monotonic() + self._database.busy_timeout
        while True:
            try:
                conn.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
            else:
                return

    def _ours(self, error: Exception) -> Exception:
        return translate(error, self._database.name) or error


class _Slot:
    """A connection for reading, made when it is needed, and the right to use it."""

    __slots__ = ("conn", "lock")

    def __init__(self) -> None:
        self.conn: sqlite3.Connection | None = None
        self.lock = threading.Lock()


class _Readers:
    """A few connections for reading, and as many threads for those who cannot wait in their own."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._slots = [_Slot() for _ in range(_READERS)]
        self._jobs: queue.SimpleQueue[_Job[Any] | _LoopJob[Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, job: _Job[Any] | _LoopJob[Any]) -> None:
        self._jobs.put(job)
        if not self._threads:
            for number in range(_READERS):
                name = f"persistence-sqlite-reader-{number}"
                self._threads.append(threading.Thread(target=self._read, name=name, daemon=True))
                self._threads[-1].start()

    def run(self, work: Work[T]) -> T:
        free = (slot for slot in self._slots if not slot.lock.locked())
        slot = next(free, None) or self._slots[threading.get_ident() % _READERS]
        with slot.lock:  # an interrupt cannot lose it, as it could lose what a queue hands out
            if self._closed:
                raise ClosedError(f"the connection to {self._database.name} was closed")
            if slot.conn is None:
                slot.conn = _prepared(self._database.connect(readonly=True))
            return _run(slot.conn, work, self._database.name)

    def close(self, timeout: float) -> None:
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + timeout
        for slot in self._slots:
            if slot.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                if slot.conn is not None:
                    slot.conn.close()
                slot.lock.release()

    def _read(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._answer(job)
            del job  # with its result, which may be large

    def _answer(self, job: _Job[Any] | _LoopJob[Any]) -> None:
        if job.cancelled:
            return
        try:
            job.result = self.run(job.work)
        except Exception as error:  # noqa: BLE001 - it belongs to the one who waits
            job.error = error
        job.settle()


def _is_busy(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error_code(error) == sqlite3.SQLITE_BUSY


def _run(conn: sqlite3.Connection, work: Work[T], where: str) -> T:
    if conn.in_transaction:  # left by an interrupt
        conn.rollback()
    try:
        return work(conn)
    except sqlite3.Error as error:
        ours = translate(error, where)
        raise ours or error from error


@contextmanager
def snapshot(conn: sqlite3.Connection) -> Iterator[None]:
    """A block whose statements all see the same state of the database."""
    if conn.in_transaction:
        yield
        return
    conn.execute("BEGIN")
    try:
        yield
    finally:
        conn.rollback()


def _prepared(conn: sqlite3.Connection) -> sqlite3.Connection:
    conn.create_function("persistence_matches", 2, _matches, deterministic=True)
    conn.create_function("persistence_run", 1, _run_id, deterministic=True)
    return conn


def _matches(metadata: bytes | str | None, wanted: str) -> bool:
    return matches(load_metadata(metadata), _wanted(wanted))


@lru_cache(64)
def _wanted(wanted: str) -> dict[str, Any]:
    return {key: comparable(value) for key, value in json.loads(wanted).items()}


def _run_id(metadata: bytes | str | None) -> str | None:
    return run_text(load_metadata(metadata))
