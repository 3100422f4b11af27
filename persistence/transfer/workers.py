"""Processes that move segments side by side, each with connections of its own.

Much of the time is Python's, so workers are processes. They are programs of their own: a fork would
share open databases, and ``multiprocessing`` would run the script of the caller again.
A worker that has lost its parent ends at once, whatever it is doing; what it had not committed is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Protocol, runtime_checkable

from persistence.errors import TransferError
from persistence.transfer.copying import Segment, Task, Writer
from persistence.transfer.records import Sink, Source
from persistence.transfer.report import Totals

MOST = 4
"""Workers that are started unasked; more of them wait for the server rather than for a processor."""
_SEGMENTS_EACH = 4
"""Segments that are worth starting a worker for, which takes half a second of a processor."""
_PROGRAM = "import sys; sys.path[:] = {path!r}; from persistence.transfer.workers import main; main()"
_GONE = (EOFError, ConnectionResetError, BrokenPipeError)

Open = Callable[[], AbstractContextManager[Source]]
OpenSink = Callable[[], AbstractContextManager[Sink]]


@runtime_checkable
class _SharedSource(Protocol):
    """A source that several processes may be able to read at once."""

    def share(self) -> Open | None:
        """What opens the very same snapshot elsewhere, and can be pickled; ``None`` if nothing can."""


@runtime_checkable
class _SharedSink(Protocol):
    """A sink that several processes can write to at once."""

    def share(self) -> OpenSink:
        """What opens the same database elsewhere, and can be pickled."""


def shared(source: Source) -> Open | None:
    """What opens the source's snapshot in a worker, if it can be shared."""
    return source.share() if isinstance(source, _SharedSource) else None


def shared_sink(sink: Sink) -> OpenSink | None:
    """What opens the sink in a worker, if it can be shared."""
    return sink.share() if isinstance(sink, _SharedSink) else None


@dataclass(frozen=True, slots=True)
class Job:
    """What all workers of a run are told."""

    source: Open
    sink: OpenSink
    task: Task


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has nothing to do."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has committed all it was given."""

    written: int


def sensible(asked: int | None, segments: int) -> int:
    """How many workers to use: as many as were asked for, or one for each two cores, up to four.

    The other cores are for the server, which is often on the same machine and has more to do.
    """
    if not sys.executable:  # Python is inside another program, and nothing says how to start one
        return 1
    if asked is not None:
        return min(asked, max(1, segments))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores // 2, segments // _SEGMENTS_EACH))


def move(job: Job, count: int, segments: Iterator[Segment], moved: Callable[[Totals], None]) -> int:
    """Have ``count`` workers move all segments; gives the number of batches they wrote.

    Raises:
        TransferError: A worker ended before its work was done. An error in a worker is raised as it is.
    """
    written = 0
    with ExitStack() as stack:
        busy = [stack.enter_context(_worker()) for _ in range(count)]
        try:
            task = replace(job.task, max_mbps=job.task.max_mbps and job.task.max_mbps / count)
            for worker in busy:
                worker.send(replace(job, task=task))
            while busy:
                for connection in [one for one in wait(busy) if isinstance(one, Connection)]:
                    match connection.recv():
                        case Ready():
                            connection.send(next(segments, None))
                        case Totals() as some:
                            moved(some)
                        case Ended() as end:
                            written += end.written
                            busy.remove(connection)
                        case BaseException() as error:
                            raise error
        except _GONE:
            raise TransferError(
                "a worker of the transfer ended before its work was done",
                hint="was it killed, or short of memory? Run the command again: it goes on where it stopped",
            ) from None
    return written


@contextmanager
def _worker() -> Iterator[Connection]:
    """A running worker; its input is the line that tells it whether this process lives."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - this package
            [sys.executable, "-c", _PROGRAM.format(path=sys.path), str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    with Connection(ours.detach()) as connection:
        try:
            yield connection
            process.wait()
        finally:
            process.kill()
            process.communicate()


def main() -> None:
    """The program of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and says what to do
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Connection(int(sys.argv[1])) as parent, suppress(*_GONE):
        try:
            _work(parent)
        except _GONE:
            raise
        except Exception as error:  # noqa: BLE001 - raised by the parent
            parent.send(error)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _work(parent: Connection) -> None:
    job = parent.recv()
    assert isinstance(job, Job)  # noqa: S101 - the first thing that is sent
    skipped = frozenset(job.task.having("skip"))
    with job.source() as source, job.sink() as sink, Writer(sink, job.task) as writer:
        while (segment := _next(parent)) is not None:
            records = source.records([thread for thread in segment.threads if thread not in skipped])
            with closing(sink.placed(records)) as placed:
                for batch in writer.batches(placed, segment):
                    writer.add(batch)
                    moved = Totals()
                    for record in batch.records:
                        moved.see(record)
                    parent.send(moved)
        writer.flush()
        parent.send(Ended(writer.written))


def _next(parent: Connection) -> Segment | None:
    parent.send(Ready())
    segment = parent.recv()
    assert segment is None or isinstance(segment, Segment)  # noqa: S101
    return segment
