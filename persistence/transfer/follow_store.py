"""Brings the store of a target up to one state of a source that goes on changing, item by item.

It is the store's part of :mod:`persistence.transfer.sync`, and works as that does: an item with another stamp
is read and written, what was written is read back and compared, and items commit together with their claims.
The first copy is the first round. During a cut-over a watch notes every item that is written, so nothing but
those is looked at under the lock; where stamps show every change, all stamps are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

from persistence.errors import ConflictError, VerificationError
from persistence.transfer.difference import ItemDifference, Verdict
from persistence.transfer.items import BadItem, Item, ItemPreflight, Key, NamespaceDigest, describe
from persistence.transfer.live import claim_pages
from persistence.transfer.live_store import (
    ItemChange,
    ItemClaim,
    ItemStamp,
    LiveStore,
    WatchedStore,
    key_of,
    require_ours,
)
from persistence.transfer.preflight import RefusedError

if TYPE_CHECKING:
    from persistence.transfer.engine import Scan
    from persistence.transfer.live import Locked, Snapshot
    from persistence.transfer.records import Sink
    from persistence.transfer.report import Phase, Progress
    from persistence.transfer.store import StoreMove
    from persistence.transfer.sync import Round

_ITEMS_AT_ONCE = 500
_BYTES_AT_ONCE = 8_000_000


class _Job(NamedTuple):
    """An item to look at: what the target knows of it, and the source."""

    key: Key
    claim: ItemClaim | None
    stamp: ItemStamp | None


class StoreSync:
    """One run that keeps the store of a target equal to a source's; the target is locked for it."""

    def __init__(
        self, sink: Sink, run_id: str, progress: Progress, stopped: Callable[[], bool], *, vectors: bool
    ) -> None:
        self.follower = sink.store_follower(run_id)
        self._label = sink.label
        self._target = sink.store()
        self._progress = progress
        self._stopped = stopped
        self._vectors = vectors
        self._prepared = False
        self._noted = 0

    def seal(self, locked: Locked) -> None:
        """See :meth:`persistence.transfer.live.Locked.seal`."""
        locked.live_store().seal(self._label)

    def round(
        self, snapshot: Snapshot, done: Round, *, everything: bool = False, watched: bool = False
    ) -> None:
        """Make the target's store what the snapshot's is; ``done`` counts it. As with threads."""
        store = snapshot.live_store()
        done.source_items = store.count()
        is_long = everything or not self.follower.claims(None, 1)
        if watched and isinstance(store, WatchedStore):
            jobs = self._written(store)
        else:
            if everything and isinstance(store, WatchedStore):
                _, self._noted = store.noted(0)
            jobs = self._walk(store, everything=everything)
        seen = 0
        for batch in _batches(jobs):
            self._carry_out(snapshot.label, store, batch, done, everything=everything)
            seen += len(batch)
            if is_long:
                phase: Phase = "verify store" if everything else "write store"
                self._progress(phase, seen, max(seen, done.source_items), done.bytes)
            if self._stopped():
                break

    def require_complete(self, last: Round) -> None:
        """Raise where the target lacks items, or somebody else has written them; without reading contents.

        Raises:
            VerificationError: It names an item.
        """
        if (there := self.follower.count()) != last.source_items:
            raise VerificationError(
                f"{there:,} items of the store were brought to {self._label}, the source has"
                f" {last.source_items:,}"
            )
        for key in self.follower.strays():
            raise VerificationError(
                f"the item in {describe(BadItem(*key, ''))} of the store of {self._label} was written or"
                " deleted by somebody else"
            )

    def _walk(self, store: LiveStore, *, everything: bool) -> Iterator[_Job]:
        """Walk the source's stamps and the claims of the target, both sorted."""
        claims = chain.from_iterable(claim_pages(self.follower.claims, key_of))
        claim = next(claims, None)
        for stamp in store.stamps():
            key = stamp[:2]
            while claim is not None and claim[:2] < key:
                yield _Job(claim[:2], claim, None)
                claim = next(claims, None)
            known = None
            if claim is not None and claim[:2] == key:
                known, claim = claim, next(claims, None)
            if everything or known is None or known.stamp != stamp.text:
                yield _Job(key, known, stamp)
        while claim is not None:
            yield _Job(claim[:2], claim, None)
            claim = next(claims, None)

    def _written(self, store: WatchedStore) -> Iterator[_Job]:
        """The items that the watch has noted since the last round."""
        found, self._noted = store.noted(self._noted)
        keys = iter(sorted(found))
        while some := list(islice(keys, _ITEMS_AT_ONCE)):
            claims, stamps = self.follower.claims_of(some), store.stamps_of(some)
            for key in some:
                if key in claims or key in stamps:
                    yield _Job(key, claims.get(key), stamps.get(key))

    def _carry_out(
        self, source: str, store: LiveStore, batch: Sequence[_Job], done: Round, *, everything: bool
    ) -> None:
        mine = self._some(store, [job.key for job in batch if job.stamp is not None])
        theirs = self._target.held([job.key for job in batch]) if everything else None
        preflight = self._target.preflight()
        changes = [
            change
            for job in batch
            if (change := self._change(job, mine.get(job.key), theirs, preflight, done)) is not None
        ]
        if problems := preflight.problems():
            error = RefusedError(source, problems)
            error.hint = "what was moved before stays; when the cause is gone, the same command goes on"
            raise error
        if not changes:
            return
        if not self._prepared and any(change.item and change.item.vectors for change in changes):
            self._target.prepare()
            self._prepared = True
        self.follower.apply(changes)
        self._compare(source, [change for change in changes if change.writes])

    def _some(self, store: LiveStore, keys: Sequence[Key]) -> Mapping[Key, Item | BadItem]:
        found = store.some(keys)
        if self._vectors:
            return found
        return {
            key: item._replace(vectors=()) if isinstance(item, Item) else item for key, item in found.items()
        }

    def _change(
        self,
        job: _Job,
        item: Item | BadItem | None,
        theirs: Mapping[Key, Item | BadItem] | None,
        preflight: ItemPreflight,
        done: Round,
    ) -> ItemChange | None:
        """What to do about an item. It is compared with the target's, or with what is known of that."""
        if job.stamp is None or item is None:
            done.items += 1
            return ItemChange(job.key, None)
        preflight.see_item(item)
        if isinstance(item, BadItem):
            return None
        after = ItemClaim.of(job.stamp, item)
        change = ItemChange(job.key, after, item)
        if theirs is not None:
            require_ours(change, job.claim, theirs.get(job.key), self._label)
            same = theirs.get(job.key) == item
        else:
            same = job.claim is not None and job.claim.holds(item)
        if same:
            return None if after == job.claim else change._replace(item=None)
        done.mended += job.claim is not None and job.claim.stamp == job.stamp.text
        done.items += 1
        done.bytes += item.size
        return change

    def _compare(self, source: str, changes: Sequence[ItemChange]) -> None:
        """Read back what was written."""
        verdict = Verdict(source, self._label, items=len(changes))
        held = self._target.held([change.key for change in changes])
        for change in changes:
            there = held.get(change.key)
            if there != change.item and not (there is None and change.after and change.after.has_expired):
                verdict.note_item(ItemDifference(*change.key, "reads back differently"))
        verdict.require()


def look_first(move: StoreMove, found: Scan, sink: Sink, room: str) -> None:
    """Look at the whole store before anything is written.

    Raises:
        RefusedError: There are items that the target cannot hold.
        ConflictError: The target has an item of the source.
    """
    strangers = _Strangers(sink, room)
    move.join(found, sink.store().preflight(), strangers)
    strangers.look()


class _Strangers:
    """Takes the items that a scan reads, and refuses those that the target has."""

    def __init__(self, sink: Sink, room: str) -> None:
        self._sink = sink
        self._room = room
        self._keys: list[Key] = []

    def add(self, item: Item) -> None:
        """See :class:`persistence.transfer.store.ItemCopyist`."""
        self._keys.append(item[:2])
        if len(self._keys) >= _ITEMS_AT_ONCE:
            self.look()

    def end_namespace(self, digest: NamespaceDigest) -> None:
        """See :class:`persistence.transfer.store.ItemCopyist`."""

    def look(self) -> None:
        """Raise where one of the last items is there."""
        for item in self._sink.store().held(self._keys).values():
            raise ConflictError(
                f"{self._sink.label} already has an item in {describe(item)}", hint=self._room
            )
        self._keys = []


def has_items(sink: Sink, run_id: str) -> bool | None:
    """Whether the target has any of the items that a run has brought; ``None`` where it has brought none."""
    target, found = sink.store(), None
    for claims in claim_pages(sink.store_follower(run_id).claims, key_of, _ITEMS_AT_ONCE):
        if target.held(list(map(key_of, claims))):
            return True
        found = False
    return found


def _batches(jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
    """Items that are committed together."""
    batch: list[_Job] = []
    size = 0
    for job in jobs:
        batch.append(job)
        size += job.stamp.size if job.stamp is not None else 0
        if len(batch) >= _ITEMS_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
