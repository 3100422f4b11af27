"""``persistence migrate``, ``export``, ``import`` and ``verify``: threads on the move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from persistence.cli.arguments import Archive, Json, Source, Target, read_dsn, read_dsn_or_path
from persistence.cli.choices import (
    AllowPickle,
    Decrypt,
    Include,
    Match,
    MaxMbps,
    NewerThan,
    OlderThan,
    OnConflict,
    OnReject,
    Threads,
    Where,
    WithoutVectors,
    Workers,
    parts,
    selection,
)
from persistence.cli.console import OK, emit, left_out, printable, rows
from persistence.cli.follow import Follow, FollowInterval, keep_up
from persistence.cli.planning import AgainstTarget, DryRun, check_flags, found, planned
from persistence.cli.reporting import ReportPath, running
from persistence.errors import TransferError, VerificationError

if TYPE_CHECKING:
    from persistence import transfer
    from persistence.transfer import ArchiveCheck
    from persistence.transfer.report import Report

_DONE = {"skip": "skipped", "replace": "replaced", "merge": "merged"}
SIDE_HELP = "A DSN, env:NAME, or the path of an archive."

DEPTHS = ("checksums", "digests", "semantic")

NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare both sides by content afterwards.")
]


def migrate(
    source: Source,
    target: Target,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", metavar="PATH", help="Go through a new archive at PATH, which is kept."),
    ] = None,
    thread: Threads = None,
    match: Match = None,
    where: Where = None,
    newer_than: NewerThan = None,
    older_than: OlderThan = None,
    include: Include = None,
    without_vectors: WithoutVectors = False,
    on_conflict: OnConflict = "error",
    on_reject: OnReject = "stop",
    max_mbps: MaxMbps = None,
    workers: Workers = None,
    allow_pickle: AllowPickle = False,
    decrypt: Decrypt = False,
    no_verify: NoVerify = False,
    dry_run: DryRun = False,
    against_target: AgainstTarget = False,
    report: ReportPath = None,
    follow: Follow = False,
    follow_interval: FollowInterval = 5.0,
    as_json: Json = False,
) -> int:
    """Move every thread from SOURCE to TARGET and compare both by content.

    SOURCE is only read. Run again after an interruption, it continues where it stopped. With --follow it
    goes on until Ctrl-C or SIGTERM, and catches up with what is written to SOURCE; `persistence cut-over`
    ends that.
    """
    from persistence import transfer

    left, right = read_dsn(source), read_dsn(target)
    select = selection(thread, match, where, newer_than, older_than)
    options = transfer.Options(
        select=select,
        on_conflict=on_conflict,
        on_reject=on_reject,
        allow_pickle=allow_pickle,
        decrypt=decrypt,
        max_mbps=max_mbps,
        workers=workers,
        include=parts(include, select),
        vectors=not without_vectors,
    )
    check_flags(dry_run=dry_run, against_target=against_target)
    if follow:
        followed = transfer.Options(include=options.include, vectors=options.vectors)
        if options != followed or any((archive, no_verify, dry_run, report)):
            raise typer.BadParameter(
                "it moves all threads or items, compares them, and takes no other options than"
                " --follow-interval, --include and --without-vectors",
                param_hint="--follow",
            )
        return keep_up(
            left, right, follow_interval, options.include if include else None, vectors=followed.vectors
        )
    if dry_run:
        return planned(
            "migrate", left, right, options, report, archive=archive, against_target=against_target
        )
    with running("migrate", report, source=left, target=right) as run:
        done = transfer.migrate(
            left, right, archive=archive, verify=not no_verify, progress=run.show, options=options
        )
        run.ended("in part" if done.set_aside else "succeeded", done.to_json())
    return summary("migrated", done)


def export(
    source: Source,
    archive: Archive,
    thread: Threads = None,
    match: Match = None,
    where: Where = None,
    newer_than: NewerThan = None,
    older_than: OlderThan = None,
    allow_pickle: AllowPickle = False,
    decrypt: Decrypt = False,
    include: Include = None,
    without_vectors: WithoutVectors = False,
    dry_run: DryRun = False,
    report: ReportPath = None,
    as_json: Json = False,
) -> int:
    """Write every thread of SOURCE into a new archive with checksums. SOURCE is only read."""
    from persistence import transfer

    left = read_dsn(source)
    select = selection(thread, match, where, newer_than, older_than)
    options = transfer.Options(
        select=select,
        allow_pickle=allow_pickle,
        decrypt=decrypt,
        include=parts(include, select),
        vectors=not without_vectors,
    )
    if dry_run:
        return planned("export", left, archive, options, report)
    with running("export", report, source=left, target=archive) as run:
        done = transfer.export(left, archive, progress=run.show, options=options)
        run.ended("succeeded", done.to_json())
    return summary("exported", done)


def import_(
    archive: Archive,
    target: Target,
    thread: Threads = None,
    match: Match = None,
    where: Where = None,
    newer_than: NewerThan = None,
    older_than: OlderThan = None,
    include: Include = None,
    without_vectors: WithoutVectors = False,
    on_conflict: OnConflict = "error",
    on_reject: OnReject = "stop",
    max_mbps: MaxMbps = None,
    workers: Workers = None,
    allow_pickle: AllowPickle = False,
    decrypt: Decrypt = False,
    no_verify: NoVerify = False,
    dry_run: DryRun = False,
    against_target: AgainstTarget = False,
    report: ReportPath = None,
    as_json: Json = False,
) -> int:
    """Write every thread of ARCHIVE into TARGET. Run again after an interruption, it continues."""
    from persistence import transfer

    right = read_dsn(target)
    select = selection(thread, match, where, newer_than, older_than)
    options = transfer.Options(
        select=select,
        on_conflict=on_conflict,
        on_reject=on_reject,
        allow_pickle=allow_pickle,
        decrypt=decrypt,
        max_mbps=max_mbps,
        workers=workers,
        include=parts(include, select),
        vectors=not without_vectors,
    )
    check_flags(dry_run=dry_run, against_target=against_target)
    if dry_run:
        return planned("import", archive, right, options, report, against_target=against_target)
    with running("import", report, source=archive, target=right) as run:
        done = transfer.import_(archive, right, verify=not no_verify, progress=run.show, options=options)
        run.ended("in part" if done.set_aside else "succeeded", done.to_json())
    return summary("imported", done)


def verify(
    left: Annotated[str, typer.Argument(metavar="LEFT", help=SIDE_HELP)],
    right: Annotated[
        str | None,
        typer.Argument(
            metavar="RIGHT", help=f"{SIDE_HELP} Without it LEFT is an archive, checked by itself."
        ),
    ] = None,
    thread: Threads = None,
    match: Match = None,
    where: Where = None,
    newer_than: NewerThan = None,
    older_than: OlderThan = None,
    allow_pickle: AllowPickle = False,
    include: Include = None,
    without_vectors: WithoutVectors = False,
    report: ReportPath = None,
    depth: Annotated[
        str,
        typer.Option(
            metavar="DEPTH",
            help="digests: the content of all rows. semantic: what LangGraph's own savers return; this"
            " deserialises, so classes of the application are imported. checksums: of an archive by itself.",
        ),
    ] = "digests",
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="SIZE", help="Only a share of the threads (5%), or so many (100)."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="NUMBER", help="Draw the sample of that seed again.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            help="Keep the progress in FILE; run again after an interruption, it goes on there.",
        ),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> int:
    """Compare two sides by content, or check an archive by itself. Exit code 7 if they differ."""
    from persistence import transfer

    if depth not in DEPTHS:
        raise typer.BadParameter(f"{depth!r} is none of {', '.join(DEPTHS)}", param_hint="--depth")
    check = transfer.Check(depth=cast("transfer.Depth", depth), sample=sample, seed=seed, resume=resume)
    first = read_dsn_or_path(left)
    select = selection(thread, match, where, newer_than, older_than)
    if right is None:
        if not isinstance(first, Path):
            raise typer.BadParameter("a database needs a second side to be compared with", param_hint="RIGHT")
        if not select.everything:
            raise typer.BadParameter(
                "an archive by itself is checked in whole or by --sample; to select threads, name two sides"
            )
        with running("verify", report, source=first) as run:
            done = transfer.verify_archive(first, progress=run.show, check=check)
            run.ended("intact", done.to_json())
        return _checked(done)
    second = read_dsn_or_path(right)
    with running("verify", report, left=first, right=second) as run:
        verdict = transfer.verify(
            first,
            second,
            progress=run.show,
            select=select,
            check=check,
            include=parts(include, select),
            vectors=not without_vectors,
            allow_pickle=allow_pickle,
            workers=workers,
        )
        run.ended("equal" if verdict.equal else "different", verdict.to_json())
    document = json.loads(verdict.to_json())
    lines = [printable(str(found)) for found in (*verdict.differences, *verdict.item_differences)]
    if any(verdict.items_left_out):
        here, there = verdict.items_left_out
        lines.append(left_out(here, f"on the left and {there:,} on the right are not compared"))
    emit(document, [*lines, verdict.summary()])
    return OK if verdict.equal else VerificationError.exit_code


def _checked(check: ArchiveCheck) -> int:
    from persistence.transfer.report import amount

    totals = check.totals
    pairs: list[tuple[str, object]] = [
        ("checked", check.archive),
        ("threads", f"{totals.threads:,}"),
        ("checkpoints", f"{totals.checkpoints:,}"),
        ("pending writes", f"{totals.writes:,}"),
        ("channel values", f"{totals.values:,}"),
        ("size", amount(totals.bytes)),
        *([("store", f"{check.items:,} of {check.total_items:,} items")] if check.total_items else []),
        ("time", f"{check.seconds:.1f} s"),
        ("result", check.summary()),
    ]
    emit(json.loads(check.to_json()), [rows(pairs)])
    return OK


def summary(done: str, report: Report) -> int:
    """Print the outcome of a transfer; gives the exit code."""
    from persistence.transfer.report import amount

    totals = report.totals
    sides = [("source", report.source), ("target", report.target)]
    size = f"{amount(totals.bytes)}, {amount(report.bytes_saved)} less than with copies"
    if report.repeats_values:
        size = f"{amount(totals.bytes_referenced)} with copies, {amount(totals.bytes)} moved"
    pairs: list[tuple[str, object]] = [
        *sides,
        ("threads", f"{totals.threads:,}"),
        ("checkpoints", f"{totals.checkpoints:,}"),
        ("pending writes", f"{totals.writes:,}"),
        ("channel values", f"{totals.values:,} stored, {totals.values_referenced:,} referenced"),
        ("size", size),
        *_store(report),
        ("time", f"{report.seconds:.1f} s"),
        *([("run", report.run_id)] if report.run_id else []),
        *(
            [("already there", f"{sum(report.conflicts.values()):,} threads, {', '.join(there)}")]
            if (there := [f"{count:,} {_DONE[action]}" for action, count in report.conflicts.items()])
            else []
        ),
        ("result", _result(done, report)),
    ]
    aside = [printable(f"set aside: {one}") for one in report.rejects]
    emit(json.loads(report.to_json()), [rows(pairs), *found(report.findings), *aside])
    return TransferError.exit_code if report.set_aside else OK


def _store(report: Report) -> list[tuple[str, object]]:
    from persistence.transfer.report import amount

    store = report.store
    if report.items_left_out:
        return [("store", left_out(report.items_left_out, "do not move"))]
    if not store.items:
        return []
    kept = f"; the target keeps its own {store.kept:,}" if store.kept else ""
    moved = f"{store.items:,} items in {store.namespaces:,} namespaces, {store.vectors:,} vectors"
    return [("store", f"{moved}, {amount(store.bytes)}{kept}")]


def _result(done: str, report: Report) -> str:
    if report.set_aside:
        how = f"in part: {report.set_aside:,} rows are set aside, which `persistence rejects` lists"
        return f"{done} {how}; {'the rest is verified' if report.verified else 'not verified'}"
    if report.already_done:
        verified = " and verified" if report.verified else ", not verified"
        return f"nothing to do: {done}{verified} before; `persistence verify` compares again"
    verified = ", verified by content" if report.verified else ""
    resumed = (
        f", {report.batches_skipped} batches were there from an interrupted run"
        if report.batches_skipped
        else ""
    )
    return f"{done}{verified}{resumed}"
