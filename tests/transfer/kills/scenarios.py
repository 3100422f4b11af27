"""What is killed: each scenario, run again after a kill, must give what one clean run gives.

To add one: ``Scenario("name", run=..., rows=...)`` in :data:`SCENARIOS`. ``run`` is called in a child process
with tiny batches and parts, and killed there; ``prepare``, if there is something to prepare, is not.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from persistence import transfer
from persistence.errors import ConflictError
from persistence.transfer import ahead
from tests.transfer.stores import BOTH

Rows = dict[str, list[str]]


@dataclass(frozen=True)
class Place:
    """Where one scenario runs: everything in it is its own, but for the sources."""

    folder: Path
    schema: str
    server: str
    """DSN of the test's database."""
    source: Path
    """A SQLite file with threads, for all."""

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> Place:
        """From the texts of its fields."""
        return cls(Path(texts["folder"]), texts["schema"], texts["server"], Path(texts["source"]))

    @property
    def postgres(self) -> str:
        """An empty schema."""
        return f"{self.server}&schema={self.schema}"

    @property
    def source_postgres(self) -> str:
        """The same threads as in ``source``, for all."""
        return f"{self.server}&schema=source"

    @property
    def file(self) -> Path:
        """A SQLite file that is not there yet."""
        return self.folder / "target.db"

    @property
    def sqlite(self) -> str:
        return f"sqlite:///{self.file}"


@dataclass(frozen=True)
class Scenario:
    """Something that is killed and run again."""

    name: str
    run: Callable[[Place], object]
    rows: Callable[[Place], Rows]
    prepare: Callable[[Place], object] = lambda place: None
    repeats: bool = True
    """Whether each run commits at the same places: not where the quicker one takes more of the work."""


def postgres_rows(place: Place) -> Rows:
    """Every row of every table of the place's schema."""
    found: Rows = {}
    with psycopg.connect(place.server) as conn:
        tables = conn.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = %s ORDER BY 1", [place.schema]
        )
        for (table,) in tables.fetchall():
            cursor = conn.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(place.schema, table)))
            names = [column.name for column in cursor.description or ()]
            found[table] = _rows(place, table, names, cursor.fetchall())
    return found


def sqlite_rows(place: Place) -> Rows:
    """Every row of every table of the place's file."""
    found: Rows = {}
    with closing(sqlite3.connect(place.file)) as conn:
        tables = conn.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1").fetchall()
        for (table,) in tables:
            cursor = conn.execute(f"SELECT * FROM {table}")
            names = [column[0] for column in cursor.description]
            found[table] = _rows(place, table, names, cursor.fetchall())
    return found


def _rows(place: Place, table: str, names: list[str], rows: list[tuple[object, ...]]) -> list[str]:
    """Rows as text, sorted; of our own tables without what differs from run to run."""
    own = table.startswith("persistence_")
    kept = [
        number
        for number, name in enumerate(names)
        if not (own and (name in {"run_id", "target_identity"} or name.endswith("_at")))
    ]
    texts = (repr([row[number] for number in kept]) for row in rows)
    return sorted(text.replace(str(place.folder), "FOLDER").replace(place.schema, "SCHEMA") for text in texts)


def _ahead(place: Place, workers: int) -> None:
    """Nearly all in one commit, and what several workers do not keep up with after it."""
    ahead.LIMIT = 1_000_000_000
    transfer.migrate(place.source, place.postgres, options=transfer.Options(workers=workers))


def _through_an_archive(place: Place) -> None:
    transfer.migrate(place.source, place.postgres, archive=place.folder / "archive")


def _follow(place: Place) -> None:
    """A run with a first copy, a round, and a cut-over, of a copy of the source."""
    source = Path(shutil.copy(place.source, place.folder / "followed.db"))
    stop = threading.Event()

    def change(_: transfer.Round) -> None:
        stop.set()
        with closing(sqlite3.connect(source)) as conn, conn:
            conn.execute("DELETE FROM writes WHERE rowid % 2 = 0")
            conn.execute("UPDATE checkpoints SET metadata = replace(metadata, 'loop', 'pool')")

    transfer.follow(source, place.postgres, stop=stop, told=change)
    transfer.cut_over(source, place.postgres)


def _follow_postgres(place: Place) -> None:
    """A first copy out of the place's schema into its file, a round, and a cut-over."""
    stop = threading.Event()

    def change(_: transfer.Round) -> None:
        stop.set()
        with (
            suppress(psycopg.IntegrityError),  # sealed by a run that was killed then
            psycopg.connect(f"{place.server}&options=-csearch_path%3D{place.schema}") as conn,
        ):
            conn.execute("DELETE FROM checkpoint_writes WHERE idx % 2 = 0")
            conn.execute("UPDATE checkpoints SET metadata = replace(metadata::text, 'loop', 'pool')::jsonb")

    with suppress(ConflictError):  # cut over by a run that was killed then
        transfer.follow(place.postgres, place.sqlite, stop=stop, told=change)
    assert transfer.cut_over(place.postgres, place.sqlite).sealed


def _threads(place: Place) -> Rows:
    """What else there is tells how often it was run."""
    return {
        table: found for table, found in sqlite_rows(place).items() if not table.startswith("persistence_")
    }


def _undo(dsn: str) -> None:
    if transfer.runs(dsn)[0].state != "undone":
        transfer.undo("last", dsn)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("sqlite-postgres", lambda p: transfer.migrate(p.source, p.postgres), postgres_rows),
        # Traps are in the parent only; its workers must end with it.
        Scenario(
            "sqlite-postgres-workers",
            lambda p: transfer.migrate(p.source, p.postgres, options=transfer.Options(workers=2)),
            postgres_rows,
        ),
        Scenario("ahead", lambda p: _ahead(p, 1), postgres_rows),
        Scenario("ahead-workers", lambda p: _ahead(p, 2), postgres_rows, repeats=False),
        Scenario("postgres-sqlite", lambda p: transfer.migrate(p.source_postgres, p.sqlite), sqlite_rows),
        Scenario("sqlite-sqlite", lambda p: transfer.migrate(p.source, p.sqlite), sqlite_rows),
        Scenario(
            "store-postgres", lambda p: transfer.migrate(p.source, p.postgres, options=BOTH), postgres_rows
        ),
        Scenario("store-sqlite", lambda p: transfer.migrate(p.source, p.sqlite, options=BOTH), sqlite_rows),
        Scenario("sqlite-archive-postgres", _through_an_archive, postgres_rows),
        Scenario(
            "undo-postgres",
            lambda p: _undo(p.postgres),
            postgres_rows,
            prepare=lambda p: transfer.migrate(p.source, p.postgres),
        ),
        Scenario(
            "follow-postgres",
            _follow_postgres,
            _threads,
            prepare=lambda p: transfer.migrate(p.source, p.postgres),
        ),
        Scenario("undo-followed", lambda p: _undo(p.postgres), postgres_rows, prepare=_follow),
        Scenario(
            "undo-sqlite",
            lambda p: _undo(p.sqlite),
            sqlite_rows,
            prepare=lambda p: transfer.migrate(p.source, p.sqlite),
        ),
    )
}
