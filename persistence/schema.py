"""Setup, drift check and migrations: the tables that LangGraph and this package need in a database.

:func:`setup` runs LangGraph's own setup for its tables, then ours with Alembic, then the drift check. On a
database where nothing is to do it reads the catalogue and is done: neither SQLAlchemy nor Alembic is
imported, no DDL is sent (a role without CREATE rights may do it), no lock is taken.

Works on any provider with :attr:`Capability.TABLES`; one without has no tables and nothing to set up.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from persistence.contract import Capability, Provider, Tables, TableShape
from persistence.dsn import mask_secrets
from persistence.errors import SchemaError

SETUP = "persistence setup"
REPAIR = "persistence setup --repair"
UPGRADE = "persistence schema upgrade"
_REMAKE = "persistence schema downgrade base` and `persistence schema upgrade"

# What the migrations up to head make; tests/schema compares it with what they really make.
OWN_TABLES: Mapping[str, TableShape] = {
    "persistence_transfers": TableShape(
        frozenset(
            {
                "run_id",
                "source_fingerprint",
                "target_identity",
                "started_at",
                "finished_at",
                "state",
                "options",
                "totals",
            }
        ),
        ("run_id",),
    ),
    "persistence_transfer_batches": TableShape(
        frozenset(
            {
                "run_id",
                "batch_no",
                "thread_id",
                "digest",
                "checkpoints",
                "writes",
                "blobs",
                "bytes",
                "committed_at",
            }
        ),
        ("run_id", "batch_no"),
    ),
    "persistence_canary": TableShape(frozenset({"id", "beat"}), ("id",)),
    "persistence_transfer_keys": TableShape(
        frozenset({"run_id", "batch_no", "keys"}), ("run_id", "batch_no")
    ),
    "persistence_transfer_threads": TableShape(
        frozenset({"run_id", "thread_id", "action"}), ("run_id", "thread_id")
    ),
    "persistence_transfer_rejects": TableShape(
        frozenset({"run_id", "reject_no", "thread", "place", "reason", "raw"}), ("run_id", "reject_no")
    ),
    "persistence_followed": TableShape(
        frozenset({"run_id", "thread_id", "stamp", "checkpoints", "writes"}), ("run_id", "thread_id")
    ),
    "persistence_followed_keys": TableShape(
        frozenset({"run_id", "thread_id", "part_no", "forgets", "keys"}), ("run_id", "thread_id", "part_no")
    ),
    "persistence_followed_items": TableShape(
        frozenset({"run_id", "prefix", "key", "stamp", "mark", "updated_at", "expires_at"}),
        ("run_id", "prefix", "key"),
    ),
}

_logger = logging.getLogger(__name__)
# Alembic keeps the running environment in module globals: one run at a time in a process.
_alembic_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which a database is not as the savers need it.

    Attributes:
        table: The table it is about.
        kind: What sort of thing is missing or different.
        detail: One line for a person.
        mend: The command that mends it, or ``None`` where none can.
    """

    table: str
    kind: Literal["table", "column", "primary key", "index", "migration"]
    detail: str
    mend: str | None

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True, slots=True)
class SetupReport:
    """What :func:`setup` found and did.

    Attributes:
        changes: What was missing and was made; empty where nothing was to do.
        revision: The revision of our own tables now, ``None`` on a backend without tables.
    """

    changes: tuple[Difference, ...]
    revision: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Revision:
    """One migration of our own tables."""

    revision: str
    follows: str | None
    summary: str
    applied: bool


def setup(provider: Provider, *, repair: bool = False) -> SetupReport:
    """Make the tables that are missing, LangGraph's and ours, then check all of them.

    Any number of processes may do this at once.

    Args:
        provider: The database.
        repair: Also make again what LangGraph's record says was made and is not there: a dropped index, a
            lost table. Opening a database does not do that by itself, because an empty table in place
            of a lost one hides the loss.

    Returns:
        What was changed.

    Raises:
        SchemaError: The database is newer than this version, the role may not create what is
            missing, or something still differs afterwards; the hint names what to do.
        ConnectError: The database does not answer.
    """
    if Capability.TABLES not in provider.capabilities:
        return SetupReport((), None)
    with provider.tables() as tables:
        found = _differences(provider, tables)
        if not found:
            return SetupReport((), head())
        with tables.setup_lock():
            # Another process may have done it while this one waited.
            found = _differences(provider, tables)
            left = _make(provider, tables, found, repair=repair) if found else []
    if left:
        raise _drift(provider, left, repaired=repair)
    if found:
        _logger.info(
            "set up %s, where: %s",
            provider.dsn,
            "; ".join(map(str, found)),
            extra={"dsn": str(provider.dsn), "tables": [difference.table for difference in found]},
        )
    return SetupReport(tuple(found), head())


def check(provider: Provider) -> list[Difference]:
    """Compare the database with what the installed savers and this version need; changes nothing.

    Raises:
        SchemaError: Our own tables are newer than this version, or may not be read.
        ConnectError: The database does not answer.
    """
    if Capability.TABLES not in provider.capabilities:
        return []
    return look(provider)[0]


def look(provider: Provider) -> tuple[list[Difference], str | None]:
    """As :func:`check`, together with the revision of our own tables, by one connection."""
    with provider.tables() as tables:
        return _differences(provider, tables), tables.own_revision()


def require(provider: Provider) -> None:
    """As :func:`check`, but a difference is an error.

    Raises:
        SchemaError: Says what differs and which command mends it.
    """
    if differences := check(provider):
        raise _drift(provider, differences, repaired=False)


def head() -> str:
    """The newest revision this version knows, from the file names; imports nothing."""
    return _revisions()[-1]


def current(provider: Provider) -> str | None:
    """The revision of our own tables in the database, ``None`` where there is none yet."""
    with provider.tables() as tables:
        return tables.own_revision()


def history(provider: Provider) -> list[Revision]:
    """All migrations of our own tables, oldest first, and which of them the database has."""
    from alembic.script import ScriptDirectory

    at = current(provider)
    scripts = ScriptDirectory(str(migrations_folder()))
    return [
        Revision(
            script.revision,
            _first(script.down_revision),
            script.doc,
            at is not None and script.revision <= at,
        )
        for script in reversed(list(scripts.walk_revisions()))
    ]


def upgrade(provider: Provider, revision: str = "head") -> str | None:
    """Bring our own tables up to ``revision``; LangGraph's stay as they are.

    Returns:
        The revision afterwards.
    """
    return _move(provider, revision, "upgrade")


def downgrade(provider: Provider, revision: str) -> str | None:
    """Take our own tables back to ``revision``, or to nothing at all with ``"base"``.

    LangGraph's tables stay as they are. What later revisions kept in their tables and columns is lost.

    Returns:
        The revision afterwards, ``None`` for nothing.
    """
    return _move(provider, revision, "downgrade")


def sql(provider: Provider, from_revision: str = "base", to_revision: str = "head") -> str:
    """The statements that setup would run, for somebody else to run them; needs no connection.

    From ``"base"`` LangGraph's own statements come first. ``from_revision`` newer than
    ``to_revision`` gives the way down.

    Returns:
        A script for ``psql`` or ``sqlite3``.
    """
    start, end = _known(from_revision), _known(to_revision)
    with provider.tables() as tables:
        parts = []
        if start is None:
            parts += [
                "-- LangGraph's tables. Not in one transaction: CREATE INDEX CONCURRENTLY refuses that."
                if tables.dialect == "postgresql"
                else "-- LangGraph's tables.",
                tables.langgraph_sql(),
                "",
            ]
        parts.append(f"-- Our own tables, from {start or 'nothing'} to {end or 'nothing'}.")
        if start != end:
            down = end is None or (start is not None and end < start)
            output = io.StringIO()
            _alembic(
                provider,
                tables,
                "downgrade" if down else "upgrade",
                f"{start or 'base'}:{end or 'base'}",
                output=output,
            )
            parts.append(output.getvalue().strip())
    return "\n".join(parts) + "\n"


def own_sql() -> str:
    """What makes our own tables in an empty Postgres database, to be run within a transaction."""
    return (migrations_folder() / "head.sql").read_text()


@cache
def migrations_folder() -> Path:
    """Inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


@cache
def _revisions() -> list[str]:
    """All known revisions, oldest first: ``NNNN_what.py`` holds revision ``NNNN``."""
    files = (migrations_folder() / "versions").glob("[0-9][0-9][0-9][0-9]_*.py")
    return sorted(path.name[:4] for path in files)


def _known(revision: str) -> str | None:
    """A revision that a person typed, as it is stored; ``None`` is the state before the first."""
    if revision == "base":
        return None
    wanted = head() if revision == "head" else revision
    if wanted not in _revisions():
        known = ", ".join(["base", *_revisions(), "head"])
        raise SchemaError(f"there is no revision {revision!r}", hint=f"known are {known}")
    return wanted


def _differences(provider: Provider, tables: Tables) -> list[Difference]:
    observed = tables.observed()
    pending = tables.langgraph_pending()
    # Where nothing is pending LangGraph's own setup sees nothing to do, whatever is missing.
    found = _compare(tables.required, observed, mend=SETUP if pending else REPAIR)
    found += [
        Difference(table, "migration", detail, SETUP)
        for table, detail in pending.items()
        if table in observed
    ]
    revision = tables.own_revision()
    if revision == head():
        return found + _compare(OWN_TABLES, observed, mend=_REMAKE)
    _refuse_newer(provider, revision)
    at = f"at revision {revision}" if revision else "not there"
    return [
        *found,
        Difference(
            "persistence_alembic_version",
            "migration",
            f"our own tables are {at}, revision {head()} is needed",
            # Setup does this too.
            next((difference.mend for difference in found if difference.mend), UPGRADE),
        ),
    ]


def _compare(
    required: Mapping[str, TableShape], observed: Mapping[str, TableShape], *, mend: str
) -> list[Difference]:
    found: list[Difference] = []
    for table, need in required.items():
        have = observed.get(table)
        if have is None:
            found.append(Difference(table, "table", f"table {table} is missing", mend))
            continue
        found += [
            Difference(table, "column", f"table {table} has no column {column}", mend)
            for column in sorted(need.columns - have.columns)
        ]
        if have.primary_key != need.primary_key:
            found.append(
                Difference(
                    table,
                    "primary key",
                    f"table {table} has primary key ({', '.join(have.primary_key)}), "
                    f"not ({', '.join(need.primary_key)})",
                    None,
                )
            )
        found += [
            Difference(table, "index", f"table {table} has no valid index {index}", mend)
            for index in sorted(need.indexes - have.indexes)
        ]
    return found


def _make(provider: Provider, tables: Tables, found: list[Difference], *, repair: bool) -> list[Difference]:
    """Do what is to do, under the lock; give what still differs."""
    langgraph = [difference for difference in found if not difference.table.startswith("persistence_")]
    if langgraph:
        tables.create_langgraph_tables()
        if repair and _compare(tables.required, tables.observed(), mend=REPAIR):
            tables.repair_langgraph_tables()
    if tables.own_revision() != head():
        _alembic(provider, tables, "upgrade", "head")
    return _differences(provider, tables)


def _drift(provider: Provider, differences: list[Difference], *, repaired: bool) -> SchemaError:
    """The error for a database that is not as it must be."""
    message = f"the tables of {provider.dsn} are not as this version needs them: " + "; ".join(
        str(difference) for difference in differences
    )
    tried = {SETUP, REPAIR} if repaired else set()
    commands = [
        m for m in dict.fromkeys(difference.mend for difference in differences) if m and m not in tried
    ]
    if not commands:
        return SchemaError(
            message,
            hint="no command mends this: the table was not made by LangGraph or was changed by hand; "
            "use another database or schema, or restore a backup",
        )
    hint = "run " + ", then ".join(f"`{command}`" for command in commands)
    if any(difference.kind == "table" and difference.mend == REPAIR for difference in differences):
        hint += ", but if the missing table held data restore a backup: it will be made empty"
    return SchemaError(message, hint=hint)


def _refuse_newer(provider: Provider, revision: str | None) -> None:
    if revision is not None and revision not in _revisions():
        raise SchemaError(
            f"the application is older than the database: our own tables in {provider.dsn} are at revision "
            f"{revision}, this version knows up to {head()}",
            hint="install a newer langgraph-persistence, or take the tables back with the newer version: "
            f"`persistence schema downgrade {head()}`",
        )


def _move(provider: Provider, revision: str, direction: Literal["upgrade", "downgrade"]) -> str | None:
    target = _known(revision)
    with provider.tables() as tables, tables.setup_lock():
        at = tables.own_revision()
        _refuse_newer(provider, at)
        forward = direction == "upgrade"
        if (at or "") < (target or "") if forward else (at or "") > (target or ""):
            _alembic(provider, tables, direction, target or "base")
        return tables.own_revision()


def _alembic(
    provider: Provider, tables: Tables, command: str, revision: str, *, output: io.StringIO | None = None
) -> None:
    """Run one Alembic command, configured in memory; with ``output`` the statements go there instead."""
    with _quiet():
        import alembic.command
        from alembic.config import Config
        from alembic.util import CommandError
        from sqlalchemy.exc import DBAPIError

    config = Config(output_buffer=output, stdout=io.StringIO())
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes.update(dialect=tables.dialect, schema=tables.schema, connect=tables.connect)
    run: Callable[..., None] = getattr(alembic.command, command)
    try:
        with _alembic_lock, _quiet():
            run(config, revision, sql=output is not None)
        return
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
    except CommandError as error:
        reason = str(error)
    # Outside the handler: the driver's error with its statement and arguments does not hang on to ours.
    raise SchemaError(
        f"could not {command} our own tables in {provider.dsn}: {mask_secrets(reason, provider.dsn)}",
        hint=f"run `{SETUP}` as somebody who may create tables there, or give the output of "
        "`persistence schema sql` to somebody who may",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Alembic tells every step at INFO, its own loading too; what counts is in our log."""
    logger = logging.getLogger("alembic")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first(value: str | tuple[str, ...] | list[str] | None) -> str | None:
    """Alembic's type allows several parents; our history is a line."""
    return value if isinstance(value, str) or value is None else value[0]
