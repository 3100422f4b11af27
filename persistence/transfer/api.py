"""The jobs: migrate, export, import, verify."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from persistence import schema
from persistence.dsn import Dsn
from persistence.errors import ArchiveError, ConfigurationError, TransferError
from persistence.registry import provider_for
from persistence.transfer.ahead import ahead_of
from persistence.transfer.archive import ArchiveSource
from persistence.transfer.archive_check import ArchiveCheck, check_archive
from persistence.transfer.archive_format import MANIFEST
from persistence.transfer.archive_writer import ArchiveWriter
from persistence.transfer.comparison import Check, Comparison
from persistence.transfer.conflicts import refuse_itself
from persistence.transfer.difference import Verdict
from persistence.transfer.engine import (
    NOTHING,
    Clock,
    Copied,
    Scan,
    copy,
    finish,
    limits,
    new_run,
    refuse_followed,
    refuse_strangers,
    require_tables,
    scan,
    verify_copy,
    verify_merged,
)
from persistence.transfer.included import included, left_out
from persistence.transfer.options import THREADS, Options, Part
from persistence.transfer.preflight import Findings, ItemFindings
from persistence.transfer.recording import recorded
from persistence.transfer.records import Source
from persistence.transfer.removal import Later, Undone, find_run
from persistence.transfer.removal import undo as undo_run
from persistence.transfer.report import Progress, Report, StoreTotals, no_progress
from persistence.transfer.sampling import Sample
from persistence.transfer.selection import Selection
from persistence.transfer.setting_aside import Rejects
from persistence.transfer.sides import Side, open_source, open_target, require_decrypt, workers_of
from persistence.transfer.spool import Spool
from persistence.transfer.store import StoreMove
from persistence.transfer.workers import Crew

if TYPE_CHECKING:
    from persistence.contract import Provider
    from persistence.settings import Settings
    from persistence.transfer.ledger import Run, SetAside

DEFAULT = Options()
_SHOWN = 20
EVERYTHING = Selection()
DIGESTS = Check()


def migrate(
    source: Side,
    target: str | Dsn,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    verify: bool = True,
    archive: Path | None = None,
    options: Options = DEFAULT,
) -> Report:
    """Move every thread of ``source`` into ``target``, and compare both by content.

    The source is only read. An interrupted run is continued by the same call; a finished one is
    recognised and changes nothing.

    Args:
        source: A DSN, or the path of an archive or of a SQLite file.
        target: A DSN.
        settings: Defaults to the settings from the environment.
        progress: Told how far it has come.
        verify: Compare both sides afterwards.
        archive: Go through an archive in this folder, which stays as a backup.
        options: Which threads, and what to do about conflicts.

    Raises:
        SourceError: The source cannot be read.
        RefusedError: The target cannot hold something; nothing was written.
        ConflictError: The target has threads of the source already; nothing was written.
        VerificationError: The sides differ afterwards.
    """
    clock = Clock(progress or no_progress)
    provider = open_target(target, settings, options)
    if archive is not None and options.on_reject == "set-aside":
        raise ConfigurationError(
            "an archive cannot set rows aside", hint="move directly; what is moved can be exported afterwards"
        )
    if archive is None:
        with open_source(source, settings, allow_pickle=options.allow_pickle) as opened:
            return _load(opened, provider, clock, options, verify=verify)
    require_decrypt(settings, options)
    with open_source(source, settings, allow_pickle=options.allow_pickle) as opened, provider.sink() as sink:
        refuse_itself(opened, sink)
        if os.path.exists(archive / MANIFEST):  # noqa: PTH110 - False where it may not look
            _require_same(opened, archive, clock, options)
        else:
            _write_archive(opened, archive, clock, options)
        label, items_left_out = opened.label, left_out(opened, options)
    with ArchiveSource(archive, allow_pickle=options.allow_pickle) as stored:
        report = _load(stored, provider, clock, options, verify=verify)
        return replace(report, source=label, items_left_out=items_left_out)


def export(
    source: Side,
    archive: Path,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    options: Options = DEFAULT,
) -> Report:
    """Write every thread of ``source``, or those that ``options`` select, into a new archive.

    Raises:
        SourceError: The source cannot be read.
        ArchiveError: The archive exists already, or cannot be written.
        RefusedError: A row has no neutral form; no archive was written.
    """
    clock = Clock(progress or no_progress)
    require_decrypt(settings, options)
    with open_source(source, settings, allow_pickle=options.allow_pickle) as opened:
        found = _write_archive(opened, archive, clock, options)
        report = _report(opened.label, f"archive {archive}", found, clock)
        return replace(report, items_left_out=left_out(opened, options))


def import_(
    archive: Path,
    target: str | Dsn,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    verify: bool = True,
    options: Options = DEFAULT,
) -> Report:
    """Write every thread of an archive into ``target``; otherwise as :func:`migrate`.

    Raises:
        ArchiveError: The archive is damaged; nothing was written.
    """
    clock = Clock(progress or no_progress)
    provider = open_target(target, settings, options)
    with ArchiveSource(archive, allow_pickle=options.allow_pickle) as stored:
        return _load(stored, provider, clock, options, verify=verify)


def verify(
    left: Side,
    right: Side,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    subset: bool = False,
    select: Selection = EVERYTHING,
    check: Check = DIGESTS,
    allow_pickle: bool = False,
    include: Collection[Part] = THREADS,
    vectors: bool = True,
    workers: int | None = None,
) -> Verdict:
    """Compare two sides by content, each digest computed from that side's own rows.

    Args:
        left: A DSN, or the path of an archive or of a SQLite file.
        right: The same.
        settings: Defaults to the settings from the environment.
        progress: Told how far it has come.
        subset: Threads and items that only the right side has are no difference.
        select: Compare only these threads; each side selects from its own.
        check: How deep, by which sample, and whether it can be resumed. Items of the store are always
            compared by their content, all of them.
        include: What to compare; see :class:`Options`.
        vectors: Whether the embeddings of items are compared.
        allow_pickle: Compare rows that are pickled, too. To read them from SQLite runs code.
        workers: Processes that read; ``None`` leaves it to the settings.

    Raises:
        SourceError: A side cannot be read, or a comparison that is resumed has other sides by now.
    """
    if check.depth == "checksums":
        raise ConfigurationError("checksums are those of an archive by itself; two sides have digests")
    clock = Clock(progress or no_progress)
    about = f"{list(select.threads)} {list(select.match)} {dict(select.where)}"
    with (
        open_source(left, settings, allow_pickle=allow_pickle) as lefts,
        open_source(right, settings, allow_pickle=allow_pickle) as rights,
        Crew(workers or workers_of(settings, right, left)) as crew,
    ):
        options = Options(select=select, include=include, vectors=vectors)
        one, other = included(lefts, options), included(rights, options)
        with StoreMove(one, options, clock) as store:
            comparison = Comparison(one, other, check, clock, subset=subset, about=about, crew=crew)
            verdict = comparison.run()
            store.verify(other, verdict, subset=subset)
        verdict.items_left_out = left_out(lefts, options), left_out(rights, options)
        return verdict


def runs(target: str | Dsn, *, settings: Settings | None = None) -> list[Run]:
    """The transfers into a database, newest first.

    Raises:
        SchemaError: Its tables are not there.
    """
    with provider_for(target, settings).sink() as sink:
        return sink.ledger().runs()


def rejects(run_id: str, target: str | Dsn, *, settings: Settings | None = None) -> list[SetAside]:
    """The rows that a run set aside, without what they held.

    Args:
        run_id: The run, the beginning of its id, or ``last`` for the newest one.
        target: The DSN that it wrote to.
        settings: Defaults to the settings from the environment.

    Raises:
        TransferError: There is no such run.
    """
    with provider_for(target, settings).sink() as sink:
        return sink.ledger().rejects(find_run(sink, run_id).run_id)


def retry_rejects(
    run_id: str,
    source: Side,
    target: str | Dsn,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    options: Options = DEFAULT,
) -> Report:
    """Move what a run set aside, now that the cause is mended: in the source, the settings or the options.

    The threads of these rows are merged into the target, in a run of their own. Rows that still cannot be
    moved are set aside by that one; the earlier run has none any more.

    Args:
        run_id: The run, the beginning of its id, or ``last`` for the newest one.
        source: Where it read from.
        target: The DSN that it wrote to.
        settings: Defaults to the settings from the environment.
        progress: Told how far it has come.
        options: ``allow_pickle`` and ``decrypt`` count.

    Raises:
        TransferError: There is no such run, or it set nothing aside.
        SourceError: A thread is not in the source any more.
    """
    with provider_for(target, settings).sink() as sink:
        run = find_run(sink, run_id)
        threads = sorted({one.thread_id for one in sink.ledger().rejects(run.run_id)})
    if not threads:
        raise TransferError(
            f"run {run.run_id} has set nothing aside", hint="`persistence runs` lists the runs"
        )
    chosen = replace(options, select=Selection(threads=threads), on_conflict="merge", on_reject="set-aside")
    report = migrate(source, target, settings=settings, progress=progress, options=chosen)
    with provider_for(target, settings).sink() as sink:
        sink.ledger().forget_rejects(run.run_id)
    return report


def undo(
    run_id: str, target: str | Dsn, *, settings: Settings | None = None, later: Later = "refuse"
) -> Undone:
    """Remove exactly what one transfer inserted into ``target``.

    Args:
        run_id: The run, the beginning of its id, or ``last`` for the newest one.
        target: The DSN that it wrote to.
        settings: Defaults to the settings from the environment.
        later: What to do about threads in which later work builds on what would go: refuse, keep these
            threads as they are, or remove the later work too.

    Raises:
        ConflictError: There is such work, and ``later`` is ``refuse``; or another transfer is under way.
        TransferError: There is no such run, or it was undone before.
    """
    with provider_for(target, settings).sink() as sink:
        run = find_run(sink, run_id)
        with sink.exclusive():
            return undo_run(sink, run, later)


def verify_archive(
    archive: Path, *, progress: Progress | None = None, check: Check = DIGESTS
) -> ArchiveCheck:
    """Check an archive by itself: its checksums, and the digest of every thread.

    Args:
        archive: Its path.
        progress: Told how far it has come.
        check: How deep, and by which sample. Of a sample only the parts that hold it are read.

    Raises:
        ArchiveError: It is damaged, incomplete, or of a version that is not known.
    """
    if check.depth == "semantic" or check.resume is not None:
        raise ConfigurationError("only a comparison of two sides can be semantic, or be resumed")
    sample = Sample.drawn(check.sample, check.seed) if check.sample is not None else None
    with ArchiveSource(archive) as stored:
        return check_archive(stored, check.depth, sample, Clock(progress or no_progress))


def _load(whole: Source, provider: Provider, clock: Clock, options: Options, *, verify: bool) -> Report:
    source = included(whole, options)
    workers = options.workers or provider.settings.transfer_workers
    with (
        provider.sink() as sink,
        Spool() as spool,
        StoreMove(source, options, clock) as store,
        Crew(workers) as crew,
        recorded(source, crew.lend) as recording,
        ExitStack() as stack,
    ):
        refuse_itself(source, sink)
        rejects: Iterable[SetAside] = ()
        if options.on_reject == "set-aside":
            unfit = Rejects.of(source, sink.preflight(), clock)
            source, rejects = unfit.accepted(), unfit.rows()
        ahead = stack.enter_context(ahead_of(source, sink, options, limits(), patient=crew.count == 1))
        found = scan(source, spool, clock, sink.preflight(), crew=crew, recording=recording, ahead=ahead)
        conflict = store.join(found, sink.store().preflight(), sink=sink)
        if options.on_conflict == "error":
            refuse_strangers(source, sink, spool)
            store.refuse(conflict, sink, found.fingerprint)
        early = ahead.commit(new_run(source.label, sink, found)) if ahead is not None else NOTHING
        require_tables(source, sink, provider)
        schema.setup(provider)
        stack.enter_context(sink.exclusive())
        refuse_followed(sink, found, spool)
        copied = copy(source, sink, found, spool, clock, options, rejects, crew, recording, early)
        if not copied.already_done:
            copied.written += store.copy(sink, copied.run_id)
            if verify:
                with provider.source(allow_pickle=options.allow_pickle) as target:
                    apart = frozenset([*copied.having("skip"), *copied.having("merge")])
                    expected = found.totals.checkpoints
                    verdict = verify_copy(source, target, spool, clock, expected, apart, crew)
                    store.verify(target, verdict, subset=True)
                verify_merged(source, sink, copied.having("merge"), verdict)
                verdict.require()
                copied.verified = True
            finish(sink, copied, found.totals)
        report = _report(source.label, sink.label, found, clock, copied, verified=copied.verified)
        left, aside = left_out(whole, options), [f"{one.place}: {one.reason}" for one in copied.rejects]
        return replace(
            report,
            repeats_values=sink.repeats_values,
            items_left_out=left,
            set_aside=len(aside),
            rejects=aside[:_SHOWN],
        )


def _write_archive(whole: Source, folder: Path, clock: Clock, options: Options) -> Scan:
    source = included(whole, options)
    with ArchiveWriter(folder) as writer, Spool() as spool, StoreMove(source, options, clock) as store:
        found = scan(source, spool, clock, Findings(), writer)
        threads = found.fingerprint
        store.join(found, ItemFindings(), writer.store() if "store" in options.include else None)
        writer.finish(source.label, threads, found.totals, store.totals, store.fingerprint)
        return found


def _require_same(whole: Source, folder: Path, clock: Clock, options: Options) -> None:
    """An archive that is there already is used if it holds what the source holds now."""
    source = included(whole, options)
    with ArchiveSource(folder) as stored, Spool() as spool, StoreMove(source, options, clock) as store:
        found = scan(source, spool, clock, Findings())
        store.join(found, ItemFindings())
        if found.fingerprint != stored.manifest.content:
            raise ArchiveError(
                f"archive {folder} exists and holds something else than {source.label}",
                hint="name another folder",
            )


def _report(
    source: str,
    target: str,
    found: Scan,
    clock: Clock,
    copied: Copied | None = None,
    *,
    verified: bool = False,
) -> Report:
    return Report(
        source=source,
        target=target,
        fingerprint=found.fingerprint,
        run_id=copied.run_id if copied else None,
        totals=(copied.totals if copied else None) or found.totals,
        batches_written=copied.written if copied else 0,
        batches_skipped=copied.skipped if copied else 0,
        already_done=copied.already_done if copied else False,
        verified=verified,
        conflicts=dict(Counter(copied.actions.values())) if copied else {},
        seconds=clock.seconds(),
        phases=clock.phases,
        findings=found.findings,
        sizes=found.sizes,
        store=found.store.totals if found.store else StoreTotals(),
    )
