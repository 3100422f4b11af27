"""Records as rows of COPY's binary form. Row formats: ``langgraph-checkpoint-postgres`` 3.2.0."""

from __future__ import annotations

from persistence.backends.postgres.copying import NULL, binary, fields, jsonb, length, name, text
from persistence.backends.postgres.transfer_versions import Versions, channel_values
from persistence.transfer.formats import Formats
from persistence.transfer.records import Checkpoint, Value, Write

_SIX, _NINE = fields(6), fields(9)
_FOUR_BYTES = length(4)


class Rows:
    """Makes them, of records in order."""

    def __init__(self, versions: Versions, formats: Formats) -> None:
        self._versions = versions
        self._formats = formats
        self._place: tuple[str, str] | None = None
        self._begin = b""

    def row(self, record: Value | Checkpoint | Write) -> bytes:
        """The row of a record that was placed."""
        if record[:2] != self._place:
            self._place = record[:2]
            self._begin = b"".join((*text(record.thread_id), *text(record.checkpoint_ns)))
        if isinstance(record, Write):
            return b"".join(self._of_write(record))
        if isinstance(record, Checkpoint):
            return b"".join(self._of_checkpoint(record))
        return b"".join(self._of_value(record))

    def _of_value(self, value: Value) -> tuple[bytes, ...]:
        type_, data = self._formats.sealed(value.type, value.data)
        return (_SIX, self._begin, name(value.channel), *text(value.version), name(type_), *binary(data))

    def _of_write(self, write: Write) -> tuple[bytes, ...]:
        _, _, checkpoint_id, task_id, idx, task_path, channel, type_, _, data = write
        type_, data = self._formats.sealed(type_, data or b"")
        return (
            _NINE,
            self._begin,
            *text(checkpoint_id),
            *text(task_id),
            name(task_path),
            _FOUR_BYTES,
            length(idx),
            name(channel),
            name(type_),
            *binary(data),
        )

    def _of_checkpoint(self, checkpoint: Checkpoint) -> tuple[bytes, ...]:
        parent = (NULL,) if checkpoint.parent_id is None else text(checkpoint.parent_id)
        values = channel_values(checkpoint, self._versions.of(checkpoint), self._formats)
        body = b'{"channel_values":' + values
        body += b"," + checkpoint.body[1:] if checkpoint.body != b"{}" else b"}"
        own = text(checkpoint.checkpoint_id)
        return (_SIX, self._begin, *own, *parent, *jsonb(body), *jsonb(checkpoint.metadata))
