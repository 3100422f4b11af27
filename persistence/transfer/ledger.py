"""What a target database remembers of the transfers into it.

A batch's rows and its entry commit in one transaction, so what the ledger says is what happened,
whatever instant the process died at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import msgspec

State = Literal["running", "copied", "finished"]

RUNS = (
    "SELECT run_id, source_fingerprint, target_identity, state, options, totals"
    " FROM persistence_transfers ORDER BY started_at DESC, run_id"
)
"""The query of :meth:`Ledger.runs`; :func:`run_of` reads its rows."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One batch of one run, in the order of the columns of ``persistence_transfer_batches``."""

    run_id: str
    number: int
    thread_id: str
    """The batch's first thread."""
    digest: str
    """SHA-256 over the batch's records: a resumed run proves with it that it cut the same batch."""
    checkpoints: int
    writes: int
    values: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """One transfer, finished or not."""

    run_id: str
    source_fingerprint: str
    target_identity: str
    state: State
    options: Mapping[str, Any]
    """How batches are cut and what the source was called."""
    totals: Mapping[str, Any] | None


def run_of(row: Sequence[Any]) -> Run:
    """A row of :data:`RUNS`."""
    run_id, fingerprint, identity, state, options, totals = row
    return Run(
        run_id,
        fingerprint,
        identity,
        cast(State, state),
        msgspec.json.decode(options),
        msgspec.json.decode(totals) if totals else None,
    )


class Ledger(Protocol):
    """The record of transfers that a target database keeps."""

    def runs(self) -> list[Run]:
        """Every run into this database, newest first."""

    def begin(self, run: Run) -> None:
        """Note that a run starts."""

    def committed(self, run_id: str) -> Mapping[int, str]:
        """The batches that were committed, with their digests."""

    def advance(self, run_id: str, state: State, totals: Mapping[str, Any]) -> None:
        """Note how far a run has come."""
