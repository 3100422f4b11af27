"""Moves the content of a source into a sink: look at everything, write in batches, compare.

Nothing is committed before the whole source was read once: the first reading finds what the target cannot
hold and gives the fingerprint that the ledger is bound to. What it kept, and what is read again, is cut
into the same batches every time, so a run that was killed goes on at the first batch that the
ledger does not have.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from persistence import metrics, schema
from persistence.errors import ConflictError, SchemaError, TransferError
from persistence.transfer.ahead import Ahead, Early, offered
from persistence.transfer.collecting import rarely_collected
from persistence.transfer.conflicts import decide, merged
from persistence.transfer.copying import Limits, Moving, Task, Writer, of_segments, segments
from persistence.transfer.difference import Difference, Verdict
from persistence.transfer.digest import Fingerprint, describe
from persistence.transfer.inserted import later_than
from persistence.transfer.ledger import Action, Ledger, Run, SetAside
from persistence.transfer.options import Options
from persistence.transfer.preflight import RefusedError
from persistence.transfer.reading import Copyist, Pieces, digest_by, divided, read, read_by
from persistence.transfer.recording import Recording, recorder
from persistence.transfer.records import (
    Preflight,
    Problem,
    Sink,
    Source,
)
from persistence.transfer.report import Counts, Phase, Progress, Totals, counted
from persistence.transfer.selection import without
from persistence.transfer.spool import Spool
from persistence.transfer.store import RULE
from persistence.transfer.survey import Finding, Sizes, Survey
from persistence.transfer.verify import compare
from persistence.transfer.workers import ALONE, Crew, itself, shared, shared_sink

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from persistence.contract import Provider
    from persistence.transfer.store import StoreMove

BATCH_RECORDS = 5_000
BATCH_BYTES = 8_000_000
SEGMENT_BATCHES = 1
"""Full batches of a segment: as few as can be, so that workers end at about the same time."""
NOTHING = Early()
_THREADS_AT_ONCE = 5_000
_SHOWN = 20


@dataclass(slots=True)
class Clock:
    """Seconds by phase, and the progress that is shown meanwhile."""

    progress: Progress
    phases: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a phase; one that is entered twice adds up."""
        began = time.monotonic()
        try:
            with rarely_collected():
                yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - began

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class Meter(Counts):
    """Tells the progress; the metrics show it too."""

    backend = "transfer"

    def __init__(self, clock: Clock, phase: Phase, expected: int) -> None:
        super().__init__()
        self._tell = clock.progress
        self._phase = phase
        self._expected = expected
        metrics.observe(self)
        self._tell(phase, 0, expected, 0)

    def gauges(self) -> dict[str, float]:
        """How far this phase has come."""
        name = f"transfer_{self._phase}"
        return {
            f"{name}_checkpoints": self.totals.checkpoints,
            f"{name}_checkpoints_expected": self._expected,
            f"{name}_bytes": self.totals.bytes,
        }

    def add(self, some: Totals) -> None:
        """Count what a worker has moved."""
        self.totals.add(some)
        self.tell()

    def tell(self) -> None:
        """Say how far it has come."""
        done = self.totals.checkpoints
        self._tell(self._phase, done, max(done, self._expected), self.totals.bytes)


@dataclass(slots=True)
class Scan:
    """What the first reading of a source found."""

    fingerprint: str
    totals: Totals
    problems: list[Problem]
    """What the target cannot hold."""
    findings: list[Finding]
    """What else is worth knowing."""
    sizes: Sizes
    store: StoreMove | None = None
    """The store that moves along."""


def scan(
    source: Source,
    spool: Spool,
    clock: Clock,
    preflight: Preflight,
    copyist: Copyist | None = None,
    crew: Crew = ALONE,
    recording: Recording | None = None,
    ahead: Ahead | None = None,
) -> Scan:
    """Read everything once: each thread's digest goes into ``spool``.

    Raises:
        RefusedError: There are rows that the target cannot hold.
    """
    found = look(source, spool, clock, preflight, copyist, crew, recording, ahead)
    if found.problems:
        raise RefusedError(source.label, found.problems)
    return found


def look(
    source: Source,
    spool: Spool,
    clock: Clock,
    preflight: Preflight,
    copyist: Copyist | None = None,
    crew: Crew = ALONE,
    recording: Recording | None = None,
    ahead: Ahead | None = None,
) -> Scan:
    """As :func:`scan`, but what the target cannot hold is in the result."""
    with clock.phase("read"):
        meter = Meter(clock, "read", source.count())
        fingerprint, survey = Fingerprint(), Survey()
        if copyist is None and crew.count > 1 and (opens := divided(source)) is not None:
            seen = read_by(crew, source, opens, preflight, survey, meter.add, recording)
            entries = offered(seen, recording, ahead)
        else:
            copyist = copyist or recorder(recording, preflight, ahead)
            entries = read(source, None, meter, preflight, survey, copyist)
        for entry in entries:
            spool.add(entry)
            fingerprint.see(entry.thread)
            if ahead is not None:
                ahead.ended(entry)
        meter.tell()
    meter.totals.threads = spool.count
    return Scan(
        fingerprint.hexdigest(), meter.totals, preflight.problems(), survey.findings(), survey.sizes()
    )


@dataclass(slots=True)
class Copied:
    """What became of a run's batches."""

    run_id: str
    actions: Mapping[str, Action] = field(default_factory=dict)
    """What is done about threads that were in the target before."""
    rejects: Sequence[SetAside] = ()
    """What was set aside, without its content."""
    written: int = 0
    skipped: int = 0
    already_done: bool = False
    verified: bool = False
    totals: Totals | None = None
    """What this run and those before it brought, where that is less than the source has."""

    def having(self, action: Action) -> list[str]:
        """The threads that this is done about, sorted."""
        return sorted(thread for thread, chosen in self.actions.items() if chosen == action)

    def moved(self, source: Source) -> Source:
        """What the run brings of a source."""
        return without(source, self.having("skip"))


def copy(
    source: Source,
    sink: Sink,
    found: Scan,
    spool: Spool,
    clock: Clock,
    options: Options,
    rejects: Iterable[SetAside] = (),
    crew: Crew = ALONE,
    recording: Recording | None = None,
    early: Early = NOTHING,
) -> Copied:
    """Write everything, or what an interrupted run left to do.

    Call it, and :func:`finish`, with ``sink.exclusive()`` held. A new run notes ``rejects`` in the ledger.

    Raises:
        ConflictError: The target has threads of this name, or rows with another content; nothing was written.
    """
    ledger = sink.ledger()
    run = _run_for(source, sink, ledger, found, spool, options, rejects)
    copied = Copied(run.run_id, ledger.actions(run.run_id), ledger.rejects(run.run_id))
    if run.state == "finished":
        copied.already_done = True
        copied.verified = bool((run.totals or {}).get("verified"))
        return copied
    committed = ledger.committed(run.run_id)
    copied.skipped, copied.written = len(committed) - early.batches, early.batches
    if run.state == "copied":
        return copied
    with clock.phase("write"):
        meter = Meter(clock, "write", found.totals.checkpoints)
        meter.add(early.totals)
        task = Task(run.run_id, Limits.of(run), copied.actions, committed, options.max_mbps)
        if not early.is_all:
            copied.written += _write(source, sink, task, copied, spool, meter, crew, recording, early)
        if copied.having("skip"):
            copied.totals = meter.totals
            copied.totals.threads = found.totals.threads - len(copied.having("skip"))
        ledger.advance(run.run_id, "copied", asdict(found.totals) | {"verified": False})
    return copied


def _write(
    source: Source,
    sink: Sink,
    task: Task,
    copied: Copied,
    spool: Spool,
    meter: Meter,
    crew: Crew,
    recording: Recording | None,
    early: Early,
) -> int:
    """Write what is not committed; gives the number of batches."""
    cut = (one for one in segments(spool, task.limits) if one.first_batch not in early.segments)
    opens, opens_sink = (shared(source), shared_sink(sink)) if crew.count > 1 else (None, None)
    if opens is not None and opens_sink is not None and (crew.asked or source.divisible):
        task = replace(task, max_mbps=task.max_mbps and task.max_mbps / crew.count)
        here = Moving(itself(source), itself(sink), task, recording, crew.attend)
        elsewhere = Moving(opens, opens_sink, task, recording)
        return sum(done.result for done in crew.each(here, elsewhere, cut, meter.add))
    if crew.count > 1 and crew.asked:
        alone = source if opens is None else sink
        logger.warning("%s can be used by one process at a time: there is one worker", alone.label)
    if recording is not None:
        here = Moving(itself(source), itself(sink), task, recording)
        return sum(done.result for done in ALONE.each(here, None, cut, meter.add))
    placed = sink.placed(counted(copied.moved(source).records(), meter))
    with closing(placed) as records, Writer(sink, task) as writer:
        for segment, some in of_segments(records, segments(spool, task.limits)):
            if segment.first_batch in early.segments:
                continue
            for batch in writer.batches(writer.parts(some), segment):
                writer.add(batch)
                meter.tell()
    return writer.written


def finish(sink: Sink, copied: Copied, totals: Totals) -> None:
    """Note in the ledger that the run is complete, and whether it was verified."""
    record = asdict(totals) | {"verified": copied.verified}
    sink.ledger().advance(copied.run_id, "finished", record)


def verify_copy(
    source: Source,
    target: Source,
    spool: Spool,
    clock: Clock,
    expected: int,
    apart: Collection[str] = (),
    crew: Crew = ALONE,
) -> Verdict:
    """Compare the source's threads, those of ``spool``, with the target's rows; leave out those ``apart``."""
    verdict = Verdict(source.label, target.label)
    with clock.phase("verify"):
        meter = Meter(clock, "verify", expected)
        compared = (entry.thread for entry in spool.entries() if entry.thread.thread_id not in apart)
        for threads, (theirs,) in digest_by(crew, [target], Pieces(compared, target), meter.add):
            compare(source, target, threads, theirs, verdict)
        meter.tell()
    return verdict


def verify_merged(source: Source, sink: Sink, threads: Sequence[str], verdict: Verdict) -> None:
    """Look for the source's rows in threads that have others, too."""
    verdict.threads += len(threads)
    differing: set[str] = set()
    for record, _ in merged(source, sink, threads):
        differing.add(record.thread_id)
        if len(verdict.differences) < _SHOWN:
            verdict.differences.append(Difference(record.thread_id, f"{describe(record)} was not merged"))
    verdict.differing_threads += len(differing)


def refuse_strangers(source: Source, sink: Sink, spool: Spool) -> None:
    """Find threads that no transfer brought, before as much as a table is made.

    Raises:
        ConflictError: The target has threads of this name.
    """
    with suppress(SchemaError):  # no ledger: nothing was ever moved into this database
        if sink.ledger().runs():
            return  # threads may be those of an interrupted run
    with suppress(SchemaError):  # no tables, so no threads
        decide(source, sink, existing_threads(sink, spool), "error", make_room(sink))


def require_tables(source: Source, sink: Sink, provider: Provider) -> None:
    """Raise where setup would wait for the source's snapshot: it makes indexes concurrently.

    Raises:
        TransferError: Both are in one database, and tables are missing.
    """
    inside = source.database is not None and sink.identity.startswith(f"{source.database}/")
    if inside and schema.check(provider):
        raise TransferError(
            f"{provider.dsn} is in the database that is read, and its tables are not complete",
            hint=f"run `{schema.SETUP}` for it first; that cannot be done while its database is read",
        )


def make_room(sink: Sink) -> str:
    """What to do about threads that are there, beside what options offer."""
    return f"move into {sink.fresh}, or delete the threads from the target"


def choose_run(
    source: Source, sink: Sink, ledger: Ledger, found: Scan, spool: Spool, options: Options
) -> tuple[Run | None, dict[str, Action]]:
    """The run to continue, or what a new one does about threads that are there; changes nothing.

    A run that was undone, by hand too, does not count.

    Raises:
        ConflictError: There are such threads, and nothing was said about them.
    """
    runs = [run for run in ledger.runs() if run.target_identity == sink.identity and run.state != "undone"]
    refuse_half_undone(runs, sink)
    same = next((run for run in runs if run.source_fingerprint == found.fingerprint), None)
    if same is not None and _is_replaced(same, ledger, spool):
        same = None
    # Whoever asks to replace or merge means what the threads have become since.
    again = same is not None and same.state == "finished" and options.on_conflict != "error"
    if same is not None and not again and not _is_undone(same, sink, ledger, spool, found.store):
        return same, {}
    room = make_room(sink)
    unfinished = [run for run in runs if run.state == "running"]
    if unfinished and unfinished[0].options.get("source") == source.label:
        room = (
            f"run {unfinished[0].run_id} from this source was interrupted, and the source has changed since;"
            f" undo it with `persistence undo`, or {room}"
        )
    return None, decide(source, sink, existing_threads(sink, spool), options.on_conflict, room)


def _is_replaced(run: Run, ledger: Ledger, spool: Spool) -> bool:
    """Whether a later run has put other threads in the place of some that a finished one brought."""
    if run.state != "finished":
        return False
    later = [ledger.actions(one.run_id) for one in later_than(ledger, run)]
    replaced = {thread for actions in later for thread, action in actions.items() if action == "replace"}
    return bool(replaced) and any(entry.thread.thread_id in replaced for entry in spool.entries())


def refuse_half_undone(runs: Iterable[Run], sink: Sink) -> None:
    """Raise where a run is being undone.

    Raises:
        ConflictError: Somebody has begun that, and not finished.
    """
    if half := next((run for run in runs if run.state == "undoing"), None):
        raise ConflictError(
            f"run {half.run_id} into {sink.label} is half undone",
            hint=f"finish that first: persistence undo {half.run_id}",
        )


def refuse_followed(sink: Sink, found: Scan, spool: Spool) -> None:
    """Raise where a run that follows its source has brought these threads.

    If it were continued and finished as any other, a cut-over would find nothing to do.

    Raises:
        ConflictError: Only a cut-over completes that run.
    """
    mine = (found.fingerprint, sink.identity)
    for run in sink.ledger().runs():
        follows = run.options.get("follow") and run.state in ("running", "copied")
        if (
            follows
            and (run.source_fingerprint, run.target_identity) == mine
            and (existing_threads(sink, spool) or (found.store is not None and found.store.is_there(sink)))
        ):
            raise ConflictError(
                f"run {run.run_id} into {sink.label} follows this source",
                hint=f"`persistence cut-over` completes it, `persistence undo {run.run_id}` takes it back",
            )


def _run_for(
    source: Source,
    sink: Sink,
    ledger: Ledger,
    found: Scan,
    spool: Spool,
    options: Options,
    rejects: Iterable[SetAside],
) -> Run:
    """The run to continue, or a new one."""
    run, actions = choose_run(source, sink, ledger, found, spool, options)
    if run is not None:
        return run
    rule = options.on_conflict if found.store is not None and found.store.totals.items else "error"
    run = new_run(source.label, sink, found, **({} if rule == "error" else {RULE: rule}))
    ledger.begin(run, actions, rejects)
    return run


def limits() -> Limits:
    """Those of new runs."""
    return Limits(BATCH_RECORDS, BATCH_BYTES, SEGMENT_BATCHES)


def new_run(source: str, sink: Sink, found: Scan, **options: str) -> Run:
    """A run that nobody has begun, with the limits of today."""
    return Run(
        run_id=str(uuid.uuid4()),
        source_fingerprint=found.fingerprint,
        target_identity=sink.identity,
        state="running",
        options={"source": source, **options, **limits().as_options()},
        totals=None,
    )


def _is_undone(run: Run, sink: Sink, ledger: Ledger, spool: Spool, store: StoreMove | None) -> bool:
    """Whether the threads that a run brought have been deleted since; or the items, if it had no threads.

    Raises:
        ConflictError: Some have, others have not.
    """
    if spool.count == 0 and store is not None:
        return bool(ledger.committed(run.run_id)) and not store.is_there(sink)
    if run.state == "running":
        return bool(ledger.committed(run.run_id)) and not existing_threads(sink, spool)
    left_out = {thread for thread, action in ledger.actions(run.run_id).items() if action == "skip"}
    missing = 0
    first = ""
    for chunk in spool.chunks(_THREADS_AT_ONCE):
        threads = [thread.thread_id for thread in chunk if thread.thread_id not in left_out]
        if gone := set(threads) - sink.existing(threads):
            missing += len(gone)
            first = first or min(gone)
    if 0 < missing < spool.count - len(left_out):
        raise ConflictError(
            f"{sink.label} got these threads in run {run.run_id}, but {missing} of {spool.count} are no"
            f" longer there, thread {first!r} for one",
            hint="delete the others too, then all are moved again",
        )
    return missing > 0


def existing_threads(sink: Sink, spool: Spool) -> list[str]:
    """The threads that the target has, sorted."""
    chunks = ([thread.thread_id for thread in chunk] for chunk in spool.chunks(_THREADS_AT_ONCE))
    return sorted(chain.from_iterable(map(sink.existing, chunks)))
