"""Writing while the source is still read: in one transaction, committed when all was seen and found good.

Before the first reading has ended, nobody may see anything in the target: the reading may still find what
speaks against the move. Into an empty database all can be written meanwhile, as long as it is not committed.
So a small source is moved in little more time than its reading takes, or its writing, whichever is longer.
A move that is killed meanwhile leaves nothing; one that is killed later is continued as any other, as the
batches are the same.

A large source would keep that transaction open for long. It is written after its reading, as is whatever goes
into a database that holds something, and whatever could not be written so.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Protocol, runtime_checkable

from persistence.errors import PersistenceError
from persistence.transfer.copying import Cutter, Limits, Segment, Segments
from persistence.transfer.ledger import Ledger, Run
from persistence.transfer.options import Options
from persistence.transfer.recording import Part, Recording
from persistence.transfer.records import Batch, Sink, Source
from persistence.transfer.report import Totals
from persistence.transfer.spool import Entry

logger = logging.getLogger(__name__)

LIMIT = 1_000_000_000
"""Bytes of a source's storage up to which it is small: some tens of seconds."""
_QUEUED = 2
"""Batches that wait while one is written; without patience, those of one segment."""
_NAP = 0.1


class Writing(Protocol):
    """A sink in a transaction that stays open."""

    def write(self, batch: Batch) -> None:
        """See :class:`persistence.transfer.records.Sink`; nothing is committed yet."""

    def transaction(self) -> AbstractContextManager[object]:
        """A savepoint: an error takes back what was written in the block."""

    def ledger(self) -> Ledger:
        """The target's."""

    def cancel(self) -> None:
        """Have what another thread is waiting for fail."""


@runtime_checkable
class AheadSink(Protocol):
    """A sink that can be written to before it is known whether it should be."""

    def ahead(self, told: Callable[[], None]) -> AbstractContextManager[Writing | None]:
        """A transaction of its own, with all tables in it; committed at the end of the block.

        It keeps other transfers out. ``None`` where one is under way, or the database holds something, or
        tables of another version.

        Args:
            told: Called once it is known that there is nothing; tables may have to be made then.
        """


@dataclass(slots=True)
class Early:
    """What was written while the source was read."""

    segments: set[int] = field(default_factory=set)
    """By the numbers of their first batches."""
    batches: int = 0
    totals: Totals = field(default_factory=Totals)
    is_all: bool = False
    """Whether there is nothing else to write."""


@dataclass(frozen=True, slots=True)
class _End:
    """Of a segment."""

    segment: Segment
    spoilt: bool


class _SpoiltError(Exception):
    """What was written of a segment has to be written in another way."""


class _NotWantedError(Exception):
    """Nothing is to be kept."""


class Ahead:
    """Writes what a scan makes of the source. A context manager, at whose end it is all there, or nothing.

    Args:
        sink: Where to.
        limits: Where batches and segments end.
        patient: Wait where the reading is quicker than the writing. Otherwise what would wait is left for
            several to write later: segments that come while one is written, and threads of several batches.
    """

    def __init__(self, sink: AheadSink, limits: Limits, *, patient: bool) -> None:
        self._run_id = str(uuid.uuid4())
        self._sink = sink
        self._limits = limits
        self._patient = patient
        self._segments = Segments(limits)
        self._cutter: Cutter | None = None
        self._taken = self._closed = 0
        self._spoilt = False
        self._given_up = self._over = False
        self._decided = Event()
        self._writing: Writing | None = None
        self._error: BaseException | None = None
        self._written, self._committed = Early(), Early()
        self._tasks: Queue[Batch | _End | Run | None] = Queue(_QUEUED if patient else 0)
        self._thread = Thread(target=self._work, name="persistence-transfer-ahead", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up = True
        while self._thread.is_alive():
            if self._writing is not None:
                self._writing.cancel()  # it may wait for somebody's lock
            with suppress(Full):
                self._tasks.put(None, timeout=_NAP)
            self._thread.join(_NAP)

    def take(self, thread: str, part: Part) -> bool:
        """Write the next records of a thread; gives whether that is done here."""
        if self._cutter is None:
            self._decided.wait()
            self._spoilt = self._spoilt or not (self._patient or self._tasks.empty())
            self._cutter = Cutter(self._run_id, self._limits, self._segments.number)
        if self._spoilt or self._given_up:
            return False
        self._taken += len(part.kinds)
        for batch in self._cutter.take(thread, part):
            self._tasks.put(batch)
        return True

    def spoil(self) -> None:
        """The thread is not written as it was given: its segment is left to others."""
        self._spoilt = True

    def offer(self, entry: Entry, recording: Recording | None) -> None:
        """Write a whole thread, if it was recorded."""
        fits = self._patient or entry.bytes <= self._limits.bytes
        parts = recording.parts(entry.places) if recording and fits and entry.places is not None else None
        if parts is None or not all(self.take(entry.thread.thread_id, part) for part in parts):
            self.spoil()

    def ended(self, entry: Entry) -> None:
        """A thread is complete."""
        if (segment := self._segments.add(entry)) is not None:
            self._close(segment)

    def commit(self, run: Run) -> Early:
        """Keep what was written, and note the run, under another id; gives what that is, perhaps nothing."""
        if (last := self._segments.rest()) is not None:
            self._close(last)
        self._tasks.put(replace(run, run_id=self._run_id))
        self._thread.join()
        if isinstance(self._error, PersistenceError):
            # What speaks against writing it now will be said then.
            logger.info("nothing was written while the source was read: %s", self._error)
        elif self._error is not None:
            raise self._error
        return self._committed

    def _close(self, segment: Segment) -> None:
        spoilt = self._spoilt or self._taken != sum(entry.records for entry in segment.entries)
        if not spoilt and self._cutter is not None and (last := self._cutter.rest()) is not None:
            self._tasks.put(last)
        self._tasks.put(_End(segment, spoilt))
        self._closed += 1
        self._cutter, self._taken, self._spoilt = None, 0, False

    def _work(self) -> None:
        """What the thread does."""
        try:
            with self._sink.ahead(self._decided.set) as writing:
                self._writing = writing
                self._decided.set()
                self._write(writing)
            self._written.is_all = len(self._written.segments) == self._closed
            self._committed = self._written
        except _NotWantedError:
            pass
        except BaseException as error:  # noqa: BLE001 - for the thread that commits
            self._error = error
        self._given_up, self._writing = True, None
        self._decided.set()
        while not self._over:
            self._next()

    def _next(self) -> Batch | _End | Run | None:
        """The next thing to do; ``None`` where nothing is to be kept."""
        task = self._tasks.get()
        self._over = task is None or isinstance(task, Run)
        return task

    def _write(self, writing: Writing | None) -> None:
        """Write until there is the run to note; what returns is committed."""
        while writing is not None and (task := self._next()) is not None:
            if isinstance(task, Run):
                if not self._written.segments:
                    break
                writing.ledger().begin(task, {})
                return
            with suppress(_SpoiltError), writing.transaction():
                self._segment(writing, task)
        raise _NotWantedError

    def _segment(self, writing: Writing, task: Batch | _End | Run | None) -> None:
        """Write the batches of a segment."""
        batches = 0
        while isinstance(task, Batch):
            writing.write(task)
            batches += 1
            task = self._next()
        if not isinstance(task, _End):
            raise _NotWantedError
        if task.spoilt:
            raise _SpoiltError
        self._written.batches += batches
        self._written.segments.add(task.segment.first_batch)
        for entry in task.segment.entries:
            self._written.totals.add(entry.totals)


def offered(entries: Iterable[Entry], recording: Recording | None, ahead: Ahead | None) -> Iterator[Entry]:
    """Threads that several processes have read and recorded, each written as it comes."""
    for entry in entries:
        if ahead is not None:
            ahead.offer(entry, recording)
        yield entry


@contextmanager
def ahead_of(
    source: Source, sink: Sink, options: Options, limits: Limits, *, patient: bool
) -> Iterator[Ahead | None]:
    """What writes a source while it is read; ``None`` where that cannot be.

    Args:
        source: What will be read.
        sink: Where it goes.
        options: What was asked for.
        limits: Where batches and segments end.
        patient: See :class:`Ahead`.
    """
    plain = options.on_conflict == "error" and options.on_reject == "stop" and options.max_mbps is None
    small = source.size is not None and source.size <= LIMIT
    if plain and small and isinstance(sink, AheadSink):
        with Ahead(sink, limits, patient=patient) as ahead:
            yield ahead
    else:
        yield None
