"""Cuts what is moved into segments and batches, always the same ones, and writes them.

A segment is some whole threads, a batch some records of a segment. Both follow from nothing but the content
and the limits that the run began with. So a run that was killed goes on where it stopped, by however
many workers it was begun and is continued.
"""

from __future__ import annotations

import hashlib
import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any

from persistence.errors import TransferError
from persistence.transfer.conflicts import Present
from persistence.transfer.digest import line
from persistence.transfer.keys import marks_of, pack, plain_key
from persistence.transfer.ledger import Action, LedgerEntry, Run
from persistence.transfer.recording import PART_BYTES, Part, Recording
from persistence.transfer.records import Batch, Checkpoint, Record, Reject, Sink, Source, Value
from persistence.transfer.report import content_bytes, counted
from persistence.transfer.spool import Entry, Spool
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
    entries: list[Entry]
    """Its threads."""


class Segments:
    """Cuts threads, which come in order, into segments."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: list[Entry] = []
        self._count = self._references = self._size = self._repeated = 0
        self.number = 0
        """That of the first batch of the segment that is being filled."""

    def add(self, entry: Entry) -> Segment | None:
        """The next thread; gives the segment that is complete with it."""
        limits = self._limits
        self._entries.append(entry)
        self._count += entry.records
        self._references += entry.references
        self._size += entry.bytes
        self._repeated += entry.bytes_referenced
        full = max(self._count // limits.records, self._size // limits.bytes)
        return self.rest() if limits.segment_batches is not None and full >= limits.segment_batches else None

    def rest(self) -> Segment | None:
        """The threads that no segment has yet."""
        if not self._entries:
            return None
        limits, segment = self._limits, Segment(self.number, self._entries)
        # Each batch but the last has the records or the bytes of a full one.
        self.number += (self._count + self._references) // limits.records
        self.number += (self._size + self._repeated) // limits.bytes + 1
        self._entries = []
        self._count = self._references = self._size = self._repeated = 0
        return segment


def segments(spool: Spool, limits: Limits) -> Iterator[Segment]:
    """Cut the threads of a scan into segments."""
    cut = Segments(limits)
    for entry in spool.entries():
        if (segment := cut.add(entry)) is not None:
            yield segment
    if (last := cut.rest()) is not None:
        yield last


def of_segments(
    records: Iterable[Record], cut: Iterable[Segment]
) -> Iterator[tuple[Segment, Iterator[Record]]]:
    """One stream of records in order, segment by segment."""
    stream = iter(records)
    ahead = next(stream, None)

    def take(last: str) -> Iterator[Record]:
        nonlocal ahead
        while ahead is not None and ahead.thread_id <= last:
            yield ahead
            ahead = next(stream, None)

    for segment in cut:
        mine = take(segment.entries[-1].thread.thread_id)
        yield segment, mine
        deque(mine, maxlen=0)  # what nobody wanted


@dataclass(frozen=True, slots=True)
class Moving:
    """The job of writing, a segment at a time."""

    source: Open
    sink: OpenSink
    task: Task
    recording: Recording | None = None
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
            yield partial(_move, source, self.recording, writer, skipped)


def _move(
    source: Source,
    recording: Recording | None,
    writer: Writer,
    skipped: Collection[str],
    segment: Segment,
    tell: Tell,
) -> int:
    counts, before = Telling(tell), writer.written
    chosen = [entry for entry in segment.entries if entry.thread.thread_id not in skipped]
    with closing(_parts(source, recording, writer, chosen, counts)) as parts:
        for batch in writer.batches(parts, segment):
            writer.add(batch)
            counts.tell()
    return writer.written - before


def _parts(
    source: Source, recording: Recording | None, writer: Writer, entries: Iterable[Entry], counts: Telling
) -> Generator[tuple[str, Part]]:
    """What is written of threads: as it was recorded, or else read again."""

    def is_recorded(entry: Entry) -> bool:
        return entry.places is not None and entry.thread.thread_id not in writer.merges

    for so, some in groupby(entries, is_recorded):
        if recording is None or not so:
            records = source.records([entry.thread.thread_id for entry in some])
            with closing(writer.placed(counted(records, counts))) as placed:
                yield from writer.parts(placed)
            continue
        for entry in some:
            for part in recording.parts(entry.places or ()):
                yield entry.thread.thread_id, part
                counts.totals.checkpoints += part.kinds.count("c")
                counts.totals.bytes += sum(part.sizes)
            counts.totals.add(replace(entry.totals, threads=0, checkpoints=0, bytes=0))


class Writer:
    """Cuts a segment into batches and writes each while the next one is read. A context manager."""

    def __init__(self, sink: Sink, task: Task, meanwhile: Callable[[], None] | None = None) -> None:
        self.written = 0
        self._meanwhile = meanwhile
        self._sink = sink
        self._task = task
        self._replaces = set(task.having("replace"))
        self.merges = frozenset(task.having("merge"))
        self._present = Present(sink, self.merges, self.flush)
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

    def placed(self, records: Iterable[Record]) -> Generator[Record]:
        """See :class:`persistence.transfer.records.Sink`."""
        return self._sink.placed(records)

    def parts(self, records: Iterable[Record]) -> Iterator[tuple[str, Part]]:
        """What is written of placed records, some of one thread at a time, each with its thread.

        Raises:
            TransferError: There is a row that was not there before.
        """
        sink, part, thread, size = self._sink, Part(), "", 0
        for record in records:
            if isinstance(record, Reject):
                raise TransferError("the source changed while it was read")
            if part.kinds and (record.thread_id != thread or size >= PART_BYTES):
                yield thread, part
                part, size = Part(), 0
            thread = record.thread_id
            there, content = self._present.has(record), content_bytes(record)
            row, weight, key = None if there else sink.row(record), content, plain_key(record)
            noted = not there and not (sink.repeats_values and isinstance(record, Value))
            if sink.repeats_values and isinstance(record, Checkpoint):
                weight += sum(ref.size for ref in record.values if ref.data is None)
            part.add(key[0], key if noted else None, content, weight, line(record), row)
            size += content
        if part.kinds:
            yield thread, part

    def batches(self, parts: Iterable[tuple[str, Part]], segment: Segment) -> Iterator[Batch]:
        """Cut what is written of a segment."""
        cutter = Cutter(self._task.run_id, self._task.limits, segment.first_batch)
        for thread, part in parts:
            yield from map(self._replacing, cutter.take(thread, part))
        if (last := cutter.rest()) is not None:
            yield self._replacing(last)

    def _replacing(self, batch: Batch) -> Batch:
        """A thread is replaced with the first of its batches, and what the next ones add stays."""
        begun = self._replaces.intersection(batch.threads)
        self._replaces -= begun
        return replace(batch, replaces=sorted(begun)) if begun else batch

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
                hint="the run was begun by another version of this package, or with another choice of"
                " encryption; finish it so, or undo it",
            )

    def flush(self) -> None:
        """Wait until the batch that is under way is committed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            while self._meanwhile is not None and not pending.done():
                wait([pending], _NAP)
                self._meanwhile()
            pending.result()


class Cutter:
    """Cuts what is written of one segment into batches.

    Args:
        run_id: The run that they belong to.
        limits: Where they end.
        number: That of the first one.
    """

    def __init__(self, run_id: str, limits: Limits, number: int) -> None:
        self._run_id = run_id
        self._limits = limits
        self._number = number
        self._cut = _Cut()

    def take(self, thread: str, part: Part) -> Iterator[Batch]:
        """Some records of a thread; gives the batches that are full with them."""
        limits = self._limits
        ends = list(accumulate(part.weights, initial=0))
        start = 0
        while start < len(part.kinds):
            full = bisect_left(ends, ends[start] + limits.bytes - self._cut.weight, start + 1)
            stop = min(full, start + limits.records - len(self._cut.kinds), len(part.kinds))
            self._cut.take(thread, part, start, stop, ends[stop] - ends[start])
            start = stop
            if len(self._cut.kinds) >= limits.records or self._cut.weight >= limits.bytes:
                yield self._batch()

    def rest(self) -> Batch | None:
        """What no batch has yet."""
        return self._batch() if self._cut.kinds else None

    def _batch(self) -> Batch:
        cut, number = self._cut, self._number
        self._cut, self._number = _Cut(), number + 1
        entry = LedgerEntry(
            run_id=self._run_id,
            number=number,
            thread_id=cut.keys[0][0],
            digest=cut.digest.hexdigest(),
            checkpoints=cut.kinds.count("c"),
            writes=cut.kinds.count("w"),
            values=cut.kinds.count("v"),
            bytes=cut.size,
        )
        keys = pack([(thread, some) for thread, some in cut.keys if some])
        return Batch(number, cut.rows, entry, keys, [thread for thread, _ in cut.keys])


class _Cut:
    """What was cut off for a batch so far."""

    def __init__(self) -> None:
        self.kinds = ""
        self.size = self.weight = 0
        self.digest = hashlib.sha256()
        self.rows: list[tuple[str, Any]] = []
        self.keys: list[tuple[str, list[tuple[Any, bytes]]]] = []
        """Of each thread."""

    def take(self, thread: str, part: Part, start: int, stop: int, weight: int) -> None:
        """Some records of a thread."""
        kinds = part.kinds[start:stop]
        self.kinds += kinds
        self.size += sum(part.sizes[start:stop])
        self.weight += weight
        lines = part.lines[start:stop]
        self.digest.update(b"".join(lines))
        rows = zip(kinds, part.rows[start:stop], strict=True)
        self.rows += [row for row in rows if row[1] is not None]
        if not self.keys or self.keys[-1][0] != thread:
            self.keys.append((thread, []))
        keys = zip(part.keys[start:stop], marks_of(lines), strict=True)
        self.keys[-1][1].extend(key for key in keys if key[0] is not None)


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
