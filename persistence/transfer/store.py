"""The store's part in a transfer: looked at, written in batches, compared, item by item.

It goes along with the threads in one run: the same fingerprint binds it to the source, and its batches
stand in the same ledger, under negative numbers. Items are compared and decided about one by one, because a
target in use has others in the same namespaces.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import msgspec

from persistence.errors import ConflictError, SchemaError, SourceError, TransferError
from persistence.transfer.copying import Throttle
from persistence.transfer.difference import ItemDifference, Verdict
from persistence.transfer.included import store_of
from persistence.transfer.items import (
    BadItem,
    Item,
    ItemBatch,
    ItemPreflight,
    Key,
    NamespaceDigest,
    Rule,
    StoreDigester,
    StoreSource,
    describe,
    item_line,
    joint_fingerprint,
)
from persistence.transfer.ledger import LedgerEntry, Run
from persistence.transfer.preflight import RefusedError
from persistence.transfer.report import TOLD_EVERY, Phase, StoreTotals

if TYPE_CHECKING:
    from persistence.transfer.engine import Clock, Scan
    from persistence.transfer.options import OnConflict, Options
    from persistence.transfer.records import Sink, Source

RULE = "items"
"""What a run's options call the rule for items that the target has; without it none was chosen."""
_AT_ONCE = 500
_IN_MEMORY = 4_000_000
_key = msgspec.msgpack.Decoder(tuple[str, str])


class ItemCopyist(Protocol):
    """Takes what a scan reads: an archive being written."""

    def add(self, item: Item) -> None:
        """The next item."""

    def end_namespace(self, digest: NamespaceDigest) -> None:
        """The namespace of the items before is complete."""


class StoreMove:
    """The store of one source on its way. A context manager.

    Attributes:
        totals: How much there is of it, once it was looked at.
        fingerprint: Its content.
    """

    def __init__(self, source: Source, options: Options, clock: Clock) -> None:
        """``source`` has nothing but what the options include."""
        self.totals = StoreTotals()
        self.fingerprint = ""
        self._label = source.label
        self._options = options
        self._store = source.store()
        self._clock = clock
        self._kept = _Keys()

    def __enter__(self) -> StoreMove:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.close()

    def scan(
        self, preflight: ItemPreflight, copyist: ItemCopyist | None = None, sink: Sink | None = None
    ) -> ConflictError | None:
        """Look at everything once.

        Returns:
            The first conflict with an item that the target has, where the rule is to refuse.

        Raises:
            RefusedError: There are items that the target cannot hold.
        """
        digester, found = StoreDigester(), None
        with self._clock.phase("read store"):
            for items in _some(_told(self._store, self._clock, "read store", self._store.count())):
                for item in items:
                    preflight.see_item(item)
                    if isinstance(item, Item):
                        self.totals.see(item)
                        _pass_on(digester.see(item), copyist)
                        if copyist is not None:
                            copyist.add(item)
                if sink is not None:
                    found = found or self._meet(sink, [item for item in items if isinstance(item, Item)])
            _pass_on(digester.end(), copyist)
        if problems := preflight.problems():
            raise RefusedError(self._label, problems)
        self.totals.namespaces = digester.namespaces
        self.fingerprint = digester.fingerprint()
        return found

    def join(
        self,
        found: Scan,
        preflight: ItemPreflight,
        copyist: ItemCopyist | None = None,
        sink: Sink | None = None,
    ) -> ConflictError | None:
        """As :meth:`scan`; what was found of the threads gets to know of the store.

        The fingerprint is that of both together; an empty store leaves it as it is.
        """
        conflict = self.scan(preflight, copyist, sink)
        found.store = self
        found.fingerprint = joint_fingerprint(found.fingerprint, self.fingerprint, self.totals.items)
        return conflict

    def is_there(self, sink: Sink) -> bool:
        """Whether the target has any of the items."""
        return any(sink.store().held([item[:2] for item in some]) for some in _some(self._store.items()))

    def refuse(self, conflict: ConflictError | None, sink: Sink, fingerprint: str) -> None:
        """Raise a conflict that :meth:`scan` found, unless the items may be those of an interrupted run."""
        if conflict is None:
            return
        with suppress(SchemaError):  # no ledger: nothing was ever moved into this database
            mine = (fingerprint, sink.identity)
            runs = [run for run in sink.ledger().runs() if run.state not in ("undoing", "undone")]
            if any((run.source_fingerprint, run.target_identity) == mine for run in runs):
                return
        raise conflict

    def copy(self, sink: Sink, run_id: str) -> int:
        """Write everything, or what an interrupted run left to do.

        Returns:
            How many batches were written.

        Raises:
            ConflictError: Something else wrote to the target meanwhile.
        """
        if self.totals.items == 0:
            return 0
        run = next(run for run in sink.ledger().runs() if run.run_id == run_id)
        self._decide_as(run, sink)
        committed, target, written = sink.ledger().committed(run_id), sink.store(), 0
        throttle = Throttle(self._options.max_mbps)
        if self.totals.vectors:
            target.prepare()
        with self._clock.phase("write store"):
            for batch in _batches(_told(self._store, self._clock, "write store", self.totals.items), run):
                number = batch.entry.number
                if number not in committed:
                    target.write(batch, self._rule(sink))
                    written += 1
                    throttle.wait(batch.entry.bytes)
                elif committed[number] != batch.entry.digest:
                    raise TransferError(
                        f"batch {number} of run {run_id} is not the one that was committed before",
                        hint="the run was begun by another version of this package, or with another choice of"
                        " encryption; finish it so, or undo it",
                    )
        return written

    def verify(self, target: Source, verdict: Verdict, *, subset: bool) -> None:
        """Compare each item with the target's; those that the target keeps are not compared."""
        with self._clock.phase("verify store"):
            told = _told(self._store, self._clock, "verify store", self.totals.items)
            theirs = store_of(target, self._options).items()
            compare_items(told, theirs, verdict, subset=subset, kept=iter(self._kept))

    def _decide_as(self, run: Run, sink: Sink) -> None:
        """Treat items that the target has as the run has begun to, whatever is asked for by now."""
        began: OnConflict = run.options.get(RULE, self._options.on_conflict)
        if began == self._options.on_conflict:
            return
        self._options = replace(self._options, on_conflict=began)
        self._kept.close()
        self._kept, self.totals.kept = _Keys(), 0
        for items in _some(self._store.items()):
            self._meet(sink, [item for item in items if isinstance(item, Item)])

    def _rule(self, sink: Sink) -> Rule:
        return Rule(sink.label, self._options.on_conflict, self._options.vectors)

    def _meet(self, sink: Sink, items: list[Item]) -> ConflictError | None:
        """Note which items the target keeps its own of."""
        rule, held = self._rule(sink), sink.store().held([item[:2] for item in items])
        for item in items:
            there = held.get(item[:2])
            if there is not None and not rule.same(item, there) and not rule.replaces(item, there):
                if rule.on_conflict == "error":
                    return rule.conflict(item)
                self._kept.add(item[:2])
                self.totals.kept += 1
        return None


def compare_items(
    lefts: Iterator[Item | BadItem],
    rights: Iterator[Item | BadItem],
    verdict: Verdict,
    *,
    subset: bool,
    kept: Iterator[Key],
) -> None:
    """Walk both sides' items in order, and add what differs to the verdict.

    Args:
        lefts: The one side.
        rights: The other one.
        verdict: Gets what differs.
        subset: Items that only the right side has are no difference.
        kept: Items, in order, that need not be equal.
    """
    mine, theirs, leave = next(lefts, None), next(rights, None), next(kept, None)
    while mine is not None or theirs is not None:
        key = min(item[:2] for item in (mine, theirs) if item is not None)
        one = other = None
        if mine is not None and mine[:2] == key:
            one, mine = _readable(mine, verdict.left), next(lefts, None)
        if theirs is not None and theirs[:2] == key:
            other = theirs
            theirs = next(rights, None)
        if one is None and subset:
            continue
        verdict.items += 1
        if key == leave:
            leave = next(kept, None)
        elif detail := _difference(one, other and _readable(other, verdict.right), verdict):
            verdict.note_item(ItemDifference(*key, detail))


def _difference(one: Item | None, other: Item | None, verdict: Verdict) -> str | None:
    if one is None or other is None:
        return f"missing in {verdict.left if one is None else verdict.right}"
    names = [name for name in Item._fields if getattr(one, name) != getattr(other, name)]
    return f"differs in {', '.join(names)}" if names else None


def _readable(item: Item | BadItem, label: str) -> Item:
    if isinstance(item, BadItem):
        raise SourceError(f"{describe(item)} of the store of {label} cannot be read: {item.reason}")
    return item


def _told(store: StoreSource, clock: Clock, phase: Phase, expected: int) -> Iterator[Item | BadItem]:
    """The items, while the progress is told of them."""
    done = size = 0
    for item in store.items():
        yield item
        done += 1
        size += item.size if isinstance(item, Item) else 0
        if done % TOLD_EVERY == 0:
            clock.progress(phase, done, max(done, expected), size)
    if expected or done:
        clock.progress(phase, done, done, size)


def _some(items: Iterable[Item | BadItem]) -> Iterator[list[Item | BadItem]]:
    ahead = iter(items)
    while some := list(islice(ahead, _AT_ONCE)):
        yield some


def _pass_on(digest: NamespaceDigest | None, copyist: ItemCopyist | None) -> None:
    if digest is not None and copyist is not None:
        copyist.end_namespace(digest)


def _batches(items: Iterable[Item | BadItem], run: Run) -> Iterator[ItemBatch]:
    """The same batches each time, for the limits that the run began with; numbered -1, -2 and so on."""
    max_items, max_bytes = int(run.options["batch_records"]), int(run.options["batch_bytes"])
    batch: list[Item] = []
    size = number = 0
    for item in items:
        if isinstance(item, BadItem):
            raise TransferError("the source changed while it was read")
        batch.append(item)
        size += item.size
        if len(batch) >= max_items or size >= max_bytes:
            number -= 1
            yield _batch(run.run_id, number, batch, size)
            batch, size = [], 0
    if batch:
        yield _batch(run.run_id, number - 1, batch, size)


def _batch(run_id: str, number: int, items: list[Item], size: int) -> ItemBatch:
    digest = hashlib.sha256()
    for item in items:
        digest.update(item_line(item))
    return ItemBatch(
        items,
        LedgerEntry(
            run_id=run_id,
            number=number,
            thread_id=items[0].prefix,
            digest=digest.hexdigest(),
            checkpoints=0,
            writes=0,
            values=len(items),
            bytes=size,
        ),
    )


class _Keys:
    """Keys in order, kept outside memory."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by close()

    def add(self, key: Key) -> None:
        data = msgspec.msgpack.encode(key)
        self._file.write(len(data).to_bytes(4) + data)

    def __iter__(self) -> Iterator[Key]:
        self._file.seek(0)
        while head := self._file.read(4):
            yield _key.decode(self._file.read(int.from_bytes(head)))

    def close(self) -> None:
        self._file.close()
