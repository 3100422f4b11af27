"""``persistence migrate``, ``export``, ``import`` and ``verify``: threads on the move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persistence.cli.arguments import Archive, Json, Source, Target, read_dsn, read_dsn_or_path
from persistence.cli.choices import (
    Match,
    MaxMbps,
    NewerThan,
    OlderThan,
    OnConflict,
    Threads,
    Where,
    selection,
)
from persistence.cli.console import OK, emit, printable, rows
from persistence.cli.progress import amount, progress
from persistence.errors import VerificationError

if TYPE_CHECKING:
    from persistence.transfer.report import Report

_DONE = {"skip": "skipped", "replace": "replaced", "merge": "merged"}
SIDE_HELP = "A DSN, env:NAME, or the path of an archive."

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
    on_conflict: OnConflict = "error",
    max_mbps: MaxMbps = None,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> int:
    """Move every thread from SOURCE to TARGET and compare both by content.

    SOURCE is only read. Run again after an interruption, it continues where it stopped.
    """
    from persistence import transfer

    left, right = read_dsn(source), read_dsn(target)
    select = selection(thread, match, where, newer_than, older_than)
    options = transfer.Options(select=select, on_conflict=on_conflict, max_mbps=max_mbps)
    with progress() as show:
        report = transfer.migrate(
            left, right, archive=archive, verify=not no_verify, progress=show, options=options
        )
    return _summary("migrated", report)


def export(
    source: Source,
    archive: Archive,
    thread: Threads = None,
    match: Match = None,
    where: Where = None,
    newer_than: NewerThan = None,
    older_than: OlderThan = None,
    as_json: Json = False,
) -> int:
    """Write every thread of SOURCE into a new archive with checksums. SOURCE is only read."""
    from persistence import transfer

    left = read_dsn(source)
    options = transfer.Options(select=selection(thread, match, where, newer_than, older_than))
    with progress() as show:
        report = transfer.export(left, archive, progress=show, options=options)
    return _summary("exported", report)


def import_(
    archive: Archive,
    target: Target,
    thread: Threads = None,
    match: Match = None,
    where: Where = None,
    newer_than: NewerThan = None,
    older_than: OlderThan = None,
    on_conflict: OnConflict = "error",
    max_mbps: MaxMbps = None,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> int:
    """Write every thread of ARCHIVE into TARGET. Run again after an interruption, it continues."""
    from persistence import transfer

    right = read_dsn(target)
    select = selection(thread, match, where, newer_than, older_than)
    options = transfer.Options(select=select, on_conflict=on_conflict, max_mbps=max_mbps)
    with progress() as show:
        report = transfer.import_(archive, right, verify=not no_verify, progress=show, options=options)
    return _summary("imported", report)


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
    as_json: Json = False,
) -> int:
    """Compare two sides by content, or check an archive by itself. Exit code 7 if they differ."""
    from persistence import transfer

    first = read_dsn_or_path(left)
    select = selection(thread, match, where, newer_than, older_than)
    with progress() as show:
        if right is None:
            if not isinstance(first, Path):
                raise typer.BadParameter(
                    "a database needs a second side to be compared with", param_hint="RIGHT"
                )
            if not select.everything:
                raise typer.BadParameter(
                    "an archive by itself is checked as a whole; to select threads, name a second side"
                )
            return _summary("intact", transfer.verify_archive(first, progress=show))
        verdict = transfer.verify(first, read_dsn_or_path(right), progress=show, select=select)
    document = json.loads(verdict.to_json())
    emit(
        document,
        [
            *(printable(str(difference)) for difference in verdict.differences),
            "equal" if verdict.equal else "the two sides differ",
        ],
    )
    return OK if verdict.equal else VerificationError.exit_code


def _summary(done: str, report: Report) -> int:
    totals = report.totals
    sides = [("source", report.source), ("target", report.target)]
    pairs: list[tuple[str, object]] = [
        *(sides if report.source != report.target else [("checked", report.source)]),
        ("threads", f"{totals.threads:,}"),
        ("checkpoints", f"{totals.checkpoints:,}"),
        ("pending writes", f"{totals.writes:,}"),
        ("channel values", f"{totals.values:,} stored, {totals.values_referenced:,} referenced"),
        ("size", f"{amount(totals.bytes)}, {amount(totals.bytes_saved)} less than with copies"),
        ("time", f"{report.seconds:.1f} s"),
        *([("run", report.run_id)] if report.run_id else []),
        *(
            [("already there", f"{sum(report.conflicts.values()):,} threads, {', '.join(there)}")]
            if (there := [f"{count:,} {_DONE[action]}" for action, count in report.conflicts.items()])
            else []
        ),
        ("result", _result(done, report)),
    ]
    emit(json.loads(report.to_json()), [rows(pairs)])
    return OK


def _result(done: str, report: Report) -> str:
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
