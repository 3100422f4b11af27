"""What a move would do, without doing it: a dry run that reads everything and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persistence import schema
from persistence.dsn import mask_secrets
from persistence.errors import ArchiveError, ConflictError, SchemaError, TransferError
from persistence.transfer.archive_format import MANIFEST, read_manifest
from persistence.transfer.archive_writer import require_room
from persistence.transfer.conflicts import decide, refuse_itself
from persistence.transfer.engine import (
    Clock,
    Scan,
    choose_run,
    copy,
    existing_threads,
    look,
    make_room,
    refuse_followed,
)
from persistence.transfer.included import included
from persistence.transfer.items import ItemPreflight
from persistence.transfer.options import Options
from persistence.transfer.preflight import Findings, ItemFindings, RefusedError
from persistence.transfer.records import Sink, Source
from persistence.transfer.report import Progress, StoreTotals, Totals, no_progress
from persistence.transfer.sides import Side, as_path, open_source, open_target, require_decrypt
from persistence.transfer.spool import Spool
from persistence.transfer.store import StoreMove
from persistence.transfer.survey import EXAMPLES, Finding, Severity, Sizes, refusals
from persistence.transfer.workers import Crew

if TYPE_CHECKING:
    from persistence.contract import Provider
    from persistence.settings import Settings
    from persistence.transfer.ledger import Action, Run

ASSUMED_WRITE_RATE = 40_000_000
"""Bytes of content in a second, where writing was not measured: a database on the same network."""
DEFAULT = Options()
_ORDER = ("refused", "conflict", "note")


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long the move would take.

    Attributes:
        seconds: In all: reading twice, writing, comparing.
        read_bytes_per_second: As measured in this dry run, looking at everything included.
        write_bytes_per_second: As measured against the target, or else as assumed.
        measured: Whether writing was measured.
    """

    seconds: float
    read_bytes_per_second: float
    write_bytes_per_second: float
    measured: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a move would do.

    Attributes:
        source: What was read; holds no secret.
        target: What would be written; holds no secret.
        fingerprint: SHA-256 over the content of the source.
        totals: How much would be moved.
        target_bytes: How many bytes of content the target would hold: a database that keeps each value once
            holds fewer than the source refers to.
        findings: What stops the move, what needs a decision, what is worth knowing; in this order.
        sizes: How large the checkpoints and threads are.
        estimate: How long it would take.
        rehearsed: Whether the target itself took all rows, in a transaction that was rolled back.
        seconds: Duration of this dry run.
        phases: Seconds by phase.
        store: How much of the store would be moved.
    """

    source: str
    target: str
    fingerprint: str
    totals: Totals
    target_bytes: int
    findings: list[Finding]
    sizes: Sizes
    estimate: Estimate
    rehearsed: bool
    seconds: float
    phases: dict[str, float]
    store: StoreTotals

    @property
    def would_move(self) -> bool:
        """Nothing stops the move."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """What the console command ends with: 0, or the exit code that the move would end with."""
        return 0 if self.would_move else TransferError.exit_code

    def to_json(self) -> str:
        """The plan as one JSON object."""
        totals = asdict(self.totals) | {"bytes_saved": self.totals.bytes_saved}
        return json.dumps(asdict(self) | {"totals": totals, "would_move": self.would_move}, sort_keys=True)


def plan(
    source: Side,
    target: Side,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    options: Options = DEFAULT,
    archive: Path | None = None,
    against_target: bool = False,
) -> Plan:
    """Say what :func:`migrate`, :func:`export` or :func:`import_` would do; writes nothing.

    Args:
        source: A DSN, or the path of an archive or of a SQLite file.
        target: A DSN, or the path of an archive to be made.
        settings: Defaults to the settings from the environment.
        progress: Told how far it has come.
        options: As for the move.
        archive: The archive that the move would go through.
        against_target: Also write everything into the target, in one transaction that is rolled back, so that
            the database itself judges. Its tables must be there.

    Raises:
        SourceError: The source cannot be read.
        ConnectError: A database does not answer.
        SchemaError: The target has no tables to write to, or they are not complete.
    """
    clock = Clock(progress or no_progress)
    where = as_path(target)
    with open_source(source, settings, allow_pickle=options.allow_pickle) as whole:
        chosen = included(whole, options)
        drift = _source_drift(whole)
        if isinstance(where, Path) or archive is not None:
            require_decrypt(settings, options)
        if isinstance(where, Path):
            return _plan_export(chosen, where, clock, drift, options)
        return _plan_load(
            chosen, open_target(where, settings, options), clock, options, drift, archive, against_target
        )


def _plan_load(
    source: Source,
    provider: Provider,
    clock: Clock,
    options: Options,
    drift: list[Finding],
    archive: Path | None,
    against_target: bool,
) -> Plan:
    workers = options.workers or provider.settings.transfer_workers
    with (
        provider.sink() as sink,
        Spool() as spool,
        StoreMove(source, options, clock) as store,
        Crew(workers) as crew,
    ):
        refuse_itself(source, sink)
        if against_target:
            schema.require(provider)
        found = look(source, spool, clock, sink.preflight(), crew=crew)
        items = _items(store, found, sink.store().preflight(), sink)
        findings = [
            *refusals(found.problems),
            *items,
            *_target_drift(source, sink, provider),
            *_runs_and_threads(source, sink, found, spool, options),
            *(_archive_findings(archive, found) if archive is not None else ()),
            *drift,
        ]
        rehearsed = against_target and all(finding.severity == "note" for finding in findings)
        if rehearsed:
            findings += _rehearse(source, sink, found, spool, clock, options, store)
        size = found.totals.bytes_referenced if sink.repeats_values else found.totals.bytes
        size += store.totals.bytes
        return _plan(source.label, sink.label, found, findings, clock, size, rehearsed=rehearsed)


def _plan_export(source: Source, folder: Path, clock: Clock, drift: list[Finding], options: Options) -> Plan:
    findings = list(drift)
    try:
        require_room(folder)
    except ArchiveError as error:
        findings.append(_refused("archive", error.message, error.hint))
    with Spool() as spool, StoreMove(source, options, clock) as store:
        found = look(source, spool, clock, Findings())
        items = _items(store, found, ItemFindings())
    findings += [*refusals(found.problems), *items]
    size = found.totals.bytes + store.totals.bytes
    return _plan(source.label, f"archive {folder}", found, findings, clock, size)


def _items(
    store: StoreMove, found: Scan, preflight: ItemPreflight, sink: Sink | None = None
) -> list[Finding]:
    """What stops the store: items that the target cannot hold, or has with another content."""
    try:
        conflict = store.join(found, preflight, sink=sink)
        if conflict is not None and sink is not None:
            store.refuse(conflict, sink, found.fingerprint)
    except RefusedError as error:
        return refusals(error.problems)
    except ConflictError as error:
        return [Finding("existing-items", "conflict", error.message, error.hint or "", 1)]
    return []


def _plan(
    source: str,
    target: str,
    found: Scan,
    findings: list[Finding],
    clock: Clock,
    target_bytes: int,
    *,
    rehearsed: bool = False,
) -> Plan:
    stopping = {finding.kind for finding in findings if finding.severity != "note"}
    # What stops the move was also noticed on the way.
    findings = findings + [finding for finding in found.findings if finding.kind not in stopping]
    return Plan(
        source=source,
        target=target,
        fingerprint=found.fingerprint,
        totals=found.totals,
        target_bytes=target_bytes,
        findings=sorted(findings, key=lambda finding: _ORDER.index(finding.severity)),
        sizes=found.sizes,
        estimate=_estimate(found.totals, target_bytes, clock.phases),
        rehearsed=rehearsed,
        seconds=clock.seconds(),
        phases=clock.phases,
        store=found.store.totals if found.store else StoreTotals(),
    )


def _estimate(totals: Totals, target_bytes: int, phases: dict[str, float]) -> Estimate:
    """Read once to look, read again while writing, and compare, which takes no longer than reading."""
    reading = phases["read"] + phases["read store"]
    measured = "write" in phases
    writing = phases.get("write", 0.0) + phases.get("write store", 0.0)
    if not measured:
        writing = reading + target_bytes / ASSUMED_WRITE_RATE
    return Estimate(
        seconds=reading + writing + reading,
        read_bytes_per_second=totals.bytes / max(reading, 1e-6),
        write_bytes_per_second=target_bytes / max(writing, 1e-6) if measured else ASSUMED_WRITE_RATE,
        measured=measured,
    )


def _source_drift(source: Source) -> list[Finding]:
    finding = Finding(
        "source-schema",
        "note",
        "the tables of the source are not as the installed savers make them",
        "they are read as they are",
    )
    for difference in source.drift():
        finding.add(difference)
    return [finding] if finding.count else []


def _target_drift(source: Source, sink: Sink, provider: Provider) -> list[Finding]:
    """What setup would make, and what it cannot mend."""
    try:
        differences = schema.check(provider)
    except SchemaError as error:
        return [_refused("target-schema", error.message, error.hint)]
    inside = source.database is not None and sink.identity.startswith(f"{source.database}/")
    made = Finding(
        "target-setup",
        "refused" if inside else "note",
        "tables are missing in the target, and would be made in the database that is read"
        if inside
        else "tables are missing in the target, and would be made",
        f"run `{schema.SETUP}` for the target before"
        if inside
        else "the role needs the right to make tables",
    )
    left = Finding(
        "target-schema",
        "refused",
        "the tables of the target are not as the installed savers need them",
        "use another database or schema",
    )
    for difference in differences:
        by_setup = difference.mend in (schema.SETUP, schema.UPGRADE)
        (made if by_setup else left).add(str(difference))
        if not by_setup and difference.mend is not None:
            left.advice = f"run `{difference.mend}`"
    return [finding for finding in (left, made) if finding.count]


def _runs_and_threads(
    source: Source, sink: Sink, found: Scan, spool: Spool, options: Options
) -> list[Finding]:
    """What the target's ledger knows of this content, and what would be done about threads that are there."""
    run: Run | None = None
    actions: Mapping[str, Action] = {}
    there: list[str] = []
    try:
        with suppress(SchemaError):  # no tables, so no threads
            there = existing_threads(sink, spool)
        try:
            refuse_followed(sink, found, spool)
            run, actions = choose_run(source, sink, sink.ledger(), found, spool, options)
        except SchemaError:  # no ledger: nothing was ever moved into this database
            actions = decide(source, sink, there, options.on_conflict, make_room(sink))
    except ConflictError as error:
        return [_threads("conflict", error.message, error.hint or "", there)]
    if run is None:
        doing = f"--on-conflict {options.on_conflict}"
        if options.on_conflict == "replace":
            doing += ": what they hold is deleted, and undo does not bring it back, so export it first"
        what = "threads exist in the target already"
        return [_threads("note", what, f"what is done about them: {doing}", there)] if actions else []
    if run.state == "finished":
        what = f"run {run.run_id} has moved all of this before"
        return [Finding("finished-run", "note", what, "nothing would be written", 1)]
    batches = len(sink.ledger().committed(run.run_id))
    what = f"run {run.run_id} was interrupted after {batches} batches"
    return [Finding("interrupted-run", "note", what, "it would be continued", 1)]


def _threads(severity: Severity, what: str, advice: str, there: Sequence[str]) -> Finding:
    examples = [f"thread {thread!r}" for thread in there[:EXAMPLES]]
    return Finding("existing-threads", severity, what, advice, max(1, len(there)), examples)


def _archive_findings(folder: Path, found: Scan) -> list[Finding]:
    """What is at the place of the archive that the move would go through."""
    try:
        if not (folder / MANIFEST).exists():
            require_room(folder)
        elif read_manifest(folder).content != found.fingerprint:
            what = f"archive {folder} exists and holds something else than the source"
            return [_refused("archive", what, "name another folder")]
    except ArchiveError as error:
        return [_refused("archive", error.message, error.hint)]
    return []


def _rehearse(
    source: Source,
    sink: Sink,
    found: Scan,
    spool: Spool,
    clock: Clock,
    options: Options,
    store: StoreMove,
) -> list[Finding]:
    """Let the target take everything, and take it back."""
    try:
        with sink.exclusive(), sink.rehearsal():
            # Workers have connections of their own, and would commit.
            copied = copy(source, sink, found, spool, clock, options)
            if not copied.already_done:
                store.copy(sink, copied.run_id)
    except TransferError as error:
        return [_refused("target-refused", error.message, error.hint)]
    return []


def _refused(kind: str, what: str, advice: str | None) -> Finding:
    # What a database says may hold secrets, as of a trigger that connects to another one.
    return Finding(kind, "refused", mask_secrets(what), advice or "", 1)
