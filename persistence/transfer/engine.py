"""Moves the content of a source into a sink: look at everything, write in batches, compare.

Nothing is written before the whole source was read once: the first reading finds what the target cannot
hold and gives the fingerprint that the ledger is bound to. The second reading cuts the same records
into the same batches every time, so a run that was killed goes on at the first batch that the
ledger does not have.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from persistence import metrics
from persistence.errors import ConflictError, SchemaError, TransferError
from persistence.transfer.digest import Digester, Fingerprint, ThreadDigest, digests, line
from persistence.transfer.ledger import Ledger, LedgerEntry, Run
from persistence.transfer.preflight import RefusedError
from persistence.transfer.records import (
    Batch,
    Checkpoint,
    Preflight,
    Record,
    Reject,
    Sink,
    Source,
    Value,
    Write,
)
from persistence.transfer.report import Phase, Progress, Totals
from persistence.transfer.spool import Spool
from persistence.transfer.verify import Verdict, compare

BATCH_RECORDS = 5_000
BATCH_BYTES = 8_000_000
_THREADS_AT_ONCE = 5_000
_TOLD_EVERY = 64


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
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - began

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class Meter:
    """Counts what passes, and tells the progress; the metrics show it too."""

    backend = "transfer"

    def __init__(self, clock: Clock, phase: Phase, expected: int) -> None:
        self.totals = Totals()
        self._tell = clock.progress
        self._phase = phase
        self._expected = expected
        metrics.observe(self)

    def gauges(self) -> dict[str, float]:
        """How far this phase has come."""
        name = f"transfer_{self._phase}"
        return {
            f"{name}_checkpoints": self.totals.checkpoints,
            f"{name}_checkpoints_expected": self._expected,
            f"{name}_bytes": self.totals.bytes,
        }

    def see(self, record: Record) -> None:
        """Count one record."""
        totals = self.totals
        match record:
            case Checkpoint():
                size = content_bytes(record)
                totals.checkpoints += 1
                totals.values_referenced += len(record.values)
                totals.bytes += size
                totals.bytes_referenced += size + sum(ref.size for ref in record.values if ref.data is None)
                if totals.checkpoints % _TOLD_EVERY == 0:
                    self.tell()
            case Value():
                totals.values += 1
                totals.bytes += len(record.data)
            case Write():
                totals.writes += 1
                totals.bytes += len(record.data or b"")
                totals.bytes_referenced += len(record.data or b"")
            case Reject():
                pass

    def tell(self) -> None:
        """Say how far it has come."""
        done = self.totals.checkpoints
        self._tell(self._phase, done, max(done, self._expected), self.totals.bytes)


def content_bytes(record: Value | Checkpoint | Write) -> int:
    """How many bytes of content a record carries."""
    if isinstance(record, Checkpoint):
        inline = sum(len(ref.data) for ref in record.values if ref.data is not None)
        return len(record.body) + len(record.metadata) + inline
    return len(record.data or b"")


@dataclass(slots=True)
class Scan:
    """What the first reading of a source found."""

    fingerprint: str
    totals: Totals


class Copyist(Protocol):
    """Takes what a scan reads: an archive being written."""

    def add(self, record: Record) -> None:
        """The next record."""

    def end_thread(self, digest: ThreadDigest) -> None:
        """The thread of the records before is complete."""


def scan(
    source: Source, spool: Spool, clock: Clock, preflight: Preflight, copyist: Copyist | None = None
) -> Scan:
    """Read everything once: each thread's digest goes into ``spool``.

    Raises:
        RefusedError: There are rows that the target cannot hold.
    """
    with clock.phase("read"):
        meter = Meter(clock, "read", source.count())
        fingerprint, digester = Fingerprint(), Digester()

        def end(thread: ThreadDigest | None) -> None:
            if thread is not None:
                spool.add(thread)
                fingerprint.see(thread)
                if copyist is not None:
                    copyist.end_thread(thread)

        for record in source.records():
            meter.see(record)
            preflight.see(record)
            end(digester.see(record))
            if copyist is not None:
                copyist.add(record)
        end(digester.end())
        meter.tell()
    if problems := preflight.problems():
        raise RefusedError(source.label, problems)
    meter.totals.threads = spool.count
    return Scan(fingerprint.hexdigest(), meter.totals)


@dataclass(slots=True)
class Copied:
    """What became of a run's batches."""

    run_id: str
    written: int = 0
    skipped: int = 0
    already_done: bool = False
    verified: bool = False


def copy(source: Source, sink: Sink, found: Scan, spool: Spool, clock: Clock) -> Copied:
    """Write everything, or what an interrupted run left to do.

    Call it, and :func:`finish`, with ``sink.exclusive()`` held.

    Raises:
        ConflictError: The target has threads of this name; nothing was written.
    """
    ledger = sink.ledger()
    run = _run_for(source, sink, ledger, found, spool)
    copied = Copied(run.run_id)
    if run.state == "finished":
        copied.already_done = True
        copied.verified = bool((run.totals or {}).get("verified"))
        return copied
    committed = ledger.committed(run.run_id)
    copied.skipped = len(committed)
    if run.state == "copied":
        return copied
    with clock.phase("write"):
        meter = Meter(clock, "write", found.totals.checkpoints)
        for batch in _batches(source.records(), run, meter, repeats_values=sink.repeats_values):
            if batch.number not in committed:
                sink.write(batch)
                copied.written += 1
            elif committed[batch.number] == batch.entry.digest:
                sink.skip(batch)
            else:
                raise TransferError(
                    f"batch {batch.number} of run {run.run_id} is not the one that was committed before",
                    hint="the run was begun by another version of this package; finish it with that one",
                )
            meter.tell()
        ledger.advance(run.run_id, "copied", asdict(found.totals) | {"verified": False})
    return copied


def finish(sink: Sink, copied: Copied, totals: Totals) -> None:
    """Note in the ledger that the run is complete, and whether it was verified."""
    record = asdict(totals) | {"verified": copied.verified}
    sink.ledger().advance(copied.run_id, "finished", record)


def verify_copy(source: Source, target: Source, spool: Spool, clock: Clock, expected: int) -> Verdict:
    """Compare the threads of ``spool``, which are the source's, with the target's rows."""
    verdict = Verdict(source.label, target.label)
    with clock.phase("verify"):
        meter = Meter(clock, "verify", expected)
        for chunk in spool.chunks(_THREADS_AT_ONCE):
            threads = [thread.thread_id for thread in chunk]
            compare(
                source, target, chunk, digests(metered(target.records(threads, data=False), meter)), verdict
            )
        meter.tell()
    return verdict


def metered(records: Iterable[Record], meter: Meter) -> Iterator[Record]:
    """The same records, counted."""
    for record in records:
        meter.see(record)
        yield record


def refuse_strangers(sink: Sink, spool: Spool) -> None:
    """Find threads that no transfer brought, before as much as a table is made.

    Raises:
        ConflictError: The target has threads of this name.
    """
    with suppress(SchemaError):  # no ledger: nothing was ever moved into this database
        if sink.ledger().runs():
            return  # threads may be those of an interrupted run
    with suppress(SchemaError):  # no tables, so no threads
        if (existing := _first_existing(sink, spool)) is not None:
            raise ConflictError(f"{sink.label} already has thread {existing!r}", hint=_make_room(sink))


def _make_room(sink: Sink) -> str:
    return f"move into {sink.fresh}, or delete the threads from the target"


def _run_for(source: Source, sink: Sink, ledger: Ledger, found: Scan, spool: Spool) -> Run:
    """The run to continue, or a new one; a run that was undone by hand does not count."""
    runs = [run for run in ledger.runs() if run.target_identity == sink.identity]
    same = next((run for run in runs if run.source_fingerprint == found.fingerprint), None)
    if same is not None and not _is_undone(same, sink, ledger, spool):
        return same
    if (existing := _first_existing(sink, spool)) is not None:
        unfinished = [run for run in runs if run.state == "running"]
        hint = _make_room(sink)
        if unfinished and unfinished[0].options.get("source") == source.label:
            hint = (
                f"run {unfinished[0].run_id} from this source was interrupted, and the source has changed"
                f" since; {hint}"
            )
        raise ConflictError(f"{sink.label} already has thread {existing!r}", hint=hint)
    run = Run(
        run_id=str(uuid.uuid4()),
        source_fingerprint=found.fingerprint,
        target_identity=sink.identity,
        state="running",
        options={"source": source.label, "batch_records": BATCH_RECORDS, "batch_bytes": BATCH_BYTES},
        totals=None,
    )
    ledger.begin(run)
    return run


def _is_undone(run: Run, sink: Sink, ledger: Ledger, spool: Spool) -> bool:
    """Whether the threads that a run brought have been deleted since.

    Raises:
        ConflictError: Some have, others have not.
    """
    if run.state == "running":
        return bool(ledger.committed(run.run_id)) and _first_existing(sink, spool) is None
    missing = 0
    first = ""
    for chunk in spool.chunks(_THREADS_AT_ONCE):
        threads = [thread.thread_id for thread in chunk]
        if gone := set(threads) - sink.existing(threads):
            missing += len(gone)
            first = first or min(gone)
    if 0 < missing < spool.count:
        raise ConflictError(
            f"{sink.label} got these threads in run {run.run_id}, but {missing} of {spool.count} are no"
            f" longer there, thread {first!r} for one",
            hint="delete the others too, then all are moved again",
        )
    return missing > 0


def _first_existing(sink: Sink, spool: Spool) -> str | None:
    for chunk in spool.chunks(_THREADS_AT_ONCE):
        if existing := sink.existing([thread.thread_id for thread in chunk]):
            return min(existing)
    return None


def _batches(records: Iterable[Record], run: Run, meter: Meter, *, repeats_values: bool) -> Iterator[Batch]:
    """Cut records into batches: the same ones each time, for the limits that the run began with."""
    options: Mapping[str, Any] = run.options
    max_records, max_bytes = int(options["batch_records"]), int(options["batch_bytes"])
    batch: list[Value | Checkpoint | Write] = []
    size = repeated = number = 0
    for record in metered(records, meter):
        if isinstance(record, Reject):
            raise TransferError("the source changed while it was read")
        batch.append(record)
        size += content_bytes(record)
        if repeats_values and isinstance(record, Checkpoint):
            repeated += sum(ref.size for ref in record.values if ref.data is None)
        if len(batch) >= max_records or size + repeated >= max_bytes:
            yield _batch(run.run_id, number, batch, size)
            batch, size, repeated, number = [], 0, 0, number + 1
    if batch:
        yield _batch(run.run_id, number, batch, size)


def _batch(run_id: str, number: int, records: list[Value | Checkpoint | Write], size: int) -> Batch:
    digest = hashlib.sha256()
    for record in records:
        digest.update(line(record))
    counts = {
        kind: sum(isinstance(record, kind) for record in records) for kind in (Checkpoint, Write, Value)
    }
    entry = LedgerEntry(
        run_id=run_id,
        number=number,
        thread_id=records[0].thread_id,
        digest=digest.hexdigest(),
        checkpoints=counts[Checkpoint],
        writes=counts[Write],
        values=counts[Value],
        bytes=size,
    )
    return Batch(number, records, entry)
