"""Brings the threads of a target up to one state of a source that goes on changing.

A thread whose stamp is another one is written: what was added to it, or all of it where anything else has
happened. Every row that is written is read back and compared by content. A batch of threads and their stamps
commit together, so whatever instant the process dies at, the next round goes on from what is there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from persistence.errors import ConflictError
from persistence.transfer.difference import Verdict
from persistence.transfer.digest import Digester, ThreadDigest, digests, line
from persistence.transfer.follow_store import StoreSync
from persistence.transfer.live import Change, Place, Snapshot, Stamp, claim_pages
from persistence.transfer.preflight import RefusedError
from persistence.transfer.records import Checkpoint, Record, Reject, Sink, Source, Write
from persistence.transfer.report import content_bytes
from persistence.transfer.verify import compare

if TYPE_CHECKING:
    from collections.abc import Callable

    from persistence.contract import Provider
    from persistence.transfer.options import Options
    from persistence.transfer.report import Progress

_ROWS_AT_ONCE = 5_000
_THREADS_AT_ONCE = 500


@dataclass(slots=True)
class Round:
    """One time of catching up.

    Attributes:
        number: Which one it was.
        threads: Threads that were written or deleted.
        rows: Checkpoints and pending writes in them that were written or deleted.
        items: Items of the store that were written or deleted.
        bytes: Content that was written.
        seconds: From the state of the source that was read to its end: so far the target lags behind.
        mended: Threads and items that looked unchanged and were not.
        source_threads: How many threads the source has.
        source_checkpoints: How many checkpoints.
        source_writes: How many pending writes.
        source_items: How many items its store has, if that is followed.
        items_left_out: How many, if it is not; counted by the first round.
    """

    number: int
    threads: int = 0
    rows: int = 0
    items: int = 0
    bytes: int = 0
    seconds: float = 0.0
    mended: int = 0
    source_threads: int = 0
    source_checkpoints: int = 0
    source_writes: int = 0
    source_items: int = 0
    items_left_out: int = 0


class _Job(NamedTuple):
    """A change, and whether only a comparison by content can tell that it is needed."""

    change: Change
    check: bool


@dataclass(slots=True)
class _Expected:
    """What must be in the target after a batch."""

    whole: list[ThreadDigest] = field(default_factory=list)
    lines: dict[tuple[object, ...], bytes] = field(default_factory=dict)
    """The digest of each row that is added, by its key."""


class Sync:
    """One run that keeps a target equal to a source; the target is locked for it."""

    def __init__(
        self,
        sink: Sink,
        target: Provider,
        run_id: str,
        progress: Progress,
        stopped: Callable[[], bool],
        parts: Options,
    ) -> None:
        self.follower = sink.follower(run_id)
        self.threads = "checkpoints" in parts.include
        self.store = (
            StoreSync(sink, run_id, progress, stopped, vectors=parts.vectors)
            if "store" in parts.include
            else None
        )
        self._sink = sink
        self._target = target
        self._progress = progress
        self._stopped = stopped
        self._rounds = 0
        self._items_left_out: int | None = None

    def round(
        self,
        snapshot: Snapshot,
        suspects: Collection[str] = (),
        *,
        everything: bool = False,
        watched: bool = False,
    ) -> Round:
        """Make the target what the snapshot is.

        Args:
            snapshot: The state of the source.
            suspects: Threads that are compared by content even if their stamps are equal.
            everything: All threads are.
            watched: Since the last round a watch has noted each row that was not just inserted, and the
                suspects are its notes: it is enough to look at the keys.

        Raises:
            RefusedError: The target cannot hold something; what was moved before stays.
            ConflictError: Somebody else has written to these threads in the target.
            VerificationError: What was written reads back differently.
        """
        began = time.monotonic()
        self._rounds += 1
        done = Round(self._rounds)
        expected = snapshot.count() if everything and self.threads else 0
        jobs = self._jobs(snapshot, suspects, done, everything=everything, watched=watched)
        for batch in _batches(jobs if self.threads else ()):
            self._carry_out(snapshot, self._needed(snapshot, batch, done), done)
            if everything:
                self._progress("verify", done.source_checkpoints, expected, done.bytes)
            if self._stopped():
                break
        if self.store is None:
            if self._items_left_out is None:
                self._items_left_out = snapshot.store().count()
            done.items_left_out = self._items_left_out
        elif not self._stopped():
            self.store.round(snapshot, done, everything=everything, watched=watched)
        done.seconds = time.monotonic() - began
        return done

    def _jobs(
        self, snapshot: Snapshot, suspects: Collection[str], done: Round, *, everything: bool, watched: bool
    ) -> Iterator[_Job]:
        """Walk the source's stamps and those in the target, both sorted by thread."""
        claims = chain.from_iterable(claim_pages(self.follower.claims, attrgetter("thread_id")))
        claim = next(claims, None)
        for stamp in snapshot.keys() if watched else snapshot.stamps():
            done.source_threads += 1
            done.source_checkpoints += stamp.checkpoints
            done.source_writes += stamp.writes
            while claim is not None and claim.thread_id < stamp.thread_id:
                yield _drop(claim)
                claim = next(claims, None)
            known = None
            if claim is not None and claim.thread_id == stamp.thread_id:
                known, claim = claim, next(claims, None)
            suspect = everything or stamp.thread_id in suspects
            same = known is not None and (known.keys == stamp.keys if watched else known == stamp)
            if suspect or not same:
                now = snapshot.stamp(stamp.thread_id) if watched else stamp
                yield _job(snapshot, known, now, suspect=suspect)
        while claim is not None:
            yield _drop(claim)
            claim = next(claims, None)

    def _needed(self, snapshot: Snapshot, batch: Sequence[_Job], done: Round) -> list[Change]:
        """The changes, without the rows of threads that turn out to be equal."""
        if threads := [job.change.thread_id for job in batch if job.check]:
            with self._target.source() as target:
                mine = _sums(snapshot, threads)
                equal = {
                    thread for thread, digest in _sums(target, threads).items() if mine[thread] == digest
                }
        else:
            equal = set()
        changes = []
        for change, check in batch:
            if change.thread_id in equal:
                if change.before != change.after:
                    changes.append(change._replace(kind="keep", records=_nothing))
                continue
            done.mended += check and change.before == change.after
            changes.append(change)
        return changes

    def _carry_out(self, snapshot: Snapshot, changes: Sequence[Change], done: Round) -> None:
        if not changes:
            return
        expected = self._look(snapshot, changes, done)
        try:
            self.follower.apply(changes)
        except ConflictError:
            # A row or value that is added is there already: only all of the thread's rows tell what is right.
            if (again := _wholly(snapshot, changes)) == changes:
                raise
            self._carry_out(snapshot, again, done)
            return
        self._compare_whole(snapshot, expected.whole)
        if wrong := self._wrong(expected.lines):
            # Such as another value under the version of one that is there.
            moved = [change._replace(before=change.after) for change in changes if change.thread_id in wrong]
            self._carry_out(snapshot, _wholly(snapshot, moved), done)

    def _look(self, snapshot: Snapshot, changes: Sequence[Change], done: Round) -> _Expected:
        """Read everything once: what the target cannot hold is found, and what it must hold is known."""
        preflight = self._sink.preflight()
        expected = _Expected()
        for change in changes:
            digester = Digester()
            done.threads += change.kind != "keep"
            if change.kind == "drop" and change.before is not None:
                done.rows += change.before.checkpoints + change.before.writes
            for record in change.records():
                preflight.see(record)
                if isinstance(record, Reject):
                    continue
                done.bytes += content_bytes(record)
                if isinstance(record, Checkpoint | Write):
                    done.rows += 1
                    if change.kind == "add":
                        expected.lines[_key(record)] = hashlib.sha256(line(record)).digest()
                digester.see(record)
            if change.kind == "replace" and (whole := digester.end()) is not None:
                expected.whole.append(whole)
        if problems := preflight.problems():
            error = RefusedError(snapshot.label, problems)
            error.hint = "what was moved before stays; when the cause is gone, the same command goes on"
            raise error
        return expected

    def _compare_whole(self, snapshot: Snapshot, expected: Sequence[ThreadDigest]) -> None:
        if not expected:
            return
        with self._target.source() as target:
            verdict = Verdict(snapshot.label, target.label)
            threads = [thread.thread_id for thread in expected]
            compare(snapshot, target, expected, digests(target.records(threads, data=False)), verdict)
        verdict.require()

    def _wrong(self, lines: Mapping[tuple[object, ...], bytes]) -> set[str]:
        """The threads of which an added row reads back differently, or not at all."""
        checkpoints = {_place(key) for key in lines if key[0] == "c"}
        writes = {_place(key) for key in lines if key[0] == "w"}
        if not lines:
            return set()
        found = {
            _key(record): hashlib.sha256(line(record)).digest()
            for record in self.follower.held(checkpoints, writes)
        }
        return {str(key[1]) for key, digest in lines.items() if found.get(key) != digest}


def _job(snapshot: Snapshot, known: Stamp | None, stamp: Stamp, *, suspect: bool) -> _Job:
    thread = stamp.thread_id
    whole = Change(thread, "replace", known, stamp, lambda: snapshot.records([thread]))
    if known is None:
        return _Job(whole, check=False)
    if suspect or not known.text:
        return _Job(whole, check=True)
    checkpoints, writes = snapshot.kept(known)
    if not checkpoints:
        return _Job(whole, check=False)
    added = whole._replace(
        kind="add", records=lambda: snapshot.since(known, all_writes=not writes), rewrite=not writes
    )
    return _Job(added, check=False)


def _drop(claim: Stamp) -> _Job:
    return _Job(Change(claim.thread_id, "drop", claim, None, _nothing), check=False)


def _wholly(snapshot: Snapshot, changes: Sequence[Change]) -> list[Change]:
    """The same changes, but threads that were to be added to are replaced."""

    def whole(change: Change) -> Change:
        thread = change.thread_id
        return change._replace(kind="replace", rewrite=False, records=lambda: snapshot.records([thread]))

    return [whole(change) if change.kind == "add" else change for change in changes]


def _batches(jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
    """Threads that are committed together: a few, or a single large one."""
    batch: list[_Job] = []
    rows = 0
    for job in jobs:
        batch.append(job)
        for stamp in (job.change.before, job.change.after):
            rows += stamp.checkpoints + stamp.writes if stamp is not None and job.change.kind != "add" else 0
        if rows >= _ROWS_AT_ONCE or len(batch) >= _THREADS_AT_ONCE:
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch


def _sums(source: Source, threads: Sequence[str]) -> dict[str, bytes]:
    return {thread.thread_id: thread.sha256 for thread in digests(source.records(threads, data=False))}


def _nothing() -> Iterator[Record]:
    return iter(())


def _key(record: Checkpoint | Write) -> tuple[object, ...]:
    if isinstance(record, Checkpoint):
        return ("c", *record[:3])
    return ("w", *record[:5])


def _place(key: tuple[object, ...]) -> Place:
    return str(key[1]), str(key[2]), str(key[3])
