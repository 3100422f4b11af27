"""``persistence inspect``: what an archive or a database holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from persistence.cli.arguments import Json, read_dsn_or_path
from persistence.cli.console import OK, emit, rows
from persistence.cli.planning import found
from persistence.cli.progress import progress

if TYPE_CHECKING:
    from persistence.transfer import Inspection


def inspect(
    where: Annotated[
        str, typer.Argument(metavar="WHERE", help="The path of an archive, a DSN, or env:NAME for one.")
    ],
    threads: Annotated[
        bool, typer.Option("--threads", help="List the threads: id, checkpoints, writes, bytes, digest.")
    ] = False,
    thread: Annotated[
        str | None, typer.Option("--thread", metavar="ID", help="List the checkpoints of this thread.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="List so many at most (100).")
    ] = 100,
    as_json: Json = False,
) -> int:
    """Say what an archive or a database holds, without moving anything.

    Nothing in it is executed. `persistence verify ARCHIVE` says whether an archive is intact.
    """
    from persistence import transfer

    if threads and thread is not None:
        raise typer.BadParameter("list the threads, or the checkpoints of one", param_hint="--thread")
    side = read_dsn_or_path(where)
    with progress() as show:
        inspection = transfer.inspect(side, threads=threads, thread=thread, limit=limit, progress=show)
    emit(json.loads(inspection.to_json()), _lines(inspection))
    return OK


def _lines(inspection: Inspection) -> Iterator[str]:
    from persistence.transfer.report import amount

    if (listed := inspection.threads) is not None:
        head = ("thread", "checkpoints", "writes", "size", "digest")
        yield rows(
            [
                head,
                *(
                    (
                        t.thread_id,
                        f"{t.checkpoints:,}",
                        f"{t.writes:,}",
                        amount(t.bytes),
                        t.digest or "not readable",
                    )
                    for t in listed
                ),
            ]
        )
    elif (checkpoints := inspection.checkpoints) is not None:
        yield rows(
            [
                ("namespace", "checkpoint", "parent", "made", "source", "step", "channels", "size", "writes"),
                *(
                    (
                        *(c.checkpoint_ns, c.checkpoint_id, c.parent_id or "", c.made, c.source, c.step),
                        *(c.channels, amount(c.bytes), c.writes),
                    )
                    for c in checkpoints
                ),
            ]
        )
    else:
        yield rows(_overview(inspection))
        yield from found(inspection.findings)
    if inspection.more:
        yield "... and more: --limit says how many are listed"


def _overview(inspection: Inspection) -> Iterator[tuple[str, object]]:
    from persistence.transfer.report import amount

    totals = inspection.totals
    if (manifest := inspection.manifest) is not None:
        parts = manifest["parts"]
        yield "archive", inspection.source.removeprefix("archive ")
        yield "format", f"{manifest['format']}, version {manifest['version']}"
        yield "made", f"{manifest['created']} by {manifest['creator']}"
        yield "from", manifest["source"]
        yield "fingerprint", manifest["fingerprint"]
        compressed = sum(part["bytes"] for part in parts)
        yield "parts", f"{len(parts):,}, {amount(compressed)} compressed"
    else:
        yield "database", inspection.source
    if totals is not None:
        yield "threads", f"{totals.threads:,}"
        yield "checkpoints", f"{totals.checkpoints:,}"
        yield "pending writes", f"{totals.writes:,}"
        yield "channel values", f"{totals.values:,}"
        yield "size", amount(totals.bytes)
