"""The store within an archive: parts of its own, read with the same distrust as those of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec import UNSET

from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from persistence.transfer.canonical import NotCanonicalError, canonical_json
from persistence.transfer.items import BadItem, Item, NamespaceDigest, StoreDigester, describe
from persistence.transfer.report import StoreTotals

if TYPE_CHECKING:
    from collections.abc import Callable

    from persistence.transfer.archive import ArchiveSource
    from persistence.transfer.archive_writer import PartWriter


class ArchiveStore:
    """The store of an archive; see :class:`persistence.transfer.items.StoreSource`."""

    def __init__(self, archive: ArchiveSource) -> None:
        self._archive = archive

    def count(self) -> int:
        """How many items the manifest says there are."""
        section = self._archive.manifest.store
        return 0 if section is UNSET else section.items

    def items(self) -> Iterator[Item | BadItem]:
        """All items in order, checked.

        Raises:
            ArchiveError: The archive is damaged.
        """
        section = self._archive.manifest.store
        if section is UNSET:
            return
        reader = _Reader()
        for part in section.parts:
            yield from self._read(reader, part)
        if not reader.holds(section):
            raise ArchiveError(f"{self._archive.label} does not hold what its manifest says")

    def in_part(self, number: int) -> Iterator[Item]:
        """The items of one part, given by its index; the digests of namespaces that begin before say nothing.

        Raises:
            ArchiveError: The archive is damaged.
        """
        if (section := self._archive.manifest.store) is not UNSET:
            yield from self._read(_Reader(begun_before=number > 0), section.parts[number])

    def _read(self, reader: _Reader, part: fmt.StorePart) -> Iterator[Item]:
        for frame in self._archive.frames(part, fmt.store_decoder):
            try:
                if (item := reader.take(frame)) is not None:
                    yield item
            except NotCanonicalError as error:
                raise ArchiveError(f"{part.file} of {self._archive.label} is damaged: {error}") from None


class _Reader:
    """Checks what the frames claim about each other.

    Args:
        begun_before: The first namespace may have begun in a part that is not read.
    """

    def __init__(self, *, begun_before: bool = False) -> None:
        self._begun_before = begun_before
        self._digester = StoreDigester()
        self._totals = StoreTotals()
        self._last = ("", "")
        self._is_open = False

    def take(self, frame: fmt.StoreFrame) -> Item | None:
        """The item in a frame, if it holds one."""
        if isinstance(frame, fmt.NamespaceFrame):
            if self._begun_before:
                is_right = not self._is_open or frame.prefix == self._last[0]
            else:
                is_right = self._digester.end() == (frame.prefix, frame.sha256, frame.items)
            if not is_right:
                raise NotCanonicalError(f"namespace {frame.prefix!r} does not have the digest it should have")
            self._begun_before = self._is_open = False
            return None
        item = _item(frame)
        if self._totals.items and item[:2] <= self._last:
            raise NotCanonicalError(f"{describe(item)} is out of order")
        if self._is_open and item.prefix != self._last[0]:
            raise NotCanonicalError(f"namespace {self._last[0]!r} does not end")
        if not self._is_open and self._totals.items and item.prefix == self._last[0]:
            raise NotCanonicalError(f"namespace {item.prefix!r} goes on after its end")
        self._digester.see(item)
        self._totals.see(item)
        self._last, self._is_open = item[:2], True
        return item

    def holds(self, section: fmt.Store) -> bool:
        """Whether all of it was as the manifest says."""
        mine = (self._digester.namespaces, self._totals.items, self._totals.vectors, self._totals.bytes)
        claimed = (section.namespaces, section.items, section.vectors, section.bytes)
        same = self._digester.fingerprint() == section.fingerprint
        return same and mine == claimed and not self._is_open


def _item(frame: fmt.ItemFrame) -> Item:
    item = Item(
        frame.prefix,
        frame.key,
        frame.value,
        frame.created_at,
        frame.updated_at,
        frame.expires_at,
        frame.ttl_minutes,
        tuple(frame.vectors),
    )
    if canonical_json(item.value) != item.value:
        raise NotCanonicalError(f"the JSON of {describe(item)} is not canonical")
    if item.ttl_minutes is not None and not math.isfinite(item.ttl_minutes):
        raise NotCanonicalError(f"the time to live of {describe(item)} is no number")
    names = [vector.field for vector in item.vectors]
    if names != sorted(set(names)):
        raise NotCanonicalError(f"the vectors of {describe(item)} are not sorted")
    if any(not vector.embedding or len(vector.embedding) % 4 for vector in item.vectors):
        raise NotCanonicalError(f"a vector of {describe(item)} does not consist of float32 numbers")
    return item


class StoreWriter:
    """Appends the store to an archive that is being written."""

    def __init__(self, new_part: Callable[[str], PartWriter]) -> None:
        self._new_part = new_part
        self._parts: list[fmt.StorePart] = []
        self._open: PartWriter | None = None

    def add(self, item: Item) -> None:
        """Append an item; items come by prefix and key."""
        self._frame(fmt.ItemFrame(*item[:7], list(item.vectors)))

    def end_namespace(self, digest: NamespaceDigest) -> None:
        """Close a namespace with its digest."""
        self._frame(fmt.NamespaceFrame(*digest))

    def finish(self, totals: StoreTotals, fingerprint: str) -> fmt.Store:
        """The section of the manifest."""
        self._close_part()
        return fmt.Store(
            fingerprint, totals.namespaces, totals.items, totals.vectors, totals.bytes, self._parts
        )

    def abort(self) -> None:
        """Give up the part that is being written."""
        if self._open is not None:
            self._open.abort()

    def _frame(self, frame: fmt.StoreFrame) -> None:
        if self._open is not None and self._open.raw_bytes >= fmt.PART_BYTES:
            self._close_part()
        if self._open is None:
            self._open = self._new_part(fmt.store_part_name(len(self._parts) + 1))
        self._open.frame(frame)

    def _close_part(self) -> None:
        if self._open is not None:
            self._parts.append(self._open.close())
            self._open = None
