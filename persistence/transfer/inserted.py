"""Which rows a run has inserted, thread by thread, as its ledger knows it.

A run that followed its source has written to a thread more than once: by the first copy, whose keys stand
with its batches, and by every round that found the thread changed. What counts is what was noted last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain

from persistence.errors import TransferError
from persistence.transfer.keys import Key, unpack, unpack_part
from persistence.transfer.ledger import Followed, Ledger, Run

Inserted = Mapping[Key, bytes]
"""The key of each row, and a mark of its content."""


def inserted_by(ledger: Ledger, run: Run) -> Iterator[tuple[str, Inserted]]:
    """What a run has inserted and not deleted again, for each thread, in order."""
    if run.options.get("follow"):
        return ((thread.thread_id, keys) for thread, keys in _followed(ledger, run))
    return unpack(ledger.keys(run.run_id))


def require_noted(ledger: Ledger, run: Run) -> None:
    """Raise where the ledger does not know all that a run has inserted.

    Raises:
        TransferError: An older version made the run.
    """
    noted = chain(ledger.keys(run.run_id), ledger.item_keys(run.run_id))
    complete = sum(1 for _ in noted) == len(ledger.committed(run.run_id))
    if complete and run.options.get("follow"):
        complete = all(_is_complete(thread, keys) for thread, keys in _followed(ledger, run))
    if not complete:
        raise TransferError(
            f"run {run.run_id} was made by a version that did not note which rows it inserted",
            hint="delete its threads, or restore the database",
        )


def _followed(ledger: Ledger, run: Run) -> Iterator[tuple[Followed, Inserted]]:
    """The threads that a run still keeps: what it has deleted since is somebody else's, if it is there."""
    copied = unpack(ledger.keys(run.run_id))
    ahead = next(copied, None)
    for thread in ledger.followed(run.run_id):
        while ahead is not None and ahead[0] < thread.thread_id:
            ahead = next(copied, None)
        keys = dict(ahead[1]) if ahead is not None and ahead[0] == thread.thread_id else {}
        for forgets, part in thread.parts:
            keys = {key: mark for key, mark in keys.items() if key.kind not in forgets}
            keys |= unpack_part(part)
        yield thread, keys


def _is_complete(thread: Followed, keys: Inserted) -> bool:
    kinds = Counter(key.kind for key in keys)
    return not thread.stamp or (kinds["c"], kinds["w"]) == (thread.checkpoints, thread.writes)
