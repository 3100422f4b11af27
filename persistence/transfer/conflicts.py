"""What to do about threads that the target has already, and what merging them means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from persistence.errors import ConflictError, SourceError
from persistence.transfer.digest import describe
from persistence.transfer.keys import Key, key_of, marked, values_of
from persistence.transfer.records import Checkpoint, Record, Reject, Sink, Source, Value, Write

if TYPE_CHECKING:
    from persistence.transfer.ledger import Action
    from persistence.transfer.options import OnConflict

_THREADS_AT_ONCE = 5_000
_SHOWN = 3


def refuse_itself(source: Source, sink: Sink) -> None:
    """Raise where a transfer would write into what it reads: to replace a thread, or to undo, would lose it.

    Raises:
        ConflictError: Both are one file, or one schema of a database.
    """
    if source.place == sink.place:
        raise ConflictError(f"{source.label} and {sink.label} are the same database")


def decide(
    source: Source, sink: Sink, existing: Sequence[str], on_conflict: OnConflict, room: str
) -> dict[str, Action]:
    """What a new run does about each thread that is in the target already.

    Args:
        source: What is moved.
        sink: Where to.
        existing: The threads, sorted.
        on_conflict: What was asked for.
        room: What else to do about them, for the message.

    Raises:
        ConflictError: Nothing was asked for, or a row to merge has another content in the target.
    """
    if not existing:
        return {}
    if on_conflict == "error":
        raise ConflictError(
            f"{sink.label} already has thread {existing[0]!r}",
            hint=f"{room}; or say with --on-conflict whether"
            " to skip, replace (undo does not bring back what is replaced) or merge such threads",
        )
    if on_conflict == "merge":
        differing = [describe(record) for record, held in merged(source, sink, existing) if held]
        if differing:
            raise ConflictError(
                f"{sink.label} has {len(differing)} rows with another content than {source.label}:"
                f" {'; '.join(differing[:_SHOWN])}",
                hint="nothing was written; skip or replace these threads",
            )
    return dict.fromkeys(existing, on_conflict)


def merged(
    source: Source, sink: Sink, threads: Sequence[str]
) -> Iterator[tuple[Value | Checkpoint | Write, bool]]:
    """The source's rows that the target does not have as they are; and whether it has another one there."""
    with sink.source() as target:
        for start in range(0, len(threads), _THREADS_AT_ONCE):
            records = source.records(threads[start : start + _THREADS_AT_ONCE], data=False)
            for thread, group in groupby(records, key=attrgetter("thread_id")):
                theirs = dict(map(marked, _rows(target, sink, thread)))
                for record in chain.from_iterable(map(_with_values, group)):
                    key, mark = marked(record)
                    if theirs.get(key) != mark and not (key.kind == "v" and key not in theirs):
                        yield record, key in theirs


class Present:
    """Leaves out the rows of merged threads that the target has: all equal, as :func:`decide` found."""

    def __init__(self, sink: Sink, merges: Collection[str], before: Callable[[], None]) -> None:
        self._sink = sink
        self._before = before  # the target is read: a SQLite one cannot be while it is written to
        self._merges = merges
        self._thread: str | None = None
        self._keys: set[Key] = set()

    def has(self, record: Value | Checkpoint | Write) -> bool:
        """Whether the target has a record, whose thread is merged."""
        if record.thread_id not in self._merges:
            return False
        if record.thread_id != self._thread:
            self._thread = record.thread_id
            self._before()
            with self._sink.source() as target:
                self._keys = set(map(key_of, _rows(target, self._sink, record.thread_id)))
        return key_of(record) in self._keys


def _rows(target: Source, sink: Sink, thread: str) -> Iterator[Value | Checkpoint | Write]:
    """Everything that a database holds of a thread, without the data."""
    for record in target.records([thread], data=False):
        if isinstance(record, Reject):
            raise SourceError(f"{describe(record)} of {target.label} cannot be read: {record.reason}")
        yield record
    yield from sink.values(thread)


def _with_values(record: Record) -> Iterator[Value | Checkpoint | Write]:
    if isinstance(record, Checkpoint):
        yield from values_of(record)
    if not isinstance(record, Reject):
        yield record
