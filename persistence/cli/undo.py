"""``persistence runs``, ``rejects``, ``retry-rejects`` and ``undo``: what was moved into a database."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from persistence.cli.arguments import DsnOption, Json, Source, read_dsn, required_provider
from persistence.cli.choices import AllowPickle, Decrypt
from persistence.cli.console import OK, emit, printable, rows
from persistence.cli.progress import progress
from persistence.cli.transfer import summary

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The run's id, its beginning, or 'last'; `persistence runs` lists the runs."
    ),
]


def runs(dsn: DsnOption = None, as_json: Json = False) -> int:
    """List the transfers into a database, newest first."""
    from persistence import transfer

    provider = required_provider(dsn)
    found = transfer.runs(provider.dsn)
    document = [
        {
            "run_id": run.run_id,
            "state": run.state,
            "source": run.options.get("source"),
            "checkpoints": (run.totals or {}).get("checkpoints"),
            "verified": bool((run.totals or {}).get("verified")),
        }
        for run in found
    ]
    lines: list[tuple[object, ...]] = [
        (run["run_id"], run["state"], "verified" if run["verified"] else "not verified", run["source"])
        for run in document
    ]
    emit(
        {"dsn": provider.dsn.masked, "runs": document},
        [rows(lines) if lines else "nothing was moved into it"],
    )
    return OK


def rejects(run: Run, dsn: DsnOption = None, as_json: Json = False) -> int:
    """List the rows that a transfer set aside, and why."""
    from persistence import transfer

    found = transfer.rejects(run, required_provider(dsn).dsn)
    document = [{"thread_id": one.thread_id, "place": one.place, "reason": one.reason} for one in found]
    emit(
        {"rejects": document},
        [printable(f"{one.place}: {one.reason}") for one in found] or ["nothing was set aside"],
    )
    return OK


def retry_rejects(
    run: Run,
    source: Source,
    dsn: DsnOption = None,
    allow_pickle: AllowPickle = False,
    decrypt: Decrypt = False,
    as_json: Json = False,
) -> int:
    """Move what a transfer from SOURCE set aside, once the cause is mended."""
    from persistence import transfer

    left, right = read_dsn(source), required_provider(dsn).dsn
    options = transfer.Options(allow_pickle=allow_pickle, decrypt=decrypt)
    with progress() as show:
        report = transfer.retry_rejects(run, left, right, progress=show, options=options)
    return summary("moved", report)


def undo(
    run: Run,
    dsn: DsnOption = None,
    later: Annotated[
        Literal["refuse", "keep", "remove"],
        typer.Option(
            "--later",
            metavar="refuse|keep|remove",
            help="Where later work builds on the run: refuse, keep the thread, or remove it all.",
        ),
    ] = "refuse",
    as_json: Json = False,
) -> int:
    """Remove exactly what one transfer inserted, and nothing that was written later."""
    from persistence import transfer

    undone = transfer.undo(run, required_provider(dsn).dsn, later=later)
    pairs: list[tuple[object, ...]] = [
        ("run", undone.run_id),
        ("target", undone.target),
        ("threads", f"{undone.threads:,}"),
        *(
            [("items", f"{undone.items:,} of the store; what these replaced is not back")]
            if undone.items
            else []
        ),
        ("checkpoints", f"{undone.checkpoints:,} removed"),
        ("pending writes", f"{undone.writes:,} removed"),
    ]
    told = {
        "kept": (undone.kept_threads, "threads left as they are, because later work builds on them"),
        "later work": (undone.later_removed, "rows removed with what they built on"),
        "changed": (undone.changed, "rows left, because they were changed since"),
        "replaced": (undone.replaced_threads, "threads had been replaced; what they held before is not back"),
    }
    pairs += [(name, f"{count:,} {what}") for name, (count, what) in told.items() if count]
    if undone.followed is not None:
        how = f"`persistence unseal {undone.followed}` lets it be written again, if a cut-over has sealed it"
        pairs.append(("source", how))
    emit(json.loads(undone.to_json()), [rows([*pairs, ("result", "undone")])])
    return OK
