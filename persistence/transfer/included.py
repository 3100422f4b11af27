"""Which parts of a source take part: its threads, its store, or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from persistence.transfer.items import BadItem, Item, StoreSource
from persistence.transfer.records import Record, Source
from persistence.transfer.selection import Selected
from persistence.transfer.workers import Open, shared

if TYPE_CHECKING:
    from persistence.transfer.options import Options
    from persistence.transfer.semantic import Official


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


class _Included:
    """Threads of a source with another store."""

    def __init__(self, source: Source, store: StoreSource) -> None:
        self.label = source.label
        self._source = source
        self._store = store

    @property
    def database(self) -> str | None:
        return self._source.database

    def drift(self) -> list[str]:
        return self._source.drift()

    @property
    def identity(self) -> str:
        return self._source.identity

    def marks(self, after: str | None, upto: str) -> list[int]:
        return self._source.marks(after, upto)

    def official(self) -> Official | None:
        return self._source.official()

    def share(self) -> Open | None:
        return shared(self._source)

    def threads(self) -> Iterator[str]:
        return self._source.threads()

    def count(self, threads: Sequence[str] | None = None) -> int:
        return self._source.count(threads)

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        return self._source.records(threads, data=data)

    def store(self) -> StoreSource:
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
