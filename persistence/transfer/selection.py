"""Which threads of a source take part: by id, by pattern, by metadata, by age."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from persistence.errors import SourceError
from persistence.transfer.canonical import decode_json
from persistence.transfer.records import Checkpoint, Record, Reject, Source
from persistence.transfer.wrapping import Wrapped

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions on a thread; it takes part if it meets all that are given.

    Attributes:
        threads: Ids; each must be in the source.
        match: Patterns with ``*``, ``?`` and ``[...]``; a thread named by ``threads`` need not meet one.
        where: Metadata that one of the thread's checkpoints has, as in the ``filter`` of a saver's ``list``.
        newer_than: The thread's last checkpoint was made then or later.
        older_than: The thread's last checkpoint was made before then. Moments without a time zone are UTC.
    """

    threads: Sequence[str] = ()
    match: Sequence[str] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    newer_than: datetime | None = None
    older_than: datetime | None = None

    @property
    def everything(self) -> bool:
        """No condition at all."""
        return not (self.threads or self.match or self.where or self.newer_than or self.older_than)

    def of(self, source: Source) -> Source:
        """The source with only the selected threads.

        Raises:
            SourceError: A thread that is named is not there.
        """
        return source if self.everything else Selected(source, self._chosen(source))

    def _chosen(self, source: Source) -> list[str]:
        named = set(self.threads)
        threads = [
            thread
            for thread in source.threads()
            if (thread in named or any(fnmatchcase(thread, pattern) for pattern in self.match))
            or not (named or self.match)
        ]
        if missing := named.difference(threads):
            raise SourceError(
                f"{source.label} has no thread {min(missing)!r}",
                hint="thread ids are compared in full; a pattern goes with --match",
            )
        if not (self.where or self.newer_than or self.older_than):
            return threads
        return list(self._meeting(source.records(threads, data=False)))

    def _meeting(self, records: Iterator[Record]) -> Iterator[str]:
        """The threads among sorted records that have the metadata and the age.

        One with a row that cannot be read takes part: leaving it out would hide the row.
        """
        from persistence.metadata import clean_filter, comparable, matches  # they bring LangGraph

        wanted = {key: comparable(value) for key, value in clean_filter(self.where).items()}
        for thread, group in groupby(records, key=attrgetter("thread_id")):
            unread, has_metadata, last = False, not wanted, None
            for record in group:
                if isinstance(record, Reject):
                    unread = True
                elif isinstance(record, Checkpoint):
                    has_metadata = has_metadata or matches(decode_json(record.metadata), wanted)
                    last = max(filter(None, (last, _made(record))), default=None)
            if unread or (has_metadata and self._in_time(last)):
                yield thread

    def _in_time(self, last: datetime | None) -> bool:
        if self.newer_than is None and self.older_than is None:
            return True
        if last is None:
            return False
        return (self.newer_than is None or last >= _aware(self.newer_than)) and (
            self.older_than is None or last < _aware(self.older_than)
        )


class Selected(Wrapped):
    """Some threads of a source, as a source."""

    def __init__(self, source: Source, threads: Sequence[str]) -> None:
        super().__init__(source)
        self._threads = threads

    def threads(self) -> Iterator[str]:
        """Those."""
        return iter(self._threads)

    def count(self, threads: Sequence[str] | None = None) -> int:
        """The checkpoints of those."""
        return self._source.count(self._among(threads))

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        """The records of those."""
        return self._source.records(self._among(threads), data=data)

    def _among(self, threads: Sequence[str] | None) -> Sequence[str]:
        if threads is None:
            return self._threads
        mine = set(self._threads)
        return [thread for thread in threads if thread in mine]


def without(source: Source, threads: Collection[str]) -> Source:
    """The source without some threads."""
    if not threads:
        return source
    left_out = set(threads)
    return Selected(source, [thread for thread in source.threads() if thread not in left_out])


def _made(checkpoint: Checkpoint) -> datetime | None:
    """When a checkpoint was made, by its own ``ts``."""
    try:
        return _aware(datetime.fromisoformat(str(decode_json(checkpoint.body).get("ts"))))
    except ValueError:
        return None


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
