"""Rows that cannot be moved, set aside so that the others can: found first, left out, kept in the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import msgspec

from persistence.transfer.digest import describe
from persistence.transfer.engine import Clock, Meter
from persistence.transfer.held import HeldValues
from persistence.transfer.keys import Key, key_of
from persistence.transfer.ledger import SetAside
from persistence.transfer.records import Checkpoint, Preflight, Record, Reject, Source, Value
from persistence.transfer.report import counted
from persistence.transfer.wrapping import Wrapped

Unfit = Mapping[tuple[str, Key], str]
"""Why the target cannot hold a row, by thread and key."""


@dataclass(frozen=True, slots=True)
class Rejects:
    """The rows of a source that a target cannot take."""

    source: Source
    unfit: Unfit
    threads: Sequence[str]
    """Those that have such a row, sorted."""
    clock: Clock

    @classmethod
    def of(cls, source: Source, preflight: Preflight, clock: Clock) -> Rejects:
        """Read everything once, and find them."""
        unfit: dict[tuple[str, Key], str] = {}
        threads: set[str] = set()

        def note(record: Record, reason: str) -> None:
            threads.add(record.thread_id)
            if not isinstance(record, Reject):
                unfit.setdefault((record.thread_id, key_of(record)), reason)

        preflight.told = note
        for record in _read(source, None, clock):
            preflight.see(record)
        preflight.problems()
        return cls(source, unfit, sorted(threads), clock)

    def accepted(self) -> Source:
        """The source without them."""
        return _Accepted(self) if self.threads else self.source

    def rows(self) -> Iterator[SetAside]:
        """Read their threads again, and give them with their content."""
        for record in _read(self.source, self.threads, self.clock) if self.threads else ():
            if (reason := self.reason(record)) is not None:
                raw = record.raw if isinstance(record, Reject) else msgspec.msgpack.encode(record)
                yield SetAside(record.thread_id, describe(record), reason.replace("\0", "\\0"), raw)

    def reason(self, record: Record) -> str | None:
        """Why a row is set aside; ``None`` where it is not."""
        if isinstance(record, Reject):
            return record.reason
        if not self.unfit:
            return None
        thread = record.thread_id
        if (reason := self.unfit.get((thread, key_of(record)))) is not None:
            return reason
        if isinstance(record, Checkpoint):
            for ref in record.values:
                key = Key("v", record.checkpoint_ns, ref.channel, ref.version or "")
                if (reason := self.unfit.get((thread, key))) is not None:
                    return reason
        return None


def _read(source: Source, threads: Sequence[str] | None, clock: Clock) -> Iterator[Record]:
    """The records, while the progress is told."""
    with clock.phase("rejects"):
        meter = Meter(clock, "rejects", source.count(threads))
        yield from counted(source.records(threads), meter)
        meter.tell()


class _Accepted(Wrapped):
    """A source without the rows that are set aside, and without the values that only those use."""

    def __init__(self, rejects: Rejects) -> None:
        super().__init__(rejects.source)
        self._rejects = rejects
        self._threads = frozenset(rejects.threads)

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        """The source's that can be moved; in threads where some cannot, values come once they are used."""
        with closing(HeldValues()) as held:
            sent: set[tuple[object, ...]] = set()
            place: tuple[str, str] | None = None
            for record in self._source.records(threads, data=data):
                if record.thread_id not in self._threads:
                    yield record
                    continue
                if record[:2] != place:
                    place = record[:2]
                    sent.clear()
                if self._rejects.reason(record) is not None:
                    continue
                if isinstance(record, Value):
                    held.add(record)
                    continue
                if isinstance(record, Checkpoint):
                    yield from _values(record, held, sent)
                yield record

    def share(self) -> None:
        """Workers do not know what is set aside."""


def _values(record: Checkpoint, held: HeldValues, sent: set[tuple[object, ...]]) -> Iterator[Value]:
    """What a checkpoint is the first one to use."""
    for ref in record.values:
        key = ref[:4]
        if ref.data is None and key not in sent and (data := held.get(record, ref)) is not None:
            sent.add(key)
            yield Value(*record[:2], ref.channel, ref.version or "", ref.type, ref.sha256, data)
