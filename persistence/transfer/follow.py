"""Moves a database while its application goes on writing, and switches over with a pause of seconds.

:func:`follow` copies everything and then catches up, round after round (``persistence.transfer.sync``).
What it reads of the source are stamps, which show all that savers do, but not everything that a program
could do to a row in place. So :func:`cut_over` first compares everything by content, while the application
goes on writing and a watch notes such changes. Then it takes the write lock, and what is left under it is
little: the last changes, the noted threads, and the number of rows of each thread on both sides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

from persistence import schema
from persistence.errors import ConflictError, ConnectError, SchemaError, TransferError, VerificationError
from persistence.registry import provider_for
from persistence.transfer.conflicts import decide, refuse_itself
from persistence.transfer.engine import (
    Clock,
    copy,
    existing_threads,
    make_room,
    new_run,
    refuse_half_undone,
    refuse_strangers,
    require_tables,
    scan,
    verify_copy,
)
from persistence.transfer.follow_store import has_items, look_first
from persistence.transfer.followed_parts import parts_of, require_same, run_options
from persistence.transfer.included import included
from persistence.transfer.ledger import Run
from persistence.transfer.live import CLAIMS_AT_ONCE, Stamp, claim_pages
from persistence.transfer.options import THREADS, Options, Part
from persistence.transfer.report import Phase, Progress, no_progress
from persistence.transfer.sides import Side, open_live
from persistence.transfer.spool import Spool
from persistence.transfer.store import StoreMove
from persistence.transfer.sync import Round, Sync
from persistence.transfer.workers import Crew

if TYPE_CHECKING:
    from persistence.contract import Provider
    from persistence.dsn import Dsn
    from persistence.settings import Settings
    from persistence.transfer.live import LiveSource
    from persistence.transfer.records import Sink

INTERVAL = 5.0
"""Seconds between two rounds."""
_CLOSE = 1.0
"""A round of so many seconds is short enough to be repeated under the lock."""
_ROUNDS = 10

Told = Callable[[Round], None]
"""Called at the end of each round."""


@dataclass(frozen=True, slots=True)
class Followed:
    """How a source was followed.

    Attributes:
        source: What was read; holds no secret.
        target: What was written; holds no secret.
        run_id: The run in the target's ledger.
        last: The last round: so far the target lags behind.
        seconds: Duration in all.
    """

    source: str
    target: str
    run_id: str
    last: Round
    seconds: float


@dataclass(frozen=True, slots=True)
class CutOver:
    """The outcome of a cut-over: both sides hold the same.

    Attributes:
        source: What was read; holds no secret.
        target: What was written; holds no secret.
        run_id: The run in the target's ledger.
        pause_seconds: For so long nobody could write to the source; ``None`` where it was done before.
        last: What was left to do in the pause.
        mended: Threads and items that had been changed without showing it, and were found by their content.
        sealed: Whether the source refuses writes now.
        already_done: The run had been cut over before; nothing was written.
        seconds: Duration in all.
    """

    source: str
    target: str
    run_id: str
    pause_seconds: float | None
    last: Round | None
    mended: int
    sealed: bool
    already_done: bool
    seconds: float


def follow(
    source: Side,
    target: str | Dsn,
    *,
    settings: Settings | None = None,
    interval: float = INTERVAL,
    include: Collection[Part] | None = None,
    vectors: bool = True,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    told: Told | None = None,
) -> Followed:
    """Move the threads of ``source`` into ``target``, and keep up with what is written to the source.

    The source is only read. The same call goes on where an interrupted one stopped.

    Args:
        source: A DSN, of SQLite or Postgres, or the path of a SQLite file.
        target: A DSN.
        settings: Defaults to the settings from the environment.
        interval: Seconds between two rounds of catching up.
        include: What is followed: all threads (``checkpoints``), the items of the store, or both. By default
            what the run that goes on follows, and a new one the threads.
        vectors: Whether the items of a new run bring the embeddings of their fields.
        stop: Ends it, when it is set, after what is being committed; without it, only an exception does.
        progress: Told how far the first copy has come.
        told: Told of each round.

    Raises:
        UnsupportedError: The source cannot be followed.
        RefusedError: The target cannot hold something; what was moved before stays.
        ConflictError: The target has threads or items of the source already, another transfer is under way,
            or the run follows something else.
        VerificationError: What was written reads back differently.
    """
    halt = stop or threading.Event()
    with _opened(source, target, settings, progress, halt, include, vectors) as job:
        if job.run.state == "finished":
            raise ConflictError(
                f"{job.live.label} was cut over to {job.sink.label} already",
                hint=f"to move it once more, `persistence undo {job.run.run_id}`, delete these threads from"
                " the target, or use another database, schema or file",
            )
        seen = None
        last = Round(0)
        while True:
            if (version := job.live.version()) != seen:
                with job.live.snapshot() as snapshot:
                    last = job.sync.round(snapshot)
                seen = version
                if told is not None:
                    told(last)
            if halt.wait(interval):
                return Followed(job.live.label, job.sink.label, job.run.run_id, last, job.clock.seconds())


def cut_over(
    source: Side,
    target: str | Dsn,
    *,
    settings: Settings | None = None,
    include: Collection[Part] | None = None,
    vectors: bool = True,
    seal: bool = True,
    progress: Progress | None = None,
    told: Told | None = None,
) -> CutOver:
    """Make ``target`` equal to ``source``, with the source locked for the last of it, and seal the source.

    Everything is compared by content. Nothing is lost if it fails: the source is as it was, and goes on being
    written to.

    Args:
        source: A DSN, of SQLite or Postgres, or the path of a SQLite file.
        target: A DSN. What :func:`follow` has moved there is not moved again.
        settings: Defaults to the settings from the environment.
        include: As in :func:`follow`; a run that goes on knows.
        vectors: As in :func:`follow`.
        seal: Make the source refuse writes to what was followed, so that no process goes on in it.
        progress: Told how far the first copy and the comparison have come.
        told: Told of each round before the pause.

    Raises:
        As :func:`follow`, and ConnectError: The lock was not to be had.
    """
    never = threading.Event()
    with _opened(source, target, settings, progress, never, include, vectors, sealing=seal) as job:
        if job.run.state == "finished":
            return job.cut_over(None, None, 0, already_done=True)
        if job.sync.threads:
            job.live.watch()
        try:
            if job.sync.store is not None:
                job.live.watch_store()
            shape, noted, mended = job.get_close(told)
            with job.live.locked() as locked:
                if locked.shape() != shape:
                    raise TransferError(
                        f"the tables of {job.live.label} were changed during the cut-over",
                        hint="it was not cut over, and its application goes on; run the command again",
                    )
                last = job.sync.round(locked, locked.noted(noted)[0], watched=True)
                if wrong := job.sync.follower.miscounted():
                    raise VerificationError(
                        f"{job.sink.label} does not have as many rows as the source in thread {wrong[0]!r}"
                    )
                if job.sync.store is not None:
                    job.sync.store.require_complete(last)
                locked.unwatch()
                if seal and job.sync.threads:
                    locked.seal(job.sink.label)
                if seal and job.sync.store is not None:
                    job.sync.store.seal(locked)
            pause = time.monotonic() - locked.began
        except BaseException:
            with suppress(ConnectError):  # its notes are forgotten by the next one
                job.live.unwatch()
            raise
        totals = {
            "threads": last.source_threads,
            "checkpoints": last.source_checkpoints,
            "writes": last.source_writes,
            "verified": True,
        }
        if job.sync.store is not None:
            totals["items"] = last.source_items
        job.sink.ledger().advance(job.run.run_id, "finished", totals)
        return job.cut_over(pause, last, mended + last.mended, already_done=False)


def unseal(source: Side, *, settings: Settings | None = None) -> bool:
    """Let a source that was cut over be written again.

    Returns:
        Whether it was sealed.
    """
    with open_live(source, settings) as live:
        return live.unseal()


@dataclass(slots=True)
class _Job:
    """A source and a target that is locked for it."""

    live: LiveSource
    sink: Sink
    run: Run
    sync: Sync
    clock: Clock

    def get_close(self, told: Told | None) -> tuple[int, int, int]:
        """Compare everything, then catch up until there is little left.

        Returns:
            What tells that the file was rebuilt since, the last note of the watch, and how many threads
            were mended.
        """
        shape, noted, mended = -1, 0, 0
        for _ in range(_ROUNDS):
            with self.live.snapshot() as snapshot:
                everything = snapshot.shape() != shape
                shape = snapshot.shape()
                suspects, noted = snapshot.noted(noted)
                done = self.sync.round(snapshot, suspects, everything=everything, watched=not everything)
            mended += done.mended
            if told is not None:
                told(done)
            if not everything and done.seconds < _CLOSE:
                break
        return shape, noted, mended

    def cut_over(
        self, pause: float | None, last: Round | None, mended: int, *, already_done: bool
    ) -> CutOver:
        return CutOver(
            source=self.live.label,
            target=self.sink.label,
            run_id=self.run.run_id,
            pause_seconds=pause,
            last=last,
            mended=mended,
            sealed=self.live.sealed(),
            already_done=already_done,
            seconds=self.clock.seconds(),
        )


@contextmanager
def _opened(
    source: Side,
    target: str | Dsn,
    settings: Settings | None,
    progress: Progress | None,
    halt: threading.Event,
    include: Collection[Part] | None,
    vectors: bool,
    sealing: bool | None = None,
) -> Iterator[_Job]:
    """What both commands begin with; ``sealing`` is for a cut-over, and says whether it will seal."""
    show = progress or no_progress

    def tell(phase: Phase, done: int, total: int, unit_bytes: int) -> None:
        if halt.is_set() and phase not in ("verify", "verify store", "write store"):
            raise KeyboardInterrupt  # during the first copy, which the next call goes on with
        show(phase, done, total, unit_bytes)

    clock = Clock(tell)
    provider = provider_for(target, settings)
    with open_live(source, settings) as live, provider.sink() as sink:
        known = _run_of(live, sink)
        parts = Options(include=THREADS if include is None else include, vectors=vectors)
        if sealing is not None:
            live.require((parts if known is None else parts_of(known)).include, sealing=sealing)
        if known is None:
            _copy_first(live, sink, provider, clock, parts)
        with sink.exclusive():
            if (run := _run_of(live, sink)) is None:
                raise TransferError(f"the run into {sink.label} was undone meanwhile")
            require_same(run, include, vectors=vectors, target=sink.label)
            sync = Sync(sink, provider, run.run_id, tell, halt.is_set, parts_of(run))
            yield _Job(live, sink, run, sync, clock)


def _copy_first(live: LiveSource, sink: Sink, provider: Provider, clock: Clock, parts: Options) -> None:
    """Copy one snapshot and compare it. After an interruption the next round compares and completes it.

    The store is looked at here, and copied by the first round.
    """
    has_store = "store" in parts.include
    workers = provider.settings.transfer_workers
    with live.snapshot() as snapshot, Spool() as spool, Crew(workers) as crew:
        refuse_itself(snapshot, sink)
        source = included(snapshot, parts)
        require_tables(snapshot, sink, provider)
        found = scan(source, spool, clock, sink.preflight(), crew=crew)
        refuse_strangers(source, sink, spool)
        if has_store:
            with StoreMove(source, parts, clock) as move:
                look_first(move, found, sink, make_room(sink))
        schema.setup(provider)
        with sink.exclusive():
            if _run_of(live, sink) is not None:
                return
            decide(source, sink, existing_threads(sink, spool), "error", make_room(sink))
            run = new_run(live.label, sink, found, follow=live.name, **run_options(parts))
            sink.ledger().begin(run, {})
            follower = sink.follower(run.run_id)
            for chunk in spool.chunks(CLAIMS_AT_ONCE):
                follower.claim([Stamp(thread.thread_id, "", 0, 0) for thread in chunk])
            copy(source, sink, found, spool, clock, Options(), crew=crew)
            with provider.source() as target:
                expected = found.totals.checkpoints
                verify_copy(source, target, spool, clock, expected, crew=crew).require()
            stamps = snapshot.stamps() if "checkpoints" in parts.include else iter(())
            while chunk_of_stamps := list(islice(stamps, CLAIMS_AT_ONCE)):
                follower.claim(chunk_of_stamps)


def _run_of(live: LiveSource, sink: Sink) -> Run | None:
    """The run that follows this source; one that was undone, by hand too, does not count."""
    with suppress(SchemaError):  # no ledger: nothing was ever moved into this database
        runs = [run for run in sink.ledger().runs() if run.target_identity == sink.identity]
        refuse_half_undone(runs, sink)
        for run in runs:
            if run.state != "undone" and run.options.get("follow") == live.name:
                return run if _has_something(sink, run) else None
    return None


def _has_something(sink: Sink, run: Run) -> bool:
    """Whether the target has any of what the run has brought, or it has brought nothing yet."""
    items = has_items(sink, run.run_id) if "store" in parts_of(run).include else None
    threads = _has_threads(sink, run)
    return bool(items or threads) or (items is None and threads is None)


def _has_threads(sink: Sink, run: Run) -> bool | None:
    """As :func:`persistence.transfer.follow_store.has_items`."""
    found = None
    for claims in claim_pages(sink.follower(run.run_id).claims, attrgetter("thread_id")):
        if sink.existing([claim.thread_id for claim in claims]):
            return True
        found = False
    return found
