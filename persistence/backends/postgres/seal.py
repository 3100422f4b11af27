"""Triggers that refuse every write to a Postgres database that has moved.

They belong to a function, by which the role that made it may take them away again, also where another one
owns the tables. A statement fires them, not a row, so ``TRUNCATE`` and a write to no row are refused too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from psycopg import Connection, sql
from psycopg.rows import tuple_row

from persistence.backends.moved import moved_to
from persistence.backends.postgres.qualify import quote_identifier

TABLES = ("checkpoint_blobs", "checkpoints", "checkpoint_writes")
_NAME = "persistence_sealed"
# They are looked for as every statement looks for them: in the schema that is named, or by the search path.
_PLACES = f"""
SELECT n.nspname::text, c.relname::text,
    EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = '{_NAME}'),
    pg_catalog.has_table_privilege(c.oid, 'UPDATE, DELETE, TRUNCATE'),
    pg_catalog.has_table_privilege(c.oid, 'TRIGGER'),
    pg_catalog.has_schema_privilege(n.oid, 'CREATE')
FROM pg_catalog.unnest(%s::text[]) AS named (name)
JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass(named.name)
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY 2
"""
SEALED = f"""
SELECT 'sealed' FROM pg_catalog.pg_trigger
WHERE tgrelid = pg_catalog.to_regclass(%(checkpoints)s::text) AND tgname = '{_NAME}'
"""
"""One row where writes are refused. ``checkpoints`` is what :func:`named` gives."""


class Place(NamedTuple):
    """A table, what is on it, and what this role may do to it."""

    schema: str
    table: str
    sealed: bool
    lock: bool
    trigger: bool
    create: bool

    @property
    def name(self) -> sql.Identifier:
        """The table's name in a statement."""
        return sql.Identifier(self.schema, self.table)

    @property
    def function(self) -> sql.Identifier:
        """The name of the triggers' function, which is beside the table."""
        return sql.Identifier(self.schema, _NAME)


def named(table: str, schema: str | None) -> str:
    """A table's name as Postgres finds it by its text."""
    return table if schema is None else f"{quote_identifier(schema)}.{table}"


def places(conn: Connection[Any], schema: str | None) -> list[Place]:
    """LangGraph's tables."""
    names = [named(table, schema) for table in TABLES]
    cursor = conn.cursor(row_factory=tuple_row)
    return [Place(*row) for row in cursor.execute(_PLACES.encode(), [names]).fetchall()]


def seal(conn: Connection[Any], schema: str | None, target: str) -> None:
    """Refuse writes to LangGraph's tables from the end of the transaction on."""
    message = sql.Literal(moved_to(target)).as_string(conn)
    body = f"BEGIN RAISE EXCEPTION USING MESSAGE = {message}, ERRCODE = 'integrity_constraint_violation'; END"
    function = "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS {}"
    trigger = (
        "CREATE TRIGGER {} BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {}"
        " FOR EACH STATEMENT EXECUTE FUNCTION {}()"
    )
    found = places(conn, schema)
    for name in {place.schema: place.function for place in found}.values():
        conn.execute(sql.SQL(function).format(name, sql.Literal(body)))
    for place in found:
        if not place.sealed:
            conn.execute(sql.SQL(trigger).format(sql.Identifier(_NAME), place.name, place.function))


def is_sealed(conn: Connection[Any], schema: str | None) -> bool:
    """Whether writes are refused."""
    return any(place.sealed for place in places(conn, schema))


def unseal(conn: Connection[Any], schema: str | None) -> None:
    """Undo :func:`seal`."""
    for name in {place.schema: place.function for place in places(conn, schema)}.values():
        conn.execute(sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(name))
