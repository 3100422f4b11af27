"""What an archive or a database holds, told without moving anything; nothing in it is executed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from persistence.errors import SourceError
from persistence.transfer.archive import ArchiveSource
from persistence.transfer.canonical import decode_json
from persistence.transfer.digest import Digester
from persistence.transfer.engine import Clock, look
from persistence.transfer.preflight import Findings
from persistence.transfer.records import Checkpoint, Record, Reject, Source, Value, Write
from persistence.transfer.report import Progress, Totals, content_bytes, no_progress
from persistence.transfer.sides import Side, open_source, workers_of
from persistence.transfer.spool import Spool
from persistence.transfer.survey import Finding, refusals
from persistence.transfer.workers import Crew

if TYPE_CHECKING:
    from persistence.settings import Settings

LIMIT = 100
"""How many threads, or checkpoints of a thread, are listed where nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class ThreadEntry:
    """One thread of a list.

    Attributes:
        thread_id: Its id.
        checkpoints: How many it has.
        writes: How many pending writes it has.
        bytes: Its content, each value once.
        digest: SHA-256 over its content, hex; ``None`` where a row of it cannot be read.
    """

    thread_id: str
    checkpoints: int
    writes: int
    bytes: int
    digest: str | None


@dataclass(slots=True)
class CheckpointEntry:
    """One checkpoint of a list.

    Attributes:
        checkpoint_ns: Its namespace.
        checkpoint_id: Its id.
        parent_id: The checkpoint that it follows.
        made: Its own ``ts``.
        source: What made it, by its metadata: ``input``, ``loop``, ``update`` or ``fork``.
        step: The step of the graph, by its metadata.
        channels: How many channels have a value.
        bytes: All that it holds.
        writes: How many pending writes belong to it.
    """

    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str | None
    made: Any
    source: Any
    step: Any
    channels: int
    bytes: int
    writes: int = 0


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an archive or a database holds.

    Attributes:
        source: What was looked at; holds no secret.
        manifest: An archive's manifest.
        totals: How much there is: of an archive what the manifest says, of a database what was read. ``None``
            where a list was asked for.
        findings: Rows that cannot be read, and what else was noticed in a database.
        threads: The first threads, where they were asked for.
        checkpoints: The first checkpoints of the one thread that was asked for.
        more: There are more than are listed.
    """

    source: str
    manifest: dict[str, Any] | None = None
    totals: Totals | None = None
    findings: list[Finding] = field(default_factory=list)
    threads: list[ThreadEntry] | None = None
    checkpoints: list[CheckpointEntry] | None = None
    more: bool = False

    def to_json(self) -> str:
        """The inspection as one JSON object, without what was not asked for."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})


def inspect(
    side: Side,
    *,
    threads: bool = False,
    thread: str | None = None,
    limit: int = LIMIT,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look into an archive or a database.

    Of an archive only the manifest is read unless a list is asked for; whether all of it is intact says
    :func:`persistence.transfer.verify_archive`.

    Args:
        side: A DSN, or the path of an archive or of a SQLite file.
        threads: List the threads.
        thread: List the checkpoints of this thread.
        limit: List so many at most.
        settings: Defaults to the settings from the environment.
        progress: Told how far the reading of a whole database has come.

    Raises:
        SourceError: It cannot be read, or has no such thread.
        ArchiveError: The archive is damaged.
    """
    with open_source(side, settings) as source:
        manifest = None
        if isinstance(source, ArchiveSource):
            manifest = msgspec.to_builtins(source.manifest)
        if thread is not None:
            checkpoints, more = _checkpoints(source, thread, limit)
            return Inspection(source.label, manifest, checkpoints=checkpoints, more=more)
        if threads:
            found = list(islice(_threads(source.records()), limit + 1))
            return Inspection(source.label, manifest, threads=found[:limit], more=len(found) > limit)
        if isinstance(source, ArchiveSource):
            stored = source.manifest.totals
            totals = Totals(**{name: getattr(stored, name) for name in stored.__struct_fields__})
            return Inspection(source.label, manifest, totals)
        with Spool() as spool, Crew(workers_of(settings, side)) as crew:
            seen = look(source, spool, Clock(progress or no_progress), Findings(), crew=crew)
        return Inspection(source.label, None, seen.totals, [*refusals(seen.problems), *seen.findings])


def _threads(records: Iterable[Record]) -> Iterator[ThreadEntry]:
    for thread, group in groupby(records, key=attrgetter("thread_id")):
        digester, size, readable = Digester(), 0, True
        for record in group:
            if isinstance(record, Reject):
                readable = False
                continue
            digester.see(record)
            size += content_bytes(record)
        digest = digester.end()
        yield ThreadEntry(
            thread,
            digest.checkpoints if digest is not None else 0,
            digest.writes if digest is not None else 0,
            size,
            digest.sha256.hex() if digest is not None and readable else None,
        )


def _checkpoints(source: Source, thread: str, limit: int) -> tuple[list[CheckpointEntry], bool]:
    """The first checkpoints of a thread, and whether there are more."""
    listed: dict[tuple[str, str], CheckpointEntry] = {}
    there = more = False
    for record in source.records([thread], data=False):
        there = True
        key = (record.checkpoint_ns, record.checkpoint_id) if not isinstance(record, Value) else ("", "")
        match record:
            case Checkpoint() if len(listed) < limit:
                listed[key] = _entry(record)
            case Checkpoint():
                more = True
            case Write() if key in listed:
                listed[key].writes += 1
    if not there:
        raise SourceError(f"{source.label} has no thread {thread!r}")
    return list(listed.values()), more


def _entry(record: Checkpoint) -> CheckpointEntry:
    metadata = decode_json(record.metadata)
    metadata = metadata if isinstance(metadata, dict) else {}
    return CheckpointEntry(
        checkpoint_ns=record.checkpoint_ns,
        checkpoint_id=record.checkpoint_id,
        parent_id=record.parent_id,
        made=decode_json(record.body).get("ts"),
        source=metadata.get("source"),
        step=metadata.get("step"),
        channels=len(record.values),
        bytes=len(record.body) + len(record.metadata) + sum(ref.size for ref in record.values),
    )
