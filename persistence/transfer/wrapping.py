"""A source made of another one; those that change something about it override that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from persistence.transfer.workers import Open, shared

if TYPE_CHECKING:
    from persistence.transfer.items import StoreSource
    from persistence.transfer.records import Record, Source
    from persistence.transfer.semantic import Official


class Wrapped:
    """The same as a source; see :class:`persistence.transfer.records.Source`."""

    def __init__(self, source: Source) -> None:
        self.label = source.label
        self._source = source

    @property
    def divisible(self) -> bool:
        """The source's."""
        return self._source.divisible

    @property
    def encrypted(self) -> bool:
        """The source's."""
        return self._source.encrypted

    @property
    def database(self) -> str | None:
        """The source's."""
        return self._source.database

    @property
    def size(self) -> int | None:
        """The source's, at most."""
        return self._source.size

    @property
    def identity(self) -> str:
        """The source's."""
        return self._source.identity

    @property
    def place(self) -> str:
        """The source's."""
        return self._source.place

    @property
    def converted(self) -> int:
        """The source's."""
        return self._source.converted

    def drift(self) -> list[str]:
        """The source's."""
        return self._source.drift()

    def marks(self, after: str | None, upto: str) -> list[int]:
        """The source's, of all its threads."""
        return self._source.marks(after, upto)

    def official(self) -> Official | None:
        """The source's."""
        return self._source.official()

    def share(self) -> Open | None:
        """The source's: a worker is told which threads are its own."""
        return shared(self._source)

    def threads(self) -> Iterator[str]:
        """The source's."""
        return self._source.threads()

    def count(self, threads: Sequence[str] | None = None) -> int:
        """The source's."""
        return self._source.count(threads)

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        """The source's."""
        return self._source.records(threads, data=data)

    def store(self) -> StoreSource:
        """The source's."""
        return self._source.store()
