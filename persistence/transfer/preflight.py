"""Collects what cannot be moved, so that it is said once, in full, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from persistence.errors import TransferError
from persistence.transfer.chunks import Chunk
from persistence.transfer.digest import describe
from persistence.transfer.items import BadItem, Item
from persistence.transfer.items import describe as describe_item
from persistence.transfer.records import Checkpoint, Problem, Record, Reject, Write

_EXAMPLES = 3
_SHOWN = 3


class Findings:
    """Notes rows that the source could not express; targets with limits of their own extend it."""

    told: Callable[[Record, str], None] | None = None
    """Told each row that cannot be moved, and why."""

    def __init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self._before: tuple[object, ...] = ()

    def see(self, record: Record) -> None:
        """Note what is wrong with a record."""
        match record:
            case Reject():
                self.note(record.reason, record)
            case Checkpoint():
                self.once(record, record[:3])
            case Write():
                self.once(record, record[:5])

    def take(self, chunk: Chunk) -> None:
        """As :meth:`see`, for some records."""
        for record in chunk.records:
            self.see(record)

    def once(self, record: Record, key: tuple[object, ...]) -> None:
        """Note a row whose key the one before it has: where tables lost their primary key."""
        if key == self._before:
            self.note("there are several rows of this key", record)
        self._before = key

    def note(self, reason: str, record: Record) -> None:
        """Count a row that cannot be moved, and keep the first few as examples."""
        if self.told is not None:
            self.told(record, reason)
        self.note_at(reason, describe(record))

    def note_at(self, reason: str, place: str) -> None:
        """As :meth:`note`, for a row whose place is known in words."""
        problem = self._problems.setdefault(reason, Problem(reason))
        problem.count += 1
        if len(problem.examples) < _EXAMPLES:
            problem.examples.append(place)

    def end_thread(self) -> None:
        """See :class:`persistence.transfer.records.Preflight`."""

    def merge(self, other: Findings) -> None:
        """See :class:`persistence.transfer.records.Preflight`."""
        for reason, problem in other._problems.items():
            mine = self._problems.setdefault(reason, Problem(reason))
            mine.count += problem.count
            mine.examples += problem.examples[: _EXAMPLES - len(mine.examples)]

    def problems(self) -> list[Problem]:
        """What was found, most frequent first."""
        return sorted(self._problems.values(), key=lambda problem: -problem.count)


class ItemFindings(Findings):
    """As :class:`Findings`, for the items of a store."""

    def see_item(self, item: Item | BadItem) -> None:
        """Note what is wrong with an item."""
        if isinstance(item, BadItem):
            self.note_item(item.reason, item)

    def note_item(self, reason: str, item: Item | BadItem) -> None:
        """Count an item that cannot be moved."""
        self.note_at(reason, describe_item(item))


class RefusedError(TransferError):
    """Some rows cannot be moved; nothing was written.

    Attributes:
        problems: Each kind of row that cannot be moved, with its count and the first examples.
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        total = sum(problem.count for problem in problems)
        kinds = "; ".join(f"{p.count} x {p.reason} (first: {p.examples[0]})" for p in problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} other kinds" if len(problems) > _SHOWN else ""
        super().__init__(
            f"{total} rows of {source} cannot be moved: {kinds}{more}", hint="nothing was written"
        )
