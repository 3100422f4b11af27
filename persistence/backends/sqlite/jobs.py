"""Work that one thread hands to another: how it waits, who wakes whom, and how the result comes back."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]


class Job(Generic[T]):
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
        """The result, or the error, is there."""
        self._done.release()

    def wait(self, timeout: float = -1) -> T:
        """The result, in the thread that asked for it."""
        try:
            if not self._done.acquire(timeout=timeout):
                raise TimeoutError
        except BaseException:  # an interrupt, too: what did not begin shall not happen
            self.cancelled = True
            raise
        return self.outcome()

    def outcome(self) -> T:
        """The result; an error is raised."""
        if self.error is not None:
            raise self.error
        return self.result


class LoopJob(Generic[T]):
    """Work that another thread does, for a task of an event loop."""

    __slots__ = ("error", "future", "outbox", "result", "work")

    def __init__(self, work: Work[T], outbox: Outbox) -> None:
        self.work = work
        self.result: T
        self.error: BaseException | None = None
        self.outbox = outbox
        self.future: asyncio.Future[T] = outbox.loop.create_future()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self.future.cancelled()

    def settle(self) -> None:
        """As :meth:`Job.settle`."""
        self.outbox.post(self)

    def deliver(self) -> None:
        """Hand the result to the task, on its loop."""
        if self.future.done():  # cancelled meanwhile; what it wrote is written
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Waiting:
    """What waits for some threads, and the bell that wakes them."""

    __slots__ = ("_bell", "_threads", "jobs")

    def __init__(self, threads: int) -> None:
        self.jobs: deque[Job[Any] | LoopJob[Any]] = deque()
        self._bell: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._threads = threads

    def ring(self) -> None:
        """Wake as many threads as there is work for."""
        for _ in range(min(self._threads, len(self.jobs))):
            self._bell.put(True)

    def close(self) -> None:
        """Nothing will be added any more."""
        for _ in range(self._threads):
            self._bell.put(False)

    def rings(self) -> Iterator[None]:
        """For a thread: it shall take what there is, each time; another one may have been faster."""
        while self._bell.get():
            yield
        yield  # what was added before the close


class Outbox:
    """What other threads finished for one event loop; it is woken once for all that waits.

    Waking a loop is a system call, and gives the interpreter lock away.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._jobs: deque[LoopJob[Any]] = deque()
        self._woken = False
        self._ringing: set[Waiting] = set()

    def ring(self, waiting: Waiting) -> None:
        """Ring for what the loop's tasks have added, once all that can run now have added theirs.

        Were it done at once, the other thread and the loop would take the interpreter lock from each other
        for every few operations, and fewer would share a commit.
        """
        if waiting not in self._ringing:
            self._ringing.add(waiting)
            self.loop.call_soon(self._ring, waiting)

    def _ring(self, waiting: Waiting) -> None:
        self._ringing.discard(waiting)
        waiting.ring()

    def post(self, job: LoopJob[Any]) -> None:
        """From another thread: a job is done."""
        self._jobs.append(job)
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, nobody waits
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before looking: what comes after the last look wakes the loop again
        while self._jobs:
            self._jobs.popleft().deliver()
