"""Takes out of a database what one transfer inserted, and nothing else.

The ledger knows each row's key and a mark of its content. A row that has changed since, or that came later,
by another transfer too, is somebody's work and stays. If what stays needs a row that would go, it is said,
and nothing is done unless whoever asks has chosen how to treat it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

from persistence.errors import ConflictError, TransferError
from persistence.transfer.digest import describe
from persistence.transfer.inserted import Own, own, own_items, require_noted
from persistence.transfer.keys import Key, key_of, marked, values_of
from persistence.transfer.ledger import Run
from persistence.transfer.records import Checkpoint, Reject, Sink, Source, Write

Later = Literal["refuse", "keep", "remove"]

LAST = "last"
_THREADS_AT_ONCE = 100
_ITEMS_AT_ONCE = 5_000
_SHOWN = 3


@dataclass(slots=True)
class Undone:
    """What became of a transfer's rows.

    Attributes:
        run_id: The run.
        target: The database; holds no secret.
        threads: Threads in which rows were removed.
        checkpoints: Checkpoints that were removed.
        writes: Pending writes that were removed.
        values: Channel values with rows of their own that were removed.
        kept_threads: Threads that were left as they are, because later work builds on them.
        later_removed: Rows of later work that were removed with what they build on.
        changed: Rows of the run that were left, because their content is not what the run inserted.
        replaced_threads: Threads that the run had replaced; what they held before does not come back.
        items: Items of the store that were removed; one that the run had replaced does not come back.
        followed: The source that the run followed, if it did: a cut-over may have sealed it.
    """

    run_id: str
    target: str
    threads: int = 0
    checkpoints: int = 0
    writes: int = 0
    values: int = 0
    kept_threads: int = 0
    later_removed: int = 0
    changed: int = 0
    replaced_threads: int = 0
    items: int = 0
    followed: str | None = None

    def to_json(self) -> str:
        """The outcome as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(slots=True)
class _Thread:
    """What is to be done in one thread."""

    remove: set[Key]
    later: set[Key]
    """Rows that came later and build on those."""
    changed: int
    first: str = ""
    """The first of the later ones, in words."""


def find_run(sink: Sink, run_id: str) -> Run:
    """The run of this id, or of this beginning of an id; ``last`` is the newest one.

    Raises:
        TransferError: There is none, or more than one.
    """
    runs = sink.ledger().runs()
    runs = runs[:1] if run_id == LAST else [run for run in runs if run.run_id.startswith(run_id)]
    if len(runs) == 1:
        return runs[0]
    what = f"{len(runs)} runs whose ids begin with" if runs else "no run"
    raise TransferError(f"{sink.label} knows {what} {run_id!r}", hint="`persistence runs` lists them")


def undo(sink: Sink, run: Run, later: Later) -> Undone:
    """Remove what a run inserted; call it with ``sink.exclusive()`` held.

    It may be interrupted and called again.

    Raises:
        ConflictError: Later work builds on rows of the run, and ``later`` is ``refuse``.
        TransferError: The run was undone before, or its ledger says too little.
    """
    ledger = sink.ledger()
    if run.state == "undone":
        raise TransferError(f"run {run.run_id} has been undone already")
    require_noted(ledger, run)
    undone = Undone(run.run_id, sink.label)
    undone.followed = run.options["source"] if run.options.get("follow") else None
    undone.replaced_threads = sum(action == "replace" for action in ledger.actions(run.run_id).values())
    if later == "refuse":
        with sink.source() as target:
            _refuse_later(sink, run, _with_later(target, own(ledger, run)))
    ledger.advance(run.run_id, "undoing", run.totals or {})
    threads = own(ledger, run)
    while chunk := list(islice(threads, _THREADS_AT_ONCE)):
        with sink.removing() as removal:
            for mine in chunk:
                thread, found = mine.thread_id, _look(removal.source, mine)
                if found.later and later == "refuse":
                    _refuse_later(sink, run, iter([(thread, found)]))
                if found.later and later == "keep":
                    undone.kept_threads += 1
                    continue
                removal.remove(thread, found.remove | found.later)
                _count(undone, found)
    items = own_items(sink, run)
    while some := dict(islice(items, _ITEMS_AT_ONCE)):
        removed, changed = sink.store().remove(some)
        undone.items += removed
        undone.changed += changed
    ledger.advance(run.run_id, "undone", run.totals or {})
    return undone


def _with_later(target: Source, threads: Iterator[Own]) -> Iterator[tuple[str, _Thread]]:
    for mine in threads:
        if (found := _look(target, mine)).later:
            yield mine.thread_id, found


def _refuse_later(sink: Sink, run: Run, threads: Iterator[tuple[str, _Thread]]) -> None:
    shown = [f"thread {thread!r} ({found.first})" for thread, found in islice(threads, _SHOWN)]
    if shown:
        more = "" if next(threads, None) is None else ", and more"
        raise ConflictError(
            f"later work in {sink.label} builds on run {run.run_id}: {', '.join(shown)}{more}",
            hint="--later keep leaves these threads as they are, --later remove removes the later work too",
        )


def _look(target: Source, mine: Own) -> _Thread:
    """Compare what a thread holds with what the run inserted."""
    thread, inserted, before = mine
    found = _Thread({key for key in inserted if key.kind == "v"}, set(), 0)
    others: list[Checkpoint | Write] = []
    for record in target.records([thread], data=False):
        if isinstance(record, Reject):
            raise TransferError(f"{describe(record)} cannot be read: {record.reason}")
        if not isinstance(record, Checkpoint | Write):
            continue
        key, mark = marked(record)
        if inserted.get(key) == mark:
            found.remove.add(key)
        elif before.get(key) != mark:  # what was there before the run does not build on it
            found.changed += key in inserted
            others.append(record)
    _find_later(found, others)
    return found


def _find_later(found: _Thread, others: list[Checkpoint | Write]) -> None:
    """Which of the rows that stay build on rows that go, directly or through each other."""
    gone = set(found.remove)
    grew = True
    while grew:
        grew = False
        for record in others:
            key = key_of(record)
            if key not in gone and _builds_on(record, gone):
                gone.add(key)
                found.later.add(key)
                found.first = found.first or describe(record)
                grew = True


def _builds_on(record: Checkpoint | Write, gone: set[Key]) -> bool:
    if isinstance(record, Write):
        return Key("c", record.checkpoint_ns, record.checkpoint_id) in gone
    if record.parent_id is not None and Key("c", record.checkpoint_ns, record.parent_id) in gone:
        return True
    return any(key_of(value) in gone for value in values_of(record))


def _count(undone: Undone, found: _Thread) -> None:
    undone.threads += any(key.kind != "v" for key in found.remove)
    undone.checkpoints += sum(key.kind == "c" for key in found.remove)
    undone.writes += sum(key.kind == "w" for key in found.remove)
    undone.values += sum(key.kind == "v" for key in found.remove)
    undone.later_removed += len(found.later)
    undone.changed += found.changed
