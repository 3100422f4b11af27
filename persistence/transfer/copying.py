"""Cuts what is moved into segments and batches, always the same ones, and writes them.

A segment is some whole threads, a batch some records of a segment. Both follow from nothing but the content
and the limits that the run began with. So a run that was killed goes on where it stopped, by however
many workers it was begun and is continued.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from persistence.errors import TransferError
from persistence.transfer.conflicts import Present
from persistence.transfer.digest import line
from persistence.transfer.keys import pack
from persistence.transfer.ledger import Action, LedgerEntry, Run
from persistence.transfer.records import Batch, Checkpoint, Record, Reject, Sink, Source, Value, Write
from persistence.transfer.report import content_bytes, counted
from persistence.transfer.spool import Spool
from persistence.transfer.workers import Open, OpenSink, Tell, Telling

_NAP = 0.02


@dataclass(frozen=True, slots=True)
class Limits:
    """Where batches and segments end."""

    records: int
    bytes: int
    segment_batches: int | None
    """Full batches of a segment; ``None`` in a run that an earlier version began: all threads are one."""

    @classmethod
    def of(cls, run: Run) -> Limits:
        """Those that a run began with."""
        options: Mapping[str, Any] = run.options
        batches = options.get("segment_batches")
        return cls(
            int(options["batch_records"]),
            int(options["batch_bytes"]),
            None if batches is None else int(batches),
        )

    def as_options(self) -> dict[str, int | None]:
        """For the ledger."""
        return {
            "batch_records": self.records,
            "batch_bytes": self.bytes,
            "segment_batches": self.segment_batches,
        }


@dataclass(frozen=True, slots=True)
class Task:
    """What a run still has to do, whoever does it."""

    run_id: str
    limits: Limits
    actions: Mapping[str, Action]
    """What is done about threads that the target had before."""
    committed: Mapping[int, str]
    max_mbps: float | None = None

    def having(self, action: Action) -> list[str]:
        """The threads that this is done about."""
        return [thread for thread, chosen in self.actions.items() if chosen == action]


@dataclass(frozen=True, slots=True)
class Segment:
    """Whole threads that one worker moves."""

    first_batch: int
    """The number of its first batch. Not every number is used: how many batches there are at most is known
    beforehand, not how many there will be."""
    threads: list[str]


def segments(spool: Spool, limits: Limits) -> Iterator[Segment]:
    """Cut the threads of a scan into segments."""
    threads: list[str] = []
    number = count = references = size = repeated = 0
    for entry in spool.entries():
        threads.append(entry.thread.thread_id)
        count += entry.records
        references += entry.references
        size += entry.bytes
        repeated += entry.bytes_referenced
        full = max(count // limits.records, size // limits.bytes)
        if limits.segment_batches is not None and full >= limits.segment_batches:
            yield Segment(number, threads)
            # Each batch but the last has the records or the bytes of a full one.
            number += (count + references) // limits.records + (size + repeated) // limits.bytes + 1
            threads, count, references, size, repeated = [], 0, 0, 0, 0
    if threads:
        yield Segment(number, threads)


def of_segments(
    records: Iterable[Record], cut: Iterable[Segment]
) -> Iterator[tuple[Segment, Iterator[Record]]]:
    """One stream of records in order, segment by segment; read each to its end before the next."""
    stream = iter(records)
    ahead = next(stream, None)

    def take(last: str) -> Iterator[Record]:
        nonlocal ahead
        while ahead is not None and ahead.thread_id <= last:
            yield ahead
            ahead = next(stream, None)

    for segment in cut:
        yield segment, take(segment.threads[-1])


@dataclass(frozen=True, slots=True)
class Moving:
    """The job of writing, a segment at a time."""

    source: Open
    sink: OpenSink
    task: Task
    meanwhile: Callable[[], None] | None = None
    """Called now and then while a batch is written."""

    @contextmanager
    def begun(self) -> Iterator[Callable[[Segment, Tell], int]]:
        """See :class:`persistence.transfer.workers.Job`; a piece gives the number of its batches."""
        skipped = frozenset(self.task.having("skip"))
        with (
            self.source() as source,
            self.sink() as sink,
            Writer(sink, self.task, self.meanwhile) as writer,
        ):
            yield partial(_move, source, sink, writer, skipped)


def _move(
    source: Source, sink: Sink, writer: Writer, skipped: Collection[str], segment: Segment, tell: Tell
) -> int:
    counts, before = Telling(tell), writer.written
    records = source.records([thread for thread in segment.threads if thread not in skipped])
    with closing(sink.placed(counted(records, counts))) as placed:
        for batch in writer.batches(placed, segment):
            writer.add(batch)
            counts.tell()
    return writer.written - before


class Writer:
    """Cuts a segment into batches and writes each while the next one is read. A context manager."""

    def __init__(self, sink: Sink, task: Task, meanwhile: Callable[[], None] | None = None) -> None:
        self.written = 0
        self._meanwhile = meanwhile
        self._sink = sink
        self._task = task
        self._replaces = set(task.having("replace"))
        self._merges = frozenset(task.having("merge"))
        self._present = Present(sink, self._merges)
        self._throttle = Throttle(task.max_mbps)
        self._thread = ThreadPoolExecutor(1, "persistence-transfer")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._thread.shutdown()

    def batches(self, records: Iterable[Record], segment: Segment) -> Iterator[Batch]:
        """Cut the records of a segment.

        Raises:
            TransferError: There is a row that was not there before.
        """
        limits = self._task.limits
        batch: list[Value | Checkpoint | Write] = []
        size = repeated = 0
        number = segment.first_batch
        for record in records:
            if isinstance(record, Reject):
                raise TransferError("the source changed while it was read")
            batch.append(record)
            size += content_bytes(record)
            if self._sink.repeats_values and isinstance(record, Checkpoint):
                repeated += sum(ref.size for ref in record.values if ref.data is None)
            if len(batch) >= limits.records or size + repeated >= limits.bytes:
                yield self._batch(number, batch, size)
                batch, size, repeated, number = [], 0, 0, number + 1
        if batch:
            yield self._batch(number, batch, size)

    def add(self, batch: Batch) -> None:
        """Write a batch once the one before it is committed, unless an interrupted run has committed it.

        Raises:
            TransferError: An interrupted run has committed another batch under this number.
        """
        self.flush()
        done = self._task.committed.get(batch.number)
        if done is None:
            self._pending = self._thread.submit(self._sink.write, batch)
            self.written += 1
            self._throttle.wait(batch.entry.bytes)
        elif done == batch.entry.digest:
            self._sink.skip(batch)
        else:
            raise TransferError(
                f"batch {batch.number} of run {self._task.run_id} is not the one that was committed before",
                hint="the run was begun by another version of this package; finish it with that one",
            )

    def flush(self) -> None:
        """Wait until the batch that is under way is committed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            while self._meanwhile is not None and not pending.done():
                wait([pending], _NAP)
                self._meanwhile()
            pending.result()

    def _batch(self, number: int, records: list[Value | Checkpoint | Write], size: int) -> Batch:
        lines = [line(record) for record in records]
        digest = hashlib.sha256(b"".join(lines))
        counts = {
            kind: sum(isinstance(record, kind) for record in records) for kind in (Checkpoint, Write, Value)
        }
        entry = LedgerEntry(
            run_id=self._task.run_id,
            number=number,
            thread_id=records[0].thread_id,
            digest=digest.hexdigest(),
            checkpoints=counts[Checkpoint],
            writes=counts[Write],
            values=counts[Value],
            bytes=size,
        )
        # A thread is replaced with the first of its batches, and what the next ones add stays.
        begun = self._replaces.intersection(record.thread_id for record in records)
        self._replaces -= begun
        if self._merges:
            self.flush()  # a SQLite target cannot be read while it is written to
        inserted = self._present.without(records, lines)
        rows = [pair for pair in inserted if not (self._sink.repeats_values and isinstance(pair[0], Value))]
        return Batch(entry.number, [record for record, _ in inserted], entry, pack(rows), sorted(begun))


class Throttle:
    """Holds the rate of writing below a limit."""

    def __init__(self, max_mbps: float | None) -> None:
        self._bytes_per_second = max_mbps * 1_000_000 if max_mbps is not None else math.inf
        self._started = time.monotonic()
        self._bytes = 0

    def wait(self, size: int) -> None:
        """Wait until so many bytes more are within the limit."""
        self._bytes += size
        due = self._started + self._bytes / self._bytes_per_second
        time.sleep(max(0.0, due - time.monotonic()))
