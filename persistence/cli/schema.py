"""``persistence setup`` and ``persistence schema ...``: the tables of one database."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from persistence.cli.arguments import DsnOption, Json, required_provider, wait_for
from persistence.cli.console import OK, emit, rows
from persistence.errors import SchemaError

if TYPE_CHECKING:
    from persistence.contract import Provider

app = typer.Typer(help="Look after the tables: check, history, upgrade, downgrade, SQL for administrators.")

REVISION_HELP = "A revision (see history), head for the newest, base for nothing."


def setup(
    dsn: DsnOption = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Also make again what was made once and is gone: an index, an empty table."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Make the tables that are missing, LangGraph's and ours. Safe to repeat, and at the same moment."""
    from persistence import schema

    provider = required_provider(dsn)
    wait_for(provider)
    report = schema.setup(provider, repair=repair)
    made = [str(change) for change in report.changes]
    emit(
        {"dsn": provider.dsn.masked, "revision": report.revision, "changes": made},
        [*(f"was: {change}" for change in made), f"ready: {provider.dsn.masked}"],
    )
    return OK


@app.command()
def check(dsn: DsnOption = None, as_json: Json = False) -> int:
    """Compare the tables with what the installed savers need; changes nothing. Exit code 4 if they differ."""
    from persistence import schema

    provider = required_provider(dsn)
    differences = schema.check(provider)
    document = {
        "dsn": provider.dsn.masked,
        "ok": not differences,
        "differences": [asdict(difference) for difference in differences],
    }
    lines = [str(d) + (f" (mend: {d.mend})" if d.mend else "") for d in differences]
    emit(document, lines or [f"the tables are as needed: {provider.dsn.masked}"])
    return SchemaError.exit_code if differences else OK


@app.command()
def history(dsn: DsnOption = None, as_json: Json = False) -> int:
    """List the migrations of our own tables, and which of them the database has."""
    from persistence import schema

    provider = required_provider(dsn)
    revisions = schema.history(provider)
    emit(
        {"dsn": provider.dsn.masked, "revisions": [asdict(revision) for revision in revisions]},
        [rows((r.revision, "applied" if r.applied else "pending", r.summary) for r in revisions)],
    )
    return OK


@app.command()
def upgrade(
    revision: Annotated[str, typer.Argument(help=REVISION_HELP)] = "head",
    dsn: DsnOption = None,
    as_json: Json = False,
) -> int:
    """Bring our own tables up to REVISION. LangGraph's tables stay as they are."""
    from persistence import schema

    provider = required_provider(dsn)
    return _moved(provider, schema.upgrade(provider, revision))


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help=REVISION_HELP)],
    dsn: DsnOption = None,
    as_json: Json = False,
) -> int:
    """Take our own tables back to REVISION; what later revisions kept is lost. LangGraph's tables stay."""
    from persistence import schema

    provider = required_provider(dsn)
    return _moved(provider, schema.downgrade(provider, revision))


@app.command()
def sql(
    since: Annotated[
        str, typer.Option("--from", metavar="REVISION", help="The revision that the database has.")
    ] = "base",
    until: Annotated[str, typer.Option("--to", metavar="REVISION", help="The revision to reach.")] = "head",
    dsn: DsnOption = None,
    as_json: Json = False,
) -> int:
    """Print the statements that setup would run, for an administrator to run by hand."""
    from persistence import schema

    provider = required_provider(dsn)
    script = schema.sql(provider, since, until)
    emit({"dsn": provider.dsn.masked, "sql": script}, [script.rstrip("\n")])
    return OK


def _moved(provider: Provider, revision: str | None) -> int:
    emit(
        {"dsn": provider.dsn.masked, "revision": revision},
        [rows([("database", provider.dsn.masked), ("own tables", revision or "none")])],
    )
    return OK
