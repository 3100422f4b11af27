"""What Postgres, and LangGraph's tables in it, cannot hold: looked for before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq, itemgetter

from persistence.backends.postgres.transfer_rows import Rows
from persistence.backends.postgres.transfer_versions import Versions, is_marked
from persistence.transfer.canonical import has_nul
from persistence.transfer.chunks import Chunk, format_version
from persistence.transfer.preflight import Findings
from persistence.transfer.records import Checkpoint, Problem, Record, Value, ValueRef, Write

# A B-tree entry is at most a third of a page, 2,704 bytes with its header; text that compresses
# could be longer, but where that ends depends on the text.
_KEY_BYTES = 2_600
_BYTEA_BYTES = 1_000_000_000
_JSON_BYTES = 200_000_000
_INT4 = range(-(2**31), 2**31)
_NUMBERS = frozenset({int, float, bool})


class PostgresPreflight(Findings):
    """Looks at every record of a transfer; see :class:`persistence.transfer.records.Preflight`.

    Of several values under one version it finds which becomes the blob, for the sink to go by.

    Args:
        versions: What finds it.
        rows: Make the rows of threads in which there was nothing to find; ``None`` where that cannot be done.
    """

    def __init__(self, versions: Versions, rows: Rows | None = None) -> None:
        super().__init__()
        self._versions = versions
        self._rows = rows
        self.finishes = rows is not None
        self._as_it_came = self.as_it_came = True
        self._place: tuple[str, str] | None = None
        # Checkpoints that could be too large, if their values had to stand in the row.
        self._large: list[Checkpoint] = []

    def see(self, record: Record) -> None:
        """Note what of this record Postgres cannot hold."""
        match record:
            case Checkpoint():
                self._checkpoint(record)
            case Write():
                self.once(record, record[:5])
                plain = _is_plain(*record[:4], record.task_path, record.channel)
                if not plain:
                    self._text(record, *record[:4], also=(record.task_path, record.channel))
                if record.idx not in _INT4:
                    self.note("the index of a write is out of range", record)
                if not plain:
                    self._name(record, record.channel, record.task_id)
                self._content(record)
            case Value():
                if not _is_plain(*record[:4]):
                    self._text(record, *record[:4])
                    self._name(record, record.channel)
                self._content(record)
            case _:
                super().see(record)

    def take(self, chunk: Chunk) -> None:
        """See :class:`persistence.transfer.records.Preflight`."""
        if chunk.reject is not None or self._may_repeat(chunk) or not _is_usual(chunk):
            super().take(chunk)
            return
        for checkpoint in chunk.checkpoints:
            self._enter(checkpoint)
            self._versions.see(checkpoint)
        if chunk.writes:
            self._before = chunk.writes[-1][:5]
        elif chunk.checkpoints:
            self._before = chunk.checkpoints[-1][:3]

    def _may_repeat(self, chunk: Chunk) -> bool:
        """Whether a row may have the key of the one before it; see :meth:`once`."""
        ids = [record[2] for record in chunk.checkpoints]
        writes = list(map(_varying, chunk.writes))
        return (
            any(map(eq, ids, ids[1:]))
            or any(map(eq, writes, writes[1:]))
            or (bool(ids) and chunk.checkpoints[0][:3] == self._before)
            or (bool(writes) and chunk.writes[0][:5] == self._before)
        )

    def _enter(self, record: Checkpoint) -> None:
        if (place := record[:2]) != self._place:
            self._end()
            self._place = place

    def _checkpoint(self, record: Checkpoint) -> None:
        self._enter(record)
        key = record[:3]
        self.once(record, key)
        if not _is_plain(*key, record.parent_id or ""):
            self._text(record, *key, also=(record.parent_id or "",))
        if type(format_version(record.body)) not in _NUMBERS:
            self.note("the checkpoint names no format version (v), which the Postgres saver needs", record)
        for name, text in (("checkpoint", record.body), ("metadata", record.metadata)):
            if has_nul(text):
                self.note(f"the {name} holds the NUL character, which Postgres cannot store", record)
            if len(text) > _JSON_BYTES:
                self.note(f"the {name} is too large for JSONB", record)
        size = 0
        for channel, version, _, _, data, of_value, _ in record.values:
            size += of_value
            if data is not None and not _is_plain(*key[:2], channel, version or ""):
                self._text(record, *key[:2], channel, version or "")
        self._versions.see(record)
        if len(record.body) + size * 4 // 3 > _JSON_BYTES:
            refs = tuple(ref._replace(data=None) for ref in record.values)
            self._large.append(record._replace(values=refs))

    def end_thread(self) -> None:
        """See :class:`persistence.transfer.records.Preflight`."""
        self._end()
        self.as_it_came, self._as_it_came = self._as_it_came, True

    def rows(self, chunk: Chunk) -> list[bytes]:
        """See :class:`persistence.transfer.recording.Finishing`."""
        return [] if self._rows is None else self._rows.rows(chunk)

    def merge(self, other: Findings) -> None:
        """See :class:`persistence.transfer.records.Preflight`; what became the blobs, too."""
        super().merge(other)
        assert isinstance(other, PostgresPreflight)  # noqa: S101 - a copy of this one
        self._versions.merge(other._versions)

    def problems(self) -> list[Problem]:
        """What was found in all records."""
        self._end()
        return super().problems()

    def _end(self) -> None:
        """A namespace has ended, so it is known which of its values become blobs."""
        if self._place is None:
            return
        for channel, version in self._versions.end(self._place):
            blob = Value(*self._place, channel, version, "", b"", b"")
            self._text(blob, *blob[:4])
            self._name(blob, channel)
        for record in self._large:
            special = self._versions.of(record)
            marked = [ref for ref in record.values if is_marked(ref, special)]
            if len(record.body) + sum(map(_marker_bytes, marked)) > _JSON_BYTES:
                self.note("the values that the checkpoint's row must hold are too large for JSONB", record)
        self._large.clear()
        self._as_it_came = self._as_it_came and self._versions.as_it_came(self._place)
        self._place = None

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
        if record.data is not None and len(record.data) > _BYTEA_BYTES:
            self.note("a value is larger than a Postgres field can be", record)


def _is_usual(chunk: Chunk) -> bool:
    """Whether nothing can be wrong with any of these records, but that a key comes twice: nearly always."""
    numbers = [write.idx for write in chunk.writes] or [0]
    return (
        max(chunk.sizes + chunk.wholes) * 4 // 3 <= _JSON_BYTES
        and min(numbers) in _INT4
        and max(numbers) in _INT4
        and _NUMBERS.issuperset(map(type, chunk.format_versions))
        and not any(has_nul(record.body) or has_nul(record.metadata) for record in chunk.checkpoints)
        and _are_plain(_texts(chunk))
    )


_varying = itemgetter(4, 3, 2)
"""Of a write's key what differs most often, that first."""
_texts_of_write = itemgetter(0, 1, 2, 3, 5, 6)


def _texts(chunk: Chunk) -> list[str]:
    """All that can be wrong with ids and names, of each record and of each value within a checkpoint."""
    thread = chunk.thread_id
    within = {(c[1], ref[0], ref[1] or "") for c in chunk.checkpoints for ref in c[7] if ref[4] is not None}
    return [
        *map("".join, map(_texts_of_write, chunk.writes)),
        # Of a parent that is none, too.
        *[f"{thread}{state[1]}{state[2]}{state[3]}" for state in chunk.states],
        *[f"{thread}{ns}{channel}{version}" for ns, channel, version in within],
    ]


def _are_plain(texts: Sequence[str]) -> bool:
    """Whether nothing can be wrong with these, however they are used: nearly always."""
    whole = "".join(texts)
    return max(map(len, texts)) * 4 <= _KEY_BYTES and "\0" not in whole and "\\" not in whole


def _is_plain(*texts: str) -> bool:
    return _are_plain(["".join(texts)])


def _marker_bytes(ref: ValueRef) -> int:
    """How long a value is in base64."""
    return ref.size * 4 // 3
