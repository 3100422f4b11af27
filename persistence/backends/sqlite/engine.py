"""One writer thread with group commit, and readers beside it: how both colours run SQL on SQLite.

SQLite has one writer at a time, and a durable commit waits for the disk. So one thread takes all
writes that wait, runs them in one transaction, each in its own savepoint, and acknowledges them
after the commit: a hundred waiting writers pay for one. Readers have connections of their own.
"""

from __future__ import annotations

import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from persistence.backends.sqlite.connection import SqliteDatabase, translate
from persistence.errors import ClosedError
from persistence.metadata import comparable, matches

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

_READERS = 4
_BATCH = 512


@dataclass(slots=True)
class _Job:
    work: Work[Any]
    future: Future[Any]
    result: Any = None
    error: BaseException | None = None

    def settle(self, error: BaseException | None = None) -> None:
        error = self.error or error
        with suppress(InvalidStateError):  # only a caller that gave up changes a future behind us
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(self.result)


class Engine:
    """Runs reads and writes on one database, for any number of threads and event loops."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # Guards the promise that what was accepted before the close is carried out.
        self._accepting = threading.Lock()
        self._closed = False
        self._drained = threading.Event()
        self._readers = None if database.path is None else _Readers(database)
        self._writer = threading.Thread(target=self._write, name="persistence-sqlite-writer", daemon=True)
        self._writer.start()

    def write(self, work: Work[T]) -> Future[T]:
        """Run ``work`` in a transaction of its own, as far as anybody can tell.

        The future is done when the result is on disk. Cancelling it before it began means that
        nothing is done; after that all of it is.
        """
        job = _Job(work, Future())
        with self._accepting:
            self.check_open()
            self._jobs.put(job)
        return job.future

    def read(self, work: Work[T]) -> Future[T]:
        """Run ``work`` on one consistent snapshot, in another thread."""
        if self._readers is None:  # in memory a reader would wait for the writer's lock
            return self.write(work)
        self.check_open()
        return self._readers.submit(work)

    def read_here(self, work: Work[T]) -> T:
        """As :meth:`read`, in the calling thread."""
        if self._readers is None:
            return self.write(work).result()
        self.check_open()
        return self._readers.run(work)

    def check_open(self) -> None:
        """Raise ``ClosedError`` after the close."""
        if self._closed:
            raise ClosedError(f"the connection to {self._database.name} was closed")

    def close(self, timeout: float) -> None:
        """Finish what was accepted, within ``timeout`` seconds, and let go of all connections."""
        with self._accepting:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        deadline = time.monotonic() + timeout
        if self._readers is not None:
            # The writer goes last: only a connection that may write empties the log into the file.
            self._readers.close(timeout)
        self._drained.set()
        self._writer.join(max(0.0, deadline - time.monotonic()))

    def _write(self) -> None:
        conn: sqlite3.Connection | None = None
        while (batch := self._next_batch()) is not None:
            batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                if conn is None:
                    conn = _prepared(self._database.connect())
                self._commit(conn, batch)
            except Exception as error:  # noqa: BLE001 - it belongs to those who wait, not to this thread
                if conn is not None and conn.in_transaction:
                    conn.rollback()
                ours = translate(error, self._database.name) or error
                for job in batch:
                    job.settle(ours)
            else:
                for job in batch:
                    job.settle()
        if conn is not None:
            self._drained.wait()
            conn.close()

    def _next_batch(self) -> list[_Job] | None:
        """Everything that waits, at least one job; ``None`` at the end."""
        job = self._jobs.get()
        batch: list[_Job] = []
        while job is not None:
            batch.append(job)
            if len(batch) == _BATCH:
                return batch
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return batch
        if batch:
            self._jobs.put(None)  # nothing can come after it
            return batch
        return None

    def _commit(self, conn: sqlite3.Connection, batch: list[_Job]) -> None:
        conn.execute("BEGIN IMMEDIATE")
        for job in batch:
            conn.execute("SAVEPOINT job")
            try:
                job.result = job.work(conn)
            except Exception as error:
                job.error = translate(error, self._database.name) or error
                if not conn.in_transaction:  # SQLite gave the whole transaction up: disk full, I/O error
                    raise
                conn.execute("ROLLBACK TO job")
            conn.execute("RELEASE job")
        conn.execute("COMMIT")


class _Readers:
    """A few connections for reading, made when they are needed."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._free: queue.LifoQueue[sqlite3.Connection | None] = queue.LifoQueue()
        for _ in range(_READERS):
            self._free.put(None)
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="persistence-sqlite-reader")
        self._closed = False

    def submit(self, work: Work[T]) -> Future[T]:
        try:
            return self._threads.submit(self.run, work)
        except RuntimeError as error:  # shut down between the check and here
            raise ClosedError(f"the connection to {self._database.name} was closed") from error

    def run(self, work: Work[T]) -> T:
        conn = self._free.get()
        try:
            if self._closed:
                raise ClosedError(f"the connection to {self._database.name} was closed")
            if conn is None:
                conn = _prepared(self._database.connect(readonly=True))
            conn.execute("BEGIN")
            try:
                return work(conn)
            finally:
                conn.rollback()
        except sqlite3.Error as error:
            ours = translate(error, self._database.name)
            raise ours or error from error
        finally:
            self._free.put(conn)

    def close(self, timeout: float) -> None:
        self._closed = True
        self._threads.shutdown(wait=False)
        deadline = time.monotonic() + timeout
        for _ in range(_READERS):
            with suppress(queue.Empty):
                conn = self._free.get(timeout=max(0.0, deadline - time.monotonic()))
                if conn is not None:
                    conn.close()
        for _ in range(_READERS):
            self._free.put(None)  # who still waits for one shall see that it is over


def _prepared(conn: sqlite3.Connection) -> sqlite3.Connection:
    conn.create_function("persistence_matches", 2, _matches, deterministic=True)
    conn.create_function("persistence_run", 1, _run, deterministic=True)
    return conn


def _load(text: bytes | str | None) -> dict[str, Any]:
    loaded = json.loads(text) if text else {}
    return loaded if isinstance(loaded, dict) else {}


def _matches(metadata: bytes | str | None, wanted: str) -> bool:
    return matches(_load(metadata), {key: comparable(value) for key, value in json.loads(wanted).items()})


def _run(metadata: bytes | str | None) -> str | None:
    run = _load(metadata).get("run_id")
    return run if run is None or isinstance(run, str) else json.dumps(run)
