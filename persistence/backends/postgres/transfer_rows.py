"""Records as rows of COPY's binary form. Row formats: ``langgraph-checkpoint-postgres`` 3.2.0."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from persistence.backends.postgres.copying import JSONB_VERSION, NULL, fields, jsonb, length, name, text
from persistence.backends.postgres.transfer_versions import Versions, channel_values
from persistence.transfer.chunks import Chunk
from persistence.transfer.formats import Formats
from persistence.transfer.records import Checkpoint, Value, Write

_SIX, _NINE = fields(6), fields(9)
_FOUR_BYTES = length(4)
_CHANNEL_VALUES = JSONB_VERSION + b'{"channel_values":'


@lru_cache(1024)
def _index(value: int) -> bytes:
    """A field of a number, of which there are few: the index of a write."""
    return _FOUR_BYTES + length(value)


class Rows:
    """Makes them, of records in order."""

    def __init__(self, versions: Versions, formats: Formats) -> None:
        self._versions = versions
        self._formats = formats
        self._place: tuple[str, str] | None = None
        self._begin = b""
        self._last: tuple[str, bytes] = ("", b"")  # a checkpoint's id, which is often the next one's parent

    def row(self, record: Value | Checkpoint | Write) -> bytes:
        """The row of a record that was placed."""
        if isinstance(record, Write):
            return self._of_writes([record])[0]
        return self._of_state(record)

    def rows(self, chunk: Chunk) -> list[bytes]:
        """The row of each record of a chunk that was placed."""
        return [*map(self._of_state, chunk.states), *self._of_writes(chunk.writes)]

    def _enter(self, place: tuple[str, str]) -> None:
        self._place = place
        self._begin = b"".join([*text(place[0]), *text(place[1])])

    def _of_state(self, record: Value | Checkpoint) -> bytes:
        if (place := record[:2]) != self._place:
            self._enter(place)
        fields = self._of_checkpoint(record) if isinstance(record, Checkpoint) else self._of_value(record)
        return b"".join(fields)

    def _of_value(self, value: Value) -> tuple[bytes, ...]:
        _, _, channel, version, type_, _, data = value
        if self._formats.encrypts:
            type_, data = self._formats.sealed(type_, data)
        return (_SIX, self._begin, name(channel), *text(version), name(type_), length(len(data)), data)

    def _of_writes(self, writes: Sequence[Write]) -> list[bytes]:
        """Most follow another one of the same checkpoint and task."""
        rows = []
        last_id = last_task = last_path = None
        encrypts = self._formats.encrypts
        for thread, ns, checkpoint_id, task_id, idx, task_path, channel, type_, _, data in writes:
            if checkpoint_id != last_id or (thread, ns) != self._place:
                if (thread, ns) != self._place:
                    self._enter((thread, ns))
                last_id = checkpoint_id
                begin = b"".join([_NINE, self._begin, *text(checkpoint_id)])
            if task_id != last_task or task_path != last_path:
                last_task, last_path = task_id, task_path
                of_task = b"".join([*text(task_id), name(task_path)])
            if encrypts:
                type_, data = self._formats.sealed(type_, data or b"")
            data = data or b""
            row = (begin, of_task, _index(idx), name(channel), name(type_), length(len(data)), data)
            rows.append(b"".join(row))
        return rows

    def _of_checkpoint(self, checkpoint: Checkpoint) -> tuple[bytes, ...]:
        _, _, checkpoint_id, parent_id, body, metadata, _, _ = checkpoint
        if parent_id is None:
            parent = NULL
        else:
            parent = self._last[1] if parent_id == self._last[0] else b"".join(text(parent_id))
        own = b"".join(text(checkpoint_id))
        self._last = (checkpoint_id, own)
        values = channel_values(checkpoint, self._versions.of(checkpoint), self._formats)
        rest = b"," + body[1:] if body != b"{}" else b"}"
        size = length(len(_CHANNEL_VALUES) + len(values) + len(rest))
        return (
            *(_SIX, self._begin, own, parent),
            *(size, _CHANNEL_VALUES, values, rest),
            *jsonb(metadata),
        )
