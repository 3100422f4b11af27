"""The thread digests of one side, kept outside memory while the other side is read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import msgspec

from persistence.transfer.digest import ThreadDigest
from persistence.transfer.report import Totals

_IN_MEMORY = 4_000_000


class Entry(NamedTuple):
    """A thread as the first reading found it."""

    thread: ThreadDigest
    records: int
    references: int
    """Values that its checkpoints hold: more records, at most, where a target keeps each by itself."""
    bytes: int
    """Content, each value once per version."""
    bytes_referenced: int
    """Content with the copies that checkpoints in SQLite have."""
    places: list[tuple[int, int]] | None = None
    """Where it was recorded, if it was; see :mod:`persistence.transfer.recording`."""

    @property
    def totals(self) -> Totals:
        """How much it is."""
        _, _, checkpoints, writes = self.thread
        values = self.records - checkpoints - writes
        return Totals(1, checkpoints, writes, values, self.references, self.bytes, self.bytes_referenced)


_Encoded = tuple[tuple[str, bytes, int, int], int, int, int, int, list[tuple[int, int]] | None]
_decoder = msgspec.msgpack.Decoder(_Encoded)


class Spool:
    """Thread digests in order, written once and read any number of times. A context manager."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by __exit__
        self.count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, entry: Entry) -> None:
        """Append one."""
        data = msgspec.msgpack.encode((tuple(entry.thread), *entry[1:]))
        self._file.write(len(data).to_bytes(4))
        self._file.write(data)
        self.count += 1

    def entries(self) -> Iterator[Entry]:
        """All of them."""
        self._file.seek(0)
        while head := self._file.read(4):
            thread, *others = _decoder.decode(self._file.read(int.from_bytes(head)))
            yield Entry(ThreadDigest(*thread), *others)

    def chunks(self, size: int) -> Iterator[list[ThreadDigest]]:
        """The digests, some at a time."""
        chunk: list[ThreadDigest] = []
        for entry in self.entries():
            chunk.append(entry.thread)
            if len(chunk) == size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
