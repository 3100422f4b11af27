"""What the schema tests share: each place where tables can live, and a look at it from outside."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from persistence.contract import Provider
from persistence.registry import provider_for
from persistence.settings import Settings

SCHEMA = 'Odd "schema" 100%s'


@dataclass(frozen=True)
class Place:
    """One empty database, and our way and everybody's way into it."""

    dsn: str
    schema: str | None = None
    path: Path | None = None

    @property
    def provider(self) -> Provider:
        return provider_for(self.dsn, Settings(db_schema=self.schema))

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements as an administrator of the database; ``{}`` stands for the schema's prefix."""
        prefix = f"{quoted(self.schema)}." if self.schema else ""
        rows: list[tuple[Any, ...]] = []
        if self.path is not None:
            with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                for statement in statements:
                    rows = connection.execute(statement.replace("{}", "")).fetchall()
            return rows
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.replace("{}", prefix).encode())
                rows = cursor.fetchall() if cursor.description else []
        return rows


def quoted(name: str) -> str:
    return sql.Identifier(name).as_string()


@pytest.fixture
def sqlite_place(tmp_path: Path) -> Place:
    path = tmp_path / "a b%20c.db"
    return Place(f"sqlite:///{str(path).replace('%', '%25')}", path=path)


@pytest.fixture
def postgres_place(postgres_dsn: str) -> Place:
    return Place(postgres_dsn)


@pytest.fixture
def postgres_schema_place(postgres_dsn: str) -> Place:
    return Place(postgres_dsn, schema=SCHEMA)


@pytest.fixture(params=["sqlite", "postgres", "postgres with a schema"])
def place(request: pytest.FixtureRequest) -> Place:
    """Every kind of place."""
    fixtures = {"sqlite": "sqlite_place", "postgres": "postgres_place"}
    found = request.getfixturevalue(fixtures.get(request.param, "postgres_schema_place"))
    assert isinstance(found, Place)
    return found


@pytest.fixture(params=["no schema", "a schema"])
def either_postgres(request: pytest.FixtureRequest, postgres_dsn: str) -> Place:
    """Postgres, with a configured schema and without."""
    return Place(postgres_dsn, schema=SCHEMA if request.param == "a schema" else None)


@pytest.fixture
def role(postgres_server: str) -> Iterator[Callable[[Place], tuple[str, Place]]]:
    """Make a role without rights, and give its name and its own way into a place."""
    made: list[tuple[str, str]] = []

    def make(place: Place) -> tuple[str, Place]:
        name = f"role_{place.run('SELECT pg_backend_pid()')[0][0]}"
        place.run(f"CREATE ROLE {name} LOGIN PASSWORD 'hunter2'")
        made.append((name, place.dsn))
        info = psycopg.conninfo.conninfo_to_dict(place.dsn)
        info.update(user=name, password="hunter2")
        return name, Place(psycopg.conninfo.make_conninfo("", **info), schema=place.schema)

    yield make
    for name, dsn in made:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {name}".encode())
            connection.execute(f"DROP ROLE {name}".encode())
