"""Triggers that refuse every write to a Postgres database that has moved.

They belong to a function, by which the role that made it may take them away again, also where another one
owns the tables. A statement fires them, not a row, so ``TRUNCATE`` and a write to no row are refused too.

LangGraph's store has a function of its own. That a read puts off when an item expires is an ``UPDATE``, which
only its rows tell from a write: it is left undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from psycopg import Connection, sql
from psycopg.rows import tuple_row

from persistence.backends.moved import moved_to
from persistence.backends.postgres.qualify import quote_identifier

TABLES = ("checkpoint_blobs", "checkpoints", "checkpoint_writes")
STORE = ("store", "store_vectors")
_NAME = "persistence_sealed"
_STORE_NAME = f"{_NAME}_store"
_READ = f"{_NAME}_read"
# They are looked for as every statement looks for them: in the schema that is named, or by the search path.
_PLACES = f"""
SELECT n.nspname::text, c.relname::text,
    EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = '{_NAME}'),
    pg_catalog.has_table_privilege(c.oid, 'UPDATE, DELETE, TRUNCATE'),
    pg_catalog.has_table_privilege(c.oid, 'TRIGGER'),
    pg_catalog.has_schema_privilege(n.oid, 'CREATE'),
    EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'expires_at')
FROM pg_catalog.unnest(%s::text[]) WITH ORDINALITY AS named (name, number)
JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass(named.name)
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY named.number
"""
SEALED = f"""
SELECT 'sealed' FROM pg_catalog.pg_trigger WHERE tgname = '{_NAME}' AND tgrelid IN (
    pg_catalog.to_regclass(%(checkpoints)s::text), pg_catalog.to_regclass(%(store)s::text))
"""
"""Rows where writes are refused. ``checkpoints`` and ``store`` are what :func:`named` gives."""
# What is left to compare are the bytes of the row, for equal numbers may be written in other ways.
_UNLESS_READ = """
IF TG_LEVEL = 'ROW' THEN
    NEW.expires_at := OLD.expires_at;
    IF NEW OPERATOR(pg_catalog.*=) OLD THEN RETURN NULL; END IF;
END IF;
"""


class Place(NamedTuple):
    """A table, what is on it, and what this role may do to it."""

    schema: str
    table: str
    sealed: bool
    lock: bool
    trigger: bool
    create: bool
    expires: bool
    """Whether its rows may expire, and a read put that off."""

    @property
    def name(self) -> sql.Identifier:
        """The table's name in a statement."""
        return sql.Identifier(self.schema, self.table)


def named(table: str, schema: str | None) -> str:
    """A table's name as Postgres finds it by its text."""
    return table if schema is None else f"{quote_identifier(schema)}.{table}"


def places(conn: Connection[Any], schema: str | None, tables: Sequence[str] = TABLES + STORE) -> list[Place]:
    """Those of LangGraph's tables that are there."""
    names = [named(table, schema) for table in tables]
    cursor = conn.cursor(row_factory=tuple_row)
    return [Place(*row) for row in cursor.execute(_PLACES.encode(), [names]).fetchall()]


def seal(conn: Connection[Any], schema: str | None, target: str) -> None:
    """Refuse writes to the tables of LangGraph's savers from the end of the transaction on."""
    for place in _functions(conn, places(conn, schema, TABLES), _NAME, _refuse(conn, target)):
        _trigger(conn, place, _NAME, "INSERT OR UPDATE OR DELETE OR TRUNCATE", _NAME)


def seal_store(conn: Connection[Any], schema: str | None, target: str) -> None:
    """As :func:`seal`, for the tables of LangGraph's store that are there."""
    body = _UNLESS_READ + _refuse(conn, target)
    for place in _functions(conn, places(conn, schema, STORE), _STORE_NAME, body):
        updates = "" if place.expires else "UPDATE OR "
        _trigger(conn, place, _NAME, f"INSERT OR {updates}DELETE OR TRUNCATE", _STORE_NAME)
        if place.expires:
            _trigger(conn, place, _READ, "UPDATE", _STORE_NAME, each="ROW")


def is_sealed(conn: Connection[Any], schema: str | None) -> bool:
    """Whether writes are refused."""
    return any(place.sealed for place in places(conn, schema))


def unseal(conn: Connection[Any], schema: str | None) -> None:
    """Undo :func:`seal` and :func:`seal_store`."""
    for schema_of in {place.schema for place in places(conn, schema)}:
        for function in (_NAME, _STORE_NAME):
            name = sql.Identifier(schema_of, function)
            conn.execute(sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(name))


def _refuse(conn: Connection[Any], target: str) -> str:
    message = sql.Literal(moved_to(target)).as_string(conn)
    return f"RAISE EXCEPTION USING MESSAGE = {message}, ERRCODE = 'integrity_constraint_violation';"


def _functions(conn: Connection[Any], found: Sequence[Place], function: str, body: str) -> list[Place]:
    """Make the triggers' function beside the tables; gives those that have no triggers yet."""
    statement = "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS {}"
    for schema in {place.schema for place in found}:
        name = sql.Identifier(schema, function)
        conn.execute(sql.SQL(statement).format(name, sql.Literal(f"BEGIN {body} END")))
    return [place for place in found if not place.sealed]


def _trigger(
    conn: Connection[Any], place: Place, name: str, events: str, function: str, each: str = "STATEMENT"
) -> None:
    statement = f"CREATE TRIGGER {{}} BEFORE {events} ON {{}} FOR EACH {each} EXECUTE FUNCTION {{}}()"
    conn.execute(
        sql.SQL(statement).format(sql.Identifier(name), place.name, sql.Identifier(place.schema, function))
    )
