"""What Postgres, and LangGraph's tables in it, cannot hold: looked for before anything is written."""

from __future__ import annotations

from persistence.transfer.canonical import has_nul, inline_json
from persistence.transfer.preflight import Findings
from persistence.transfer.records import Checkpoint, Record, Value, ValueRef, Write

# A B-tree entry is at most a third of a page, 2,704 bytes with its header; text that compresses
# could be longer, but where that ends depends on the text.
_KEY_BYTES = 2_600
_BYTEA_BYTES = 1_000_000_000
_JSON_BYTES = 200_000_000
_INT4 = range(-(2**31), 2**31)
_KNOWN_TYPES = frozenset({"msgpack", "bytes", "bytearray", "null"})


class PostgresPreflight(Findings):
    """Looks at every record of a transfer; see :class:`persistence.transfer.records.Preflight`.

    LangGraph's Postgres layout keeps one value per channel and version, while SQLite keeps the whole state in
    each checkpoint. A graph that changes its state in place, without returning it, leaves two values
    under one version in SQLite; Postgres can hold only one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._place: tuple[str, str] | None = None
        self._blobs: dict[tuple[str, str], tuple[bytes, bool]] = {}
        self._others: dict[tuple[str, str], bool] = {}

    def see(self, record: Record) -> None:
        """Note what of this record Postgres cannot hold."""
        super().see(record)
        match record:
            case Checkpoint():
                self._checkpoint(record)
            case Write():
                key = (record.thread_id, record.checkpoint_ns, record.checkpoint_id, record.task_id)
                self._text(record, *key, also=(record.task_path, record.channel))
                if record.idx not in _INT4:
                    self.note("the index of a write is out of range", record)
                self._name(record, record.channel, record.task_id)
                self._content(record)
            case Value():
                self._text(record, record.thread_id, record.checkpoint_ns, record.channel, record.version)
                self._name(record, record.channel)
                self._content(record)

    def _checkpoint(self, record: Checkpoint) -> None:
        if (place := (record.thread_id, record.checkpoint_ns)) != self._place:
            self._place = place
            self._blobs.clear()
            self._others.clear()
        key = (record.thread_id, record.checkpoint_ns, record.checkpoint_id)
        self._text(record, *key, also=(record.parent_id or "",))
        if b'"v":' not in record.body:
            self.note("the checkpoint names no format version (v), which the Postgres saver needs", record)
        for name, text in (("checkpoint", record.body), ("metadata", record.metadata)):
            if has_nul(text):
                self.note(f"the {name} holds the NUL character, which Postgres cannot store", record)
            if len(text) > _JSON_BYTES:
                self.note(f"the {name} is too large for JSONB", record)
        held = {ref.channel: ref for ref in record.values}
        for ref in record.values:
            if ref.version is None and inline_json(ref.type, ref.data or b"") is None:
                self.note("a channel has a value but no version, so Postgres cannot keep the value", record)
            if ref.data is not None and "\0" in ref.channel:
                self.note("an id holds the NUL character, which Postgres cannot store", record)
        for channel, version in record.versions.items():
            self._one_value(record, (channel, version), held.get(channel))

    def _one_value(self, record: Checkpoint, key: tuple[str, str], ref: ValueRef | None) -> None:
        """Whether the checkpoint has the value that its other users of this version have."""
        blob = self._blobs.get(key)
        if ref is not None and ref.data is None:
            absent = self._others.get(key)
            clash = (blob is not None and blob[0] != ref.sha256) or (
                absent is not None and not (absent and ref.delta)
            )
            self._blobs.setdefault(key, (ref.sha256, ref.delta))
        else:
            # What our own savers keep in the row beside the version's value.
            beside = ref is not None and ref.data is not None and inline_json(ref.type, ref.data) is None
            clash = beside or (blob is not None and not (ref is None and blob[1]))
            # An absence beside a scalar is fine, as neither is a blob; the scalar is what would clash.
            self._others[key] = ref is None and self._others.get(key, True)
        if clash:
            self.note(
                f"channel {key[0]!r} has different values under one version; the graph seems to change its"
                " state in place, and Postgres keeps one value per version",
                record,
            )

    def _text(self, record: Record, *key: str, also: tuple[str, ...] = ()) -> None:
        if "\0" in "".join((*key, *also)):
            self.note("an id holds the NUL character, which Postgres cannot store", record)
        if sum(map(len, key)) * 4 > _KEY_BYTES and sum(len(t.encode()) for t in key) > _KEY_BYTES:
            self.note(f"ids of more than {_KEY_BYTES} bytes do not fit a Postgres index", record)

    def _name(self, record: Value | Write, *names: str) -> None:
        # The saver of 3.2.0 reads these as ``channel::bytea``, where a backslash begins an escape.
        if "\\" in "".join(names):
            self.note("a channel or task has a backslash in its name, which LangGraph misreads", record)

    def _content(self, record: Value | Write) -> None:
        if record.type not in _KNOWN_TYPES:
            self.note(f"the serializer type {record.type!r} is not supported yet", record)
        if record.data is not None and len(record.data) > _BYTEA_BYTES:
            self.note("a value is larger than a Postgres field can be", record)
