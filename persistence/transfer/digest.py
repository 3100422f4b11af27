"""Digests of logical content: the same thread has the same digest in every backend and archive.

A thread's digest is SHA-256 over one line per checkpoint and one per write, in the order of
``persistence.transfer.records``; ``docs/archive-format.md`` defines the lines. A line names every
value by its hash, so a side that can hash where the data lies sends no data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ormsgpack import packb

from persistence.errors import SourceError
from persistence.transfer.chunks import Chunk, chunked
from persistence.transfer.records import Checkpoint, Record, Value, Write


class ThreadDigest(NamedTuple):
    """The content of one thread in 32 bytes, and how much there is of it."""

    thread_id: str
    sha256: bytes
    checkpoints: int
    writes: int


def line(record: Value | Checkpoint | Write) -> bytes:
    """A record as digests see it: one msgpack array, each item in its shortest form."""
    if isinstance(record, Checkpoint):
        # Of a value its channel, version, type and hash; of a checkpoint all between its thread and versions.
        return packb(("c", *record[1:6], [ref[:4] for ref in record.values]))
    if isinstance(record, Write):
        return packb(("w", *record[1:-1]))
    return packb(("v", *record[1:-1]))


class Digester:
    """Folds a stream of records into one digest per thread."""

    def __init__(self) -> None:
        self._thread: str | None = None
        self._hash = hashlib.sha256()
        self._checkpoints = self._writes = 0
        self.lines: list[bytes] = []
        """What :func:`line` gives for each record of the last chunk."""

    def see(self, record: Record) -> ThreadDigest | None:
        """Take one record; gives the finished digest of the thread before it, if one ended."""
        ended = self._enter(record.thread_id)
        if isinstance(record, Checkpoint):
            self._checkpoints += 1
            self._hash.update(line(record))
        elif isinstance(record, Write):
            self._writes += 1
            self._hash.update(line(record))
        return ended

    def take(self, chunk: Chunk) -> ThreadDigest | None:
        """As :meth:`see`, for some records."""
        ended = self._enter(chunk.thread_id)
        states = [line(record) for record in chunk.states]
        writes = [packb(("w", *write[1:-1])) for write in chunk.writes]
        self.lines = states + writes
        self._checkpoints += len(chunk.checkpoints)
        self._writes += len(writes)
        if len(states) > len(chunk.checkpoints):
            pairs = zip(states, chunk.states, strict=True)
            states = [text for text, record in pairs if isinstance(record, Checkpoint)]
        self._hash.update(b"".join(states + writes))
        return ended

    def _enter(self, thread: str) -> ThreadDigest | None:
        if thread == self._thread:
            return None
        ended = self.end()
        self._thread = thread
        self._hash = hashlib.sha256()
        self._checkpoints = self._writes = 0
        return ended

    def end(self) -> ThreadDigest | None:
        """The digest of the last thread."""
        if self._thread is None:
            return None
        return ThreadDigest(self._thread, self._hash.digest(), self._checkpoints, self._writes)


def digests(records: Iterable[Record]) -> Iterator[ThreadDigest]:
    """One digest per thread, in the order of the threads.

    Raises:
        SourceError: A row has no canonical form, so nothing can be said about its thread.
    """
    digester = Digester()
    for chunk in chunked(records):
        if chunk.reject is not None:
            raise SourceError(f"{describe(chunk.reject)} cannot be read: {chunk.reject.reason}")
        if (ended := digester.take(chunk)) is not None:
            yield ended
    if (last := digester.end()) is not None:
        yield last


class Fingerprint:
    """The content of a whole source: SHA-256 over the digests of its threads, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def see(self, thread: ThreadDigest) -> None:
        """Take the next thread's digest."""
        self._hash.update(packb((thread.thread_id, thread.sha256)))

    def hexdigest(self) -> str:
        """The fingerprint of what was seen so far."""
        return self._hash.hexdigest()


def describe(record: Record) -> str:
    """A record's place in words, for messages."""
    where = f"thread {record.thread_id!r}"
    if record.checkpoint_ns:
        where += f", namespace {record.checkpoint_ns!r}"
    if isinstance(record, Value):
        return f"{where}, channel {record.channel!r}, version {record.version!r}"
    where += f", checkpoint {record.checkpoint_id!r}"
    if isinstance(record, Write):
        where += f", write {record.idx} of task {record.task_id!r} to channel {record.channel!r}"
    return where
