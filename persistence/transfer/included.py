"""Which parts of a source take part: its threads, its store, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from persistence.transfer.items import BadItem, Item, StoreSource
from persistence.transfer.records import Source
from persistence.transfer.selection import Selected
from persistence.transfer.wrapping import Wrapped

if TYPE_CHECKING:
    from persistence.transfer.options import Options


def included(source: Source, options: Options) -> Source:
    """The source with nothing but what the options include.

    Raises:
        SourceError: A thread that is named is not there.
    """
    threads = options.select.of(source) if "checkpoints" in options.include else Selected(source, [])
    return _Included(threads, store_of(source, options))


def left_out(source: Source, options: Options) -> int:
    """How many items the source has that do not take part."""
    return 0 if "store" in options.include else source.store().count()


def store_of(source: Source, options: Options) -> StoreSource:
    """What takes part of the source's store."""
    if "store" not in options.include:
        return _NoStore()
    return source.store() if options.vectors else _WithoutVectors(source.store())


class _Included(Wrapped):
    """Threads of a source with another store."""

    def __init__(self, source: Source, store: StoreSource) -> None:
        super().__init__(source)
        self._store = store

    def store(self) -> StoreSource:
        """The other one."""
        return self._store


class _NoStore:
    def count(self) -> int:
        return 0

    def items(self) -> Iterator[Item | BadItem]:
        return iter(())


class _WithoutVectors:
    def __init__(self, store: StoreSource) -> None:
        self._store = store

    def count(self) -> int:
        return self._store.count()

    def items(self) -> Iterator[Item | BadItem]:
        for item in self._store.items():
            yield item._replace(vectors=()) if isinstance(item, Item) else item
