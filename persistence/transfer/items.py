"""The neutral form of LangGraph's store, and what a side of a transfer must offer to have its store moved.

A source yields items by prefix and key, compared by code point, each with its vectors. Moments are
microseconds since 1970 in UTC, values canonical JSON, vectors float32 in little-endian order: what both
databases can give and take without a loss.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ormsgpack

from persistence.errors import ConflictError
from persistence.transfer.canonical import NotCanonicalError
from persistence.transfer.ledger import LedgerEntry

if TYPE_CHECKING:
    from persistence.transfer.options import OnConflict
    from persistence.transfer.records import Problem

Key = tuple[str, str]
"""Prefix (the namespace joined with dots, as both databases hold it) and key."""
Row = tuple[Any, ...]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Vector(NamedTuple):
    """The embedding of one field of an item."""

    field: str
    embedding: bytes
    """float32, little-endian."""
    created_at: int | None
    updated_at: int | None

    @property
    def dims(self) -> int:
        """How many numbers it has."""
        return len(self.embedding) // 4

    def floats(self) -> tuple[float, ...]:
        """The numbers."""
        return struct.unpack(f"<{self.dims}f", self.embedding)


class Item(NamedTuple):
    """One item of the store with its vectors."""

    prefix: str
    key: str
    value: bytes
    """Canonical JSON."""
    created_at: int | None
    updated_at: int | None
    expires_at: int | None
    ttl_minutes: float | None
    vectors: tuple[Vector, ...] = ()
    """Sorted by field."""

    @property
    def size(self) -> int:
        """Bytes of content."""
        return len(self.value) + sum(len(vector.embedding) for vector in self.vectors)


class BadItem(NamedTuple):
    """A row that has no neutral form."""

    prefix: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Items that are written together, in one transaction."""

    items: Sequence[Item]
    entry: LedgerEntry


class StoreSource(Protocol):
    """The store within the snapshot of a source."""

    def count(self) -> int:
        """How many items there are; none where the store has no tables."""

    def items(self) -> Iterator[Item | BadItem]:
        """All of them in order. Vectors whose item is gone are not there: no store shows them."""


class ItemPreflight(Protocol):
    """Looks at every item before the first is written."""

    def see_item(self, item: Item | BadItem) -> None:
        """Note what the target cannot hold."""

    def problems(self) -> list[Problem]:
        """What was found."""


class StoreSink(Protocol):
    """The store of a target."""

    def preflight(self) -> ItemPreflight:
        """A fresh check for one transfer."""

    def prepare(self) -> None:
        """Make the table of vectors, where the backend can."""

    def held(self, keys: Sequence[Key]) -> Mapping[Key, Item | BadItem]:
        """Those of these items that are here; none where the store has no tables."""

    def remove(self, marks: Mapping[Key, bytes]) -> tuple[int, int]:
        """Remove these items, in one transaction, but not those whose mark is another one by now.

        Returns:
            How many were removed, and how many have changed.
        """

    def write(self, batch: ItemBatch, rule: Rule) -> None:
        """Commit the batch and its ledger entry together.

        Args:
            batch: What to write.
            rule: Decides about items that are here; one that is written takes the place of what was here.
        """


@dataclass(frozen=True, slots=True)
class Rule:
    """What is written over items that the target has already.

    Attributes:
        target: What messages call the target.
        on_conflict: See :class:`persistence.transfer.options.Options`.
        vectors: Whether vectors take part; where not, they are no difference.
    """

    target: str
    on_conflict: OnConflict
    vectors: bool

    def same(self, item: Item, there: Item | BadItem) -> bool:
        """Whether the target's item has this content."""
        if isinstance(there, BadItem):
            return False
        return item == (there if self.vectors else there._replace(vectors=()))

    def replaces(self, item: Item, there: Item | BadItem) -> bool:
        """Whether an item takes the place of another one with its key. Merging keeps the newer of the two."""
        if self.on_conflict == "merge":
            newest = there.updated_at if isinstance(there, Item) else None
            return newest is None or (item.updated_at is not None and item.updated_at > newest)
        return self.on_conflict == "replace"

    def chosen(self, items: Sequence[Item], held: Mapping[Key, Item | BadItem]) -> list[Item]:
        """What of these items to write; what is there already is not written again.

        Raises:
            ConflictError: The target has one with another content, and no rule for that was given.
        """
        chosen = []
        for item in items:
            there = held.get(item[:2])
            if there is None or (not self.same(item, there) and self.replaces(item, there)):
                chosen.append(item)
            elif self.on_conflict == "error" and not self.same(item, there):
                raise self.conflict(item)
        return chosen

    def conflict(self, item: Item) -> ConflictError:
        """The error for an item that is there with another content."""
        return ConflictError(
            f"{self.target} already has another item in {describe(item)}",
            hint="say what to do about such items: --on-conflict skip, replace or merge",
        )


def item_line(item: Item) -> bytes:
    """An item as digests see it: one msgpack array, each item in its shortest form."""
    vectors = [
        (vector.field, hashlib.sha256(vector.embedding).digest(), vector.created_at, vector.updated_at)
        for vector in item.vectors
    ]
    return ormsgpack.packb(("i", *item[:7], vectors))


class NamespaceDigest(NamedTuple):
    """The content of one namespace in 32 bytes."""

    prefix: str
    sha256: bytes
    items: int


class StoreDigester:
    """Folds items, in order, into a digest for each namespace and a fingerprint of the whole store."""

    def __init__(self) -> None:
        self.namespaces = 0
        self._all = hashlib.sha256()
        self._one = hashlib.sha256()
        self._prefix = ""
        self._items = 0

    def see(self, item: Item) -> NamespaceDigest | None:
        """Take the next item; gives the digest of the namespace before it, if one ended."""
        ended = self.end() if item.prefix != self._prefix else None
        self._prefix = item.prefix
        self._one.update(item_line(item))
        self._items += 1
        return ended

    def end(self) -> NamespaceDigest | None:
        """The digest of the last namespace."""
        if self._items == 0:
            return None
        digest = NamespaceDigest(self._prefix, self._one.digest(), self._items)
        self._all.update(ormsgpack.packb(digest[:2]))
        self.namespaces += 1
        self._one, self._items = hashlib.sha256(), 0
        return digest

    def fingerprint(self) -> str:
        """The content of all namespaces that have ended."""
        return self._all.hexdigest()


def joint_fingerprint(threads: str, store: str, items: int) -> str:
    """The fingerprint of threads and a store together; an empty store leaves that of the threads."""
    return hashlib.sha256(f"{threads} {store}".encode()).hexdigest() if items else threads


def assembled(
    rows: Iterable[Row],
    vectors: Iterable[Row],
    item: Callable[[Row], Item],
    vector: Callable[[Row], Vector],
) -> Iterator[Item | BadItem]:
    """Items from the rows of both tables, each sorted and beginning with prefix and key."""
    ahead = iter(vectors)
    following = next(ahead, None)
    for row in rows:
        mine = []
        while following is not None and following[:2] <= row[:2]:
            if following[:2] == row[:2]:
                mine.append(following[2:])
            following = next(ahead, None)
        try:
            yield item(row)._replace(vectors=tuple(map(vector, mine)))
        except NotCanonicalError as error:
            yield BadItem(row[0], row[1], str(error))


def describe(item: Item | BadItem) -> str:
    """An item's place in words, for messages."""
    return f"namespace {item.prefix!r}, key {item.key!r}"


def microseconds(moment: datetime) -> int:
    """A moment as both databases count it."""
    return (moment - EPOCH) // _MICROSECOND


def moment(value: int) -> datetime:
    """The moment so many microseconds after 1970.

    Raises:
        OverflowError: Python's calendar does not reach there.
    """
    return EPOCH + timedelta(microseconds=value)


def minutes(value: object) -> float | None:
    """A time to live as both databases and an archive can mean it.

    Raises:
        NotCanonicalError: It is no finite number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NotCanonicalError("the time to live is no number")
    return float(value) or 0.0
