"""``persistence runs`` and ``persistence undo``: what was moved into a database, and taking it out again."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from persistence.cli.arguments import DsnOption, Json, required_provider
from persistence.cli.console import OK, emit, rows


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


def undo(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="The run's id, its beginning, or 'last'; `persistence runs` lists the runs."
        ),
    ],
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
        *([("items", f"{undone.items:,} of the store")] if undone.items else []),
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
    emit(json.loads(undone.to_json()), [rows([*pairs, ("result", "undone")])])
    return OK
