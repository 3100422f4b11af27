"""Several values under one version of a channel.

SQLite keeps the whole state in each checkpoint, so a graph that changes its state in place, without
returning it, leaves several values under one version there. LangGraph's Postgres layout has one blob for
each version. It gets what the newest checkpoint at this version holds, since that is what a graph goes on
from, whoever reads it. The others stand in the rows of their checkpoints, as the markers that our own savers
write (``persistence.backends.postgres.markers``).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import lru_cache
from typing import NamedTuple

import msgspec

from persistence.backends.postgres.markers import marker
from persistence.errors import TransferError
from persistence.transfer.canonical import inline_json
from persistence.transfer.digest import describe
from persistence.transfer.formats import Formats
from persistence.transfer.held import HeldValues
from persistence.transfer.records import Checkpoint, Record, Value, ValueRef

_encode = msgspec.json.encode
_NO_VALUE = _encode(marker(None))


class Held(NamedTuple):
    """What a checkpoint holds in a channel."""

    type: str
    sha256: bytes
    delta: bool
    carrier: str | None
    """The checkpoint whose record has the bytes; ``None`` where a :class:`Value` has them."""

    def is_in(self, ref: ValueRef | None) -> bool:
        """Whether another checkpoint holds the same."""
        return ref is not None and ref.type == self.type and ref.sha256 == self.sha256


Chosen = Mapping[tuple[str, str | None], Held | None]
"""What the blob of a channel's version holds, where that had to be chosen; ``None``: there is no blob."""
_NOTHING_CHOSEN: Chosen = {}
_NOTHING = (None, None)


class _Version(msgspec.Struct):
    """What the checkpoints at one version hold."""

    newest: ValueRef | None
    """Of a large value without its bytes."""
    checkpoint_id: str
    needs_blob: bool
    several: bool = False

    def see(self, ref: ValueRef | None, checkpoint_id: str, *, needs_blob: bool) -> None:
        """The next checkpoint."""
        newest = self.newest
        if ref is None and newest is not None and newest.delta:
            return  # a snapshot belongs to the checkpoints that carry its mark, and others hold nothing
        if ref is None or newest is None:
            same = ref is newest or (ref is not None and ref.delta)
        else:
            same = ref.type == newest.type and ref.sha256 == newest.sha256
        self.several = self.several or not same
        self.needs_blob = self.needs_blob or needs_blob
        self.newest, self.checkpoint_id = ref, checkpoint_id

    def held(self) -> Held | None:
        """What the newest checkpoint holds."""
        if (ref := self.newest) is None:
            return None
        return Held(ref.type, ref.sha256, ref.delta, None if ref.data is None else self.checkpoint_id)


class Versions:
    """Looks at all checkpoints, and decides which value of each version becomes the blob.

    What it remembers of a namespace that was read are the versions with more than one value.
    """

    def __init__(self, *, all_blobs: bool) -> None:
        self._all_blobs = all_blobs  # also scalars
        self._special: dict[tuple[str, str], Chosen] = {}
        self._carrying: set[tuple[str, str]] = set()
        self._seen: dict[tuple[str, str], _Version] = {}
        # By channel the version that the last checkpoint has and, where it has its newest value, what is at
        # it: that this checkpoint is one that has it is noted once another one has not.
        self._now: dict[str, tuple[str | None, _Version | None]] = {}
        self._last_id = ""

    def see(self, record: Checkpoint) -> None:
        """Take the next checkpoint of the namespace."""
        held = {ref[0]: ref for ref in record.values}
        now = self._now
        for key in record.versions.items():
            ref = held.get(key[0])
            version, seen = now.get(key[0], _NOTHING)
            if seen is not None:
                if seen.newest is ref and version == key[1]:  # most channels do not change
                    continue
                seen.checkpoint_id = self._last_id
            now[key[0]] = (key[1], self._changed(record, key, ref))
        if len(now) > len(record.versions):
            self._leave(now.keys() - record.versions.keys())
        self._last_id = record.checkpoint_id

    def _changed(self, record: Checkpoint, key: tuple[str, str], ref: ValueRef | None) -> _Version | None:
        """A channel has another version or value than in the checkpoint before."""
        seen = self._seen.get(key)
        if seen is not None and seen.newest is ref:
            return seen
        needs_blob = False
        if ref is not None:
            needs_blob = ref.data is None or self._all_blobs or inline_json(ref.type, ref.data) is None
            if needs_blob and ref.data is not None:
                self._carrying.add(record[:2])
                ref = ref._replace(data=b"")
        if seen is None:
            seen = self._seen[key] = _Version(ref, record.checkpoint_id, needs_blob)
        else:
            seen.see(ref, record.checkpoint_id, needs_blob=needs_blob)
        return seen if seen.newest is ref else None

    def _leave(self, channels: Iterable[str]) -> None:
        """The last checkpoint was the last one, for now, to have these channels."""
        for channel in list(channels):
            _, seen = self._now.pop(channel)
            if seen is not None:
                seen.checkpoint_id = self._last_id

    def end(self, place: tuple[str, str]) -> list[tuple[str, str]]:
        """The namespace has no more checkpoints; its channels and versions of which the blob was chosen."""
        self._leave(self._now)
        several = [key for key, seen in self._seen.items() if seen.needs_blob and seen.several]
        if several:
            self._special[place] = {key: self._seen[key].held() for key in several}
        self._seen.clear()
        return several

    def merge(self, other: Versions) -> None:
        """Take what was decided about other namespaces."""
        self._special.update(other._special)
        self._carrying.update(other._carrying)

    def as_it_came(self, place: tuple[str, str]) -> bool:
        """Whether the namespace's rows hold what its records do."""
        return place not in self._special and place not in self._carrying

    def of(self, record: Value | Checkpoint) -> Chosen:
        """What was chosen in the namespace of a record."""
        return self._special.get(record[:2], _NOTHING_CHOSEN) if self._special else _NOTHING_CHOSEN


class Placement:
    """Puts each value where :class:`Versions` decided: into the blob table, or into a checkpoint's row."""

    def __init__(self, versions: Versions, *, all_blobs: bool) -> None:
        self._versions = versions
        self._all_blobs = all_blobs
        self._values: HeldValues
        self._place: tuple[str, str] | None = None
        self._placed: set[tuple[str, str | None]] = set()

    def records(self, records: Iterable[Record]) -> Generator[Record]:
        """See :meth:`persistence.transfer.records.Sink.placed`."""
        with closing(HeldValues()) as self._values:
            for record in records:
                match record:
                    case Value():
                        if self._is_blob(record):
                            yield record
                    case Checkpoint():
                        yield from self._checkpoint(record)
                    case _:
                        yield record

    def _is_blob(self, value: Value) -> bool:
        """Whether the blob table gets it; another one is kept for the rows of its checkpoints."""
        special = self._versions.of(value)
        if (key := (value.channel, value.version)) not in special:
            return self._is_first(value, key)
        held = special[key]
        if held is not None and held.carrier is None and held[:2] == (value.type, value.sha256):
            return True
        self._values.add(value)
        return False

    def _checkpoint(self, record: Checkpoint) -> Iterator[Value | Checkpoint]:
        """The checkpoint with what its row holds, after the blobs that only its record has."""
        if self._versions.as_it_came(record[:2]):
            yield record
            return
        special = self._versions.of(record)
        refs = []
        for ref in record.values:
            key = (ref.channel, ref.version)
            if is_marked(ref, special, all_blobs=self._all_blobs):
                if (data := self._values.get(record, ref)) is None:
                    where = describe(record)
                    raise TransferError(f"{where}: the value of channel {ref.channel!r} is missing")
                refs.append(ref._replace(data=data))
            elif ref.data is None or (special.get(key) is None and self._is_scalar(ref)):
                refs.append(ref)
            else:
                chosen = special.get(key)
                if chosen.carrier == record.checkpoint_id if chosen else self._is_first(record, key):
                    yield Value(*record[:2], ref.channel, ref.version or "", *ref[2:4], ref.data)
                refs.append(ref._replace(data=None))
        yield record._replace(values=tuple(refs))

    def _is_scalar(self, ref: ValueRef) -> bool:
        return not self._all_blobs and inline_json(ref.type, ref.data or b"") is not None

    def _is_first(self, record: Value | Checkpoint, key: tuple[str, str | None]) -> bool:
        """Whether a version of which no blob was chosen has none yet."""
        if (place := record[:2]) != self._place:
            self._place = place
            self._placed.clear()
        if key in self._placed:
            return False
        self._placed.add(key)
        return True


def is_marked(ref: ValueRef, special: Chosen, *, all_blobs: bool = False) -> bool:
    """Whether a checkpoint's row holds a value as a marker."""
    key = (ref.channel, ref.version)
    if ref.version is None or (key in special and special[key] is None):
        return all_blobs or ref.data is None or inline_json(ref.type, ref.data) is None
    return (blob := special.get(key)) is not None and not blob.is_in(ref)


def channel_values(record: Checkpoint, special: Chosen, formats: Formats) -> bytes:
    """What a row holds of the values: scalars, markers, and ``true`` for a DeltaChannel snapshot.

    Args:
        record: A checkpoint that :class:`Placement` gave.
        special: What was chosen in its namespace.
        formats: Encrypt what is not readable in the row.
    """
    inline = []
    for channel, version, type_, _, data, _, delta in record.values:
        if data is None:
            if delta:
                inline.append(_quoted(channel) + b"true")  # what ``put`` of 3.2.0 leaves
            continue
        scalar = None if formats.encrypts else inline_json(type_, data)
        if scalar is None or (special and special.get((channel, version)) is not None):
            scalar = _encode(marker(formats.sealed(type_, data)))
        inline.append(_quoted(channel) + scalar)
    if special:
        held = {ref.channel for ref in record.values}
        for key in record.versions.items():
            blob = special.get(key)
            if key[0] not in held and blob is not None and not blob.delta:
                inline.append(_quoted(key[0]) + _NO_VALUE)
    return b"{" + b",".join(inline) + b"}"


@lru_cache(4096)
def _quoted(channel: str) -> bytes:
    return _encode(channel) + b":"
