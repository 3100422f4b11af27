"""What a target database remembers of the transfers into it.

A batch's rows and its entry commit in one transaction, so what the ledger says is what happened,
whatever instant the process died at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain, groupby
from typing import Any, Literal, NamedTuple, Protocol, cast

import msgspec

from persistence.errors import SchemaError

State = Literal["running", "copied", "finished", "undoing", "undone"]
Action = Literal["skip", "replace", "merge"]
Statement = tuple[str, Sequence[object]]

_THREADS_AT_ONCE = 100
_RUN = "run_id, source_fingerprint, target_identity, state, options, totals"
_PUT_BATCH = """
INSERT INTO persistence_transfer_batches
    (run_id, batch_no, thread_id, digest, checkpoints, writes, blobs, bytes, committed_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, {now})
"""
_PUT_KEYS = "INSERT INTO persistence_transfer_keys (run_id, batch_no, keys) VALUES (?, ?, ?)"
_PUT_RUN = """
INSERT INTO persistence_transfers (run_id, source_fingerprint, target_identity, started_at, state, options)
VALUES (?, ?, ?, {now}, ?, ?)
"""
_PUT_ACTION = "INSERT INTO persistence_transfer_threads (run_id, thread_id, action) VALUES (?, ?, ?)"
_PUT_REJECT = """
INSERT INTO persistence_transfer_rejects (run_id, reject_no, thread, place, reason, raw)
VALUES (?, ?, ?, ?, ?, ?)
"""
_FOLLOWED = f"""
SELECT f.thread_id, f.stamp, f.checkpoints, f.writes, k.forgets, k.keys FROM (
    SELECT * FROM persistence_followed WHERE run_id = ? {{after}} ORDER BY thread_id LIMIT {_THREADS_AT_ONCE}
) f LEFT JOIN persistence_followed_keys k ON k.run_id = f.run_id AND k.thread_id = f.thread_id
ORDER BY f.thread_id, k.part_no
"""
_ADVANCE = """
UPDATE persistence_transfers SET state = ?, totals = ?, finished_at = {now} WHERE run_id = ?
"""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One batch of one run, in the order of the columns of ``persistence_transfer_batches``."""

    run_id: str
    number: int
    """From 0 for threads; from -1 down for items of the store."""
    thread_id: str
    """The batch's first thread, or namespace."""
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
    """How batches are cut, what the source was called, what is done about conflicts."""
    totals: Mapping[str, Any] | None


class SetAside(NamedTuple):
    """A row that was not moved."""

    thread_id: str
    place: str
    """Where it stands, in words."""
    reason: str
    raw: bytes
    """What it held: a row as the source stores it, or a record; msgpack."""


class Followed(NamedTuple):
    """A thread that a run keeps equal to its source."""

    thread_id: str
    stamp: str
    """Empty where it is not known how much of it has arrived."""
    checkpoints: int
    writes: int
    parts: list[tuple[str, bytes]]
    """What each time of catching up inserted (:func:`persistence.transfer.keys.pack_part`), and before it the
    kinds of keys of which nothing counts that was noted before."""


class Tables(Protocol):
    """The database that keeps a ledger."""

    now: str
    """An SQL expression for the time."""

    def query(self, statement: str, args: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """What a query gives; ``?`` stands for an argument."""

    def change(self, statements: Iterable[Statement]) -> None:
        """Some statements in one transaction."""


class Ledger:
    """The record of transfers that a target database keeps, in the tables ``persistence_transfer...``."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def runs(self) -> list[Run]:
        """Every run into this database, newest first."""
        rows = self._tables.query(
            f"SELECT {_RUN} FROM persistence_transfers ORDER BY started_at DESC, run_id"
        )
        return [_run_of(row) for row in rows]

    def begin(self, run: Run, actions: Mapping[str, Action], rejects: Iterable[SetAside] = ()) -> None:
        """Note that a run starts, what it does about threads that are there, and what it leaves out."""
        options = msgspec.json.encode(run.options).decode()
        row = (run.run_id, run.source_fingerprint, run.target_identity, run.state, options)
        self._tables.change(
            chain(
                [(_PUT_RUN.format(now=self._tables.now), row)],
                ((_PUT_ACTION, (run.run_id, thread, action)) for thread, action in actions.items()),
                (
                    (_PUT_REJECT, (run.run_id, number, reject.thread_id.encode(), *reject[1:]))
                    for number, reject in enumerate(rejects)
                ),
            )
        )

    def rejects(self, run_id: str) -> list[SetAside]:
        """The rows that a run left out, without what they held."""
        rows = self._tables.query(
            "SELECT thread, place, reason FROM persistence_transfer_rejects"
            " WHERE run_id = ? ORDER BY reject_no",
            (run_id,),
        )
        return [SetAside(bytes(thread).decode(), place, reason, b"") for thread, place, reason in rows]

    def forget_rejects(self, run_id: str) -> None:
        """A later run has taken care of the rows that this one left out."""
        self._tables.change([("DELETE FROM persistence_transfer_rejects WHERE run_id = ?", (run_id,))])

    def actions(self, run_id: str) -> dict[str, Action]:
        """What a run does about threads that were there when it began."""
        try:
            rows = self._tables.query(
                "SELECT thread_id, action FROM persistence_transfer_threads WHERE run_id = ?", (run_id,)
            )
        except SchemaError:  # a dry run into a ledger of revision 0002, whose runs did nothing about any
            return {}
        return {thread: cast(Action, action) for thread, action in rows}

    def committed(self, run_id: str) -> dict[int, str]:
        """The batches that were committed, with their digests."""
        rows = self._tables.query(
            "SELECT batch_no, digest FROM persistence_transfer_batches WHERE run_id = ?", (run_id,)
        )
        return dict(rows)

    def keys(self, run_id: str) -> Iterator[bytes]:
        """What each batch of threads inserted, in order; see :func:`persistence.transfer.keys.unpack`."""
        yield from self._keys(run_id, sorted(n for n in self.committed(run_id) if n >= 0))

    def item_keys(self, run_id: str) -> Iterator[bytes]:
        """As :meth:`keys` of the batches of items: :func:`persistence.transfer.keys.unpack_items`."""
        yield from self._keys(run_id, sorted((n for n in self.committed(run_id) if n < 0), reverse=True))

    def followed(self, run_id: str) -> Iterator[Followed]:
        """The threads that a run keeps equal to its source, in order."""
        last: str | None = None
        while rows := self._tables.query(
            _FOLLOWED.format(after="" if last is None else "AND thread_id > ?"),
            [run_id] if last is None else [run_id, last],
        ):
            for (thread, stamp, *counts), parts in groupby(rows, key=lambda row: row[:4]):
                noted = [(forgets, bytes(keys)) for *_, forgets, keys in parts if keys is not None]
                yield Followed(thread, stamp, counts[0], counts[1], noted)
            last = rows[-1][0]

    def _keys(self, run_id: str, numbers: Iterable[int]) -> Iterator[bytes]:
        for number in numbers:
            rows = self._tables.query(
                "SELECT keys FROM persistence_transfer_keys WHERE run_id = ? AND batch_no = ?",
                (run_id, number),
            )
            yield from (bytes(row[0]) for row in rows)

    def advance(self, run_id: str, state: State, totals: Mapping[str, Any]) -> None:
        """Note how far a run has come."""
        ended = self._tables.now if state in ("finished", "undone") else "NULL"
        args = (state, msgspec.json.encode(totals).decode(), run_id)
        self._tables.change([(_ADVANCE.format(now=ended), args)])


def entry_statements(entry: LedgerEntry, keys: bytes, now: str) -> list[Statement]:
    """What a sink executes in the transaction of a batch."""
    return [(_PUT_BATCH.format(now=now), astuple(entry)), (_PUT_KEYS, (entry.run_id, entry.number, keys))]


def _run_of(row: Sequence[Any]) -> Run:
    run_id, fingerprint, identity, state, options, totals = row
    return Run(
        run_id,
        fingerprint,
        identity,
        cast(State, state),
        msgspec.json.decode(options),
        msgspec.json.decode(totals) if totals else None,
    )
