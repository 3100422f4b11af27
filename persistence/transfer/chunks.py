"""Records some at a time: to go over a list takes half the time of being called with each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import msgspec

from persistence.transfer.records import Checkpoint, Record, Reject, Value, Write

_ROOM = 512_000
"""Bytes of a chunk, without its last record."""
_AT_LEAST = 2_000
"""Bytes that a record is taken for, beside its content: so a chunk has no more than 256,"""
_OF_A_CHECKPOINT = 8_000
"""and no more checkpoints than those after which the progress is told."""


class _Head(msgspec.Struct):
    v: Any = None


_head = msgspec.json.Decoder(_Head).decode


def format_version(body: bytes) -> object:
    """What a checkpoint says of its format; ``None`` where it says nothing."""
    return _head(body).v


class Chunk:
    """Some records of one thread, following each other; or a row that is none, alone."""

    def __init__(self, thread_id: str, reject: Reject | None = None) -> None:
        self.thread_id = thread_id
        self.reject = reject
        self.states: list[Value | Checkpoint] = []
        self.checkpoints: list[Checkpoint] = []
        """Those among the states."""
        self.writes: list[Write] = []
        """They come after the states, as in a thread."""
        self.sizes: list[int] = []
        """Bytes of content that each record carries."""
        self.wholes: list[int] = []
        """Bytes of each checkpoint with all its values."""

    @property
    def records(self) -> list[Record]:
        """All of them, in order."""
        return [self.reject] if self.reject is not None else [*self.states, *self.writes]

    @cached_property
    def format_versions(self) -> list[object]:
        """The :func:`format_version` of each checkpoint."""
        return [format_version(checkpoint.body) for checkpoint in self.checkpoints]


def chunked(records: Iterable[Record]) -> Iterator[Chunk]:
    """Records in order, some at a time."""
    chunk, room, writes = Chunk(""), 0, list[Write]()
    for record in records:
        # A state after writes is no source's of ours, but an archive may be anybody's.
        if room <= 0 or record[0] != chunk.thread_id or (writes and not isinstance(record, Write)):
            if chunk.sizes:
                yield chunk
            chunk, room = Chunk(record[0]), _ROOM
            states, writes, sizes = chunk.states, chunk.writes, chunk.sizes
        if isinstance(record, Write):
            size = len(record[9] or b"")
            writes.append(record)
        elif isinstance(record, Value):
            size = len(record[6])
            states.append(record)
        elif isinstance(record, Checkpoint):
            size, whole = sizes_of(record)
            room -= _OF_A_CHECKPOINT - _AT_LEAST
            states.append(record)
            chunk.checkpoints.append(record)
            chunk.wholes.append(whole)
        else:
            if sizes:
                yield chunk
            yield Chunk(record[0], record)
            chunk, room = Chunk(""), 0
            continue
        sizes.append(size)
        room -= size + _AT_LEAST
    if chunk.sizes:
        yield chunk


def sizes_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many bytes of content a checkpoint's record carries, and how many it has with all its values."""
    size = whole = len(checkpoint.body) + len(checkpoint.metadata)
    for _, _, _, _, data, of_value, _ in checkpoint.values:
        whole += of_value
        if data is not None:
            size += of_value
    return size, whole
