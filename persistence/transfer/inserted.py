"""Which rows a run has inserted, thread by thread, as its ledger knows it.

A run that followed its source has written to a thread more than once: by the first copy, whose keys stand
with its batches, and by every round that found the thread changed. What counts is what was noted last.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, takewhile
from operator import itemgetter
from typing import Any, NamedTuple

from persistence.errors import TransferError
from persistence.transfer.followed_parts import parts_of
from persistence.transfer.items import Key as ItemKey
from persistence.transfer.keys import Key, unpack, unpack_items, unpack_part
from persistence.transfer.ledger import Followed, Ledger, Run
from persistence.transfer.live import claim_pages
from persistence.transfer.live_store import key_of
from persistence.transfer.records import Sink

Inserted = Mapping[Key, bytes]
"""The key of each row, and a mark of its content."""


def inserted_by(ledger: Ledger, run: Run) -> Iterator[tuple[str, Inserted]]:
    """What a run has inserted and not deleted again, for each thread, in order."""
    if run.options.get("follow"):
        return ((thread.thread_id, keys) for thread, keys in _followed(ledger, run))
    return unpack(ledger.keys(run.run_id))


class Own(NamedTuple):
    """What a run has inserted into a thread, and what was there before it."""

    thread_id: str
    inserted: Inserted
    """Without the rows that a later run has inserted: they were gone by then."""
    before: Inserted
    """Rows that earlier runs have inserted."""


def own(ledger: Ledger, run: Run) -> Iterator[Own]:
    """As :func:`inserted_by`, told apart from what other runs have inserted."""
    later = later_than(ledger, run)
    earlier = ledger.runs()[len(later) + 1 :]
    after = _Ahead(inserted_by(ledger, one) for one in _not_undone(later))
    before = _Ahead(inserted_by(ledger, one) for one in reversed(_not_undone(earlier)))
    for thread, keys in inserted_by(ledger, run):
        taken = set(chain.from_iterable(after.of(thread)))
        mine = {key: mark for key, mark in keys.items() if key not in taken}
        rows = chain.from_iterable(some.items() for some in before.of(thread))
        yield Own(thread, mine, {key: mark for key, mark in rows if key not in taken})


def own_items(sink: Sink, run: Run) -> Iterator[tuple[ItemKey, bytes]]:
    """The items of the store that a run has inserted and no later one, in order; with marks."""
    theirs = _Ahead(_items(sink, later) for later in _not_undone(later_than(sink.ledger(), run)))
    return ((key, mark) for key, mark in _items(sink, run) if not list(theirs.of(key)))


def later_than(ledger: Ledger, run: Run) -> list[Run]:
    """The runs into the database that began after this one."""
    return list(takewhile(lambda other: other.run_id != run.run_id, ledger.runs()))


def _not_undone(runs: Iterable[Run]) -> list[Run]:
    """Without those whose rows are gone: this run may have brought them since, if it was interrupted."""
    return [run for run in runs if run.state != "undone"]


class _Ahead:
    """What several runs have inserted, to be asked for in order."""

    def __init__(self, runs: Iterable[Iterator[tuple[Any, Any]]]) -> None:
        self._entries = heapq.merge(*runs, key=itemgetter(0))
        self._next = next(self._entries, None)

    def of(self, key: object) -> Iterator[Any]:
        """What they say of a thread, or an item."""
        while self._next is not None and self._next[0] <= key:
            if self._next[0] == key:
                yield self._next[1]
            self._next = next(self._entries, None)


def _items(sink: Sink, run: Run) -> Iterator[tuple[ItemKey, bytes]]:
    for data in sink.ledger().item_keys(run.run_id):
        yield from sorted(unpack_items(data).items())
    if "store" not in parts_of(run).include:
        return
    follower = sink.store_follower(run.run_id)  # of a run that has no batches of items
    for claims in claim_pages(follower.claims, key_of):
        yield from ((key_of(claim), claim.mark) for claim in claims)


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
