"""What a transfer tells while it runs and when it has ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from persistence.transfer.ledger import Action

Phase = Literal["read", "write", "verify"]


class Progress(Protocol):
    """Told how far a transfer has come; called often, so it must be quick."""

    def __call__(self, phase: Phase, done: int, total: int, unit_bytes: int) -> None:
        """``done`` of ``total`` checkpoints of this phase, which were ``unit_bytes`` bytes so far."""


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

    @property
    def bytes_saved(self) -> int:
        """What storing each value once per version saved."""
        return max(0, self.bytes_referenced - self.bytes)


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

    def to_json(self) -> str:
        """The report as one JSON object."""
        totals = asdict(self.totals) | {"bytes_saved": self.totals.bytes_saved}
        return json.dumps(asdict(self) | {"totals": totals}, sort_keys=True)
