"""What SQLite, and LangGraph's tables in it, cannot hold: looked for before anything is written."""

from __future__ import annotations

import msgspec
import ormsgpack

from persistence.backends.sqlite.codec import inside_map
from persistence.transfer.canonical import decode_json, msgpack_value
from persistence.transfer.formats import MSGPACK_TYPES
from persistence.transfer.preflight import Findings
from persistence.transfer.records import Checkpoint, Record, Value, Write

_ROW_BYTES = 1_000_000_000  # SQLite's limit for a value and for a row, as it is compiled by default
_INT8 = range(-(2**63), 2**63)
_skip = msgspec.msgpack.Decoder(msgspec.Raw).decode


class SqlitePreflight(Findings):
    """Looks at every record of a transfer; see :class:`persistence.transfer.records.Preflight`.

    LangGraph's SQLite layout keeps a checkpoint with all its values in one msgpack map, where a value has no
    type beside it. So each value must be one that reads back from there with the type that it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self._place: tuple[str, str] | None = None
        # Why a value cannot be kept, until a checkpoint of this namespace refers to it.
        self._unfit: dict[tuple[str, str, str, bytes], str] = {}

    def see(self, record: Record) -> None:
        """Note what of this record SQLite cannot hold."""
        super().see(record)
        match record:
            case Value():
                self._enter(record)
                if (reason := _unfit(record.channel, record.type, record.data)) is not None:
                    self._unfit[record.channel, record.version, record.type, record.sha256] = reason
            case Checkpoint():
                self._enter(record)
                self._checkpoint(record)
            case Write():
                if record.idx not in _INT8:
                    self.note("the index of a write is out of range", record)
                if len(record.data or b"") > _ROW_BYTES:
                    self.note("a value is larger than a SQLite row can be", record)

    def _enter(self, record: Value | Checkpoint) -> None:
        if record[:2] != self._place:
            self._place = record[:2]
            self._unfit.clear()

    def _checkpoint(self, record: Checkpoint) -> None:
        try:
            size = len(ormsgpack.packb(decode_json(record.body)))
        except (ormsgpack.MsgpackEncodeError, TypeError) as error:
            self.note(f"the checkpoint has no msgpack form: {error}", record)
            return
        size += len(record.metadata) + sum(ref.size + len(ref.channel) * 4 + 20 for ref in record.values)
        if size > _ROW_BYTES:
            self.note("the checkpoint with its values is larger than a SQLite row can be", record)
        for ref in record.values:
            if ref.data is not None:
                reason = _unfit(ref.channel, ref.type, ref.data)
            else:
                reason = self._unfit.get((ref.channel, ref.version or "", ref.type, ref.sha256))
            if reason is not None:
                self.note(reason, record)


def _unfit(channel: str, type_: str, data: bytes) -> str | None:
    """Why a map cannot hold a value: it is not one msgpack value, or stands there for another type."""
    if type_ not in MSGPACK_TYPES:
        return f"the value of channel {channel!r} is a {type_}; a checkpoint in SQLite has one format"
    packed = inside_map(type_, data)
    try:
        _skip(packed)
    except (msgspec.MsgspecError, RecursionError) as error:
        return f"the value of channel {channel!r} is no valid msgpack: {error}"
    if (back := msgpack_value(packed)) != (type_, data):
        return (
            f"the value of channel {channel!r} is stored as {type_!r}, and SQLite, which keeps no types,"
            f" would give it back as {back[0]!r}"
        )
    return None
