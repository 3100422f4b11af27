"""What a transfer tells while it runs and when it has ended."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from persistence.transfer.chunks import Chunk, chunked, sizes_of
from persistence.transfer.records import Checkpoint, Record, Value, Write
from persistence.transfer.survey import Finding, Sizes

if TYPE_CHECKING:
    from persistence.transfer.items import Item
    from persistence.transfer.ledger import Action

Phase = Literal["rejects", "read", "write", "verify", "read store", "write store", "verify store"]
TOLD_EVERY = 64
"""Checkpoints after which the progress is told."""


def amount(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


class Progress(Protocol):
    """Told how far a transfer has come; called often, so it must be quick."""

    def __call__(self, phase: Phase, done: int, total: int, unit_bytes: int) -> None:
        """``done`` of ``total`` checkpoints, or items, of this phase; ``unit_bytes`` bytes so far."""


def no_progress(phase: Phase, done: int, total: int, unit_bytes: int) -> None:
    """Show nothing."""


@dataclass(slots=True)
class Totals:
    """How much was moved."""

    threads: int = 0
    checkpoints: int = 0
    writes: int = 0
    values: int = 0
    """Channel values that were stored, each once per version."""
    values_referenced: int = 0
    """Channel values as SQLite counts them: once in every checkpoint that holds them."""
    bytes: int = 0
    """Content that was moved, before compression."""
    bytes_referenced: int = 0
    """What it would have been without storing each value once."""

    def take(self, chunk: Chunk) -> None:
        """Count some records."""
        self.checkpoints += len(chunk.checkpoints)
        self.values += len(chunk.states) - len(chunk.checkpoints)
        self.writes += len(chunk.writes)
        self.values_referenced += sum([len(checkpoint.values) for checkpoint in chunk.checkpoints])
        self.bytes += sum(chunk.sizes)
        self.bytes_referenced += sum(chunk.wholes) + sum(chunk.sizes[len(chunk.states) :])

    def add(self, other: Totals) -> None:
        """Count what somebody else has counted."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, before: Totals) -> Totals:
        """What was counted since."""
        return Totals(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))

    @property
    def records(self) -> int:
        """Rows that are written, one for each."""
        return self.checkpoints + self.writes + self.values

    @property
    def bytes_saved(self) -> int:
        """What storing each value once per version saved."""
        return max(0, self.bytes_referenced - self.bytes)


class Counts(ABC):
    """Counts what passes, and tells of it now and then."""

    def __init__(self) -> None:
        self.totals = Totals()

    def take(self, chunk: Chunk) -> None:
        """Count some records."""
        before = self.totals.checkpoints
        self.totals.take(chunk)
        if self.totals.checkpoints // TOLD_EVERY > before // TOLD_EVERY:
            self.tell()

    @abstractmethod
    def tell(self) -> None:
        """Say how far it has come."""


def counted(records: Iterable[Record], counts: Counts) -> Iterator[Record]:
    """The same records, counted."""
    for chunk in chunked(records):
        counts.take(chunk)
        yield from chunk.records


@dataclass(slots=True)
class StoreTotals:
    """How much of the store was moved."""

    namespaces: int = 0
    items: int = 0
    vectors: int = 0
    bytes: int = 0
    kept: int = 0
    """Items of which the target has kept its own, as it was told to."""

    def see(self, item: Item) -> None:
        """Count an item."""
        self.items += 1
        self.vectors += len(item.vectors)
        self.bytes += item.size


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a transfer.

    Attributes:
        source: What was read; holds no secret.
        target: What was written; holds no secret.
        fingerprint: SHA-256 over the content of the source.
        run_id: The run in the target's ledger; ``None`` for an export.
        totals: How much was moved, or would have been where nothing was left to do.
        batches_written: Batches that this run committed.
        batches_skipped: Batches that an interrupted run had committed before.
        already_done: The same content had been moved into this target before; nothing was written.
        verified: Whether the content of both sides was compared and found equal.
        conflicts: How many threads were in the target before, by what was done about them.
        seconds: Duration in all, and of each phase.
        phases: Seconds by phase.
        repeats_values: The target holds a value once in every checkpoint that has it, as SQLite does, so
            nothing is saved there.
        findings: What was noticed on the way; nothing of it stopped the transfer.
        sizes: How large the checkpoints and threads are.
        store: How much of the store was moved.
        items_left_out: How many items the source's store has that did not take part.
        set_aside: How many rows were not moved, and are kept in the ledger.
        rejects: The first of them, where they stand and why.
    """

    source: str
    target: str
    fingerprint: str
    run_id: str | None
    totals: Totals
    batches_written: int
    batches_skipped: int
    already_done: bool
    verified: bool
    conflicts: Mapping[Action, int]
    seconds: float
    phases: dict[str, float]
    repeats_values: bool = False
    findings: list[Finding] = field(default_factory=list)
    sizes: Sizes | None = None
    store: StoreTotals = field(default_factory=StoreTotals)
    items_left_out: int = 0
    set_aside: int = 0
    rejects: list[str] = field(default_factory=list)

    @property
    def bytes_saved(self) -> int:
        """What storing each value once per version saved in the target."""
        return 0 if self.repeats_values else self.totals.bytes_saved

    def to_json(self) -> str:
        """The report as one JSON object."""
        totals = asdict(self.totals) | {"bytes_saved": self.bytes_saved}
        return json.dumps(asdict(self) | {"totals": totals}, sort_keys=True)


def content_bytes(record: Value | Checkpoint | Write) -> int:
    """How many bytes of content a record carries."""
    return sizes_of(record)[0] if isinstance(record, Checkpoint) else len(record.data or b"")
