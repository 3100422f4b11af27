"""How statements and rows travel: everything that a statement may carry, and prepared ones that went away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

from persistence.backends.postgres.wire import Wire

_ECHO = """SELECT
    %(text)s::text, %(int)s::int, %(bool)s::bool, %(none)s::text, %(bytes)s::bytea, %(texts)s::text[],
    %(ints)s::int[], %(blobs)b::bytea[], %(nothing)s::text[], %(nulls)s::bytea[], %(text)s::text,
    '{"a": [1, "ü"]}'::jsonb, '{"a": [1, "ü"]}'::json, '100%%' AS per_cent"""
_GIVEN: dict[str, Any] = {
    "text": "ü'\\ %s",
    "int": -5,
    "bool": True,
    "none": None,
    "bytes": b"\0\xff'",
    "texts": ["a,b", None, "", "ü"],
    "ints": [-1, 0, 2**31 - 1],
    "blobs": [None, b"", b"\0\xff"],
    "nothing": [],
    "nulls": [None, None],
}


@pytest.fixture
def conn(postgres_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        yield conn


@pytest.mark.parametrize("prepare_after", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "iso8859-1"])
def test_values_come_back(conn: psycopg.Connection[Any], prepare_after: int | None, encoding: str) -> None:
    conn.execute(f"SET client_encoding TO '{encoding}'".encode())
    wire = Wire(conn.pgconn, None, encoding, prepare_after)
    for _ in range(4):
        (row,) = conn.wait(wire.run(_ECHO, _GIVEN))
        assert row == (*_GIVEN.values(), _GIVEN["text"], {"a": [1, "ü"]}, {"a": [1, "ü"]}, "100%")
    prepared = conn.execute("SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql").fetchone()
    assert prepared == (0 if prepare_after is None else 1,)


def test_prepared_statement_that_went_away(conn: psycopg.Connection[Any]) -> None:
    wire = Wire(conn.pgconn, None, "utf-8", 0)
    for _ in range(2):
        assert conn.wait(wire.run("SELECT %(a)s::text", {"a": "x"})) == [("x",)]
        conn.execute("DEALLOCATE ALL")


def test_errors_are_those_of_the_driver(conn: psycopg.Connection[Any]) -> None:
    wire = Wire(conn.pgconn, None, "utf-8", 1)
    for _ in range(3):
        with pytest.raises(errors.DivisionByZero, match="division by zero"):
            conn.wait(wire.run("SELECT 1 / %(zero)s::int", {"zero": 0}))
        assert conn.wait(wire.run("SELECT %(one)s::int", {"one": 1})) == [(1,)]


def test_text_does_not_end_at_a_nul(conn: psycopg.Connection[Any]) -> None:
    wire = Wire(conn.pgconn, None, "utf-8", 0)
    query = "SELECT %(a)s::text"
    with pytest.raises(errors.DataError):
        conn.wait(wire.run(query, {"a": "a\0b"}))
    with pytest.raises(errors.DataError):
        conn.wait(wire.run_all([(query, {"a": "a"}), (query, {"a": "a\0b"})], lambda rows: None))
    assert conn.wait(wire.run(query, {"a": "a"})) == [("a",)]


def test_only_so_many_statements_are_prepared(conn: psycopg.Connection[Any]) -> None:
    wire = Wire(conn.pgconn, None, "utf-8", 0)
    for i in range(110):
        assert conn.wait(wire.run(f"SELECT {i} + %(a)s::int", {"a": 1})) == [(i + 1,)]
    assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (100,)


def test_schema_is_named(conn: psycopg.Connection[Any]) -> None:
    conn.execute('CREATE SCHEMA "5%s"')
    conn.execute('CREATE TABLE "5%s".checkpoints (thread_id text)')
    wire = Wire(conn.pgconn, "5%s", "utf-8", 0)
    conn.wait(wire.run("INSERT INTO checkpoints SELECT %(a)s", {"a": "x"}))
    assert conn.wait(wire.run("SELECT thread_id FROM checkpoints", {})) == [("x",)]
