"""Where a schema goes into a statement, and where it does not."""

from __future__ import annotations

import re

import pytest
from langgraph.checkpoint.postgres import base as checkpoints
from langgraph.store.postgres import base as store

from persistence.backends.postgres.qualify import LANGGRAPH_TABLES, qualify

S = '"app".'


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT v FROM checkpoints", f"SELECT v FROM {S}checkpoints"),
        ("select 1 from CheckPoints", f"select 1 from {S}CheckPoints"),
        ('SELECT 1 FROM "store"', f'SELECT 1 FROM {S}"store"'),
        (
            "SELECT checkpoints.thread_id FROM checkpoints",
            f"SELECT checkpoints.thread_id FROM {S}checkpoints",
        ),
        ("SELECT 1 FROM public.checkpoints", "SELECT 1 FROM public.checkpoints"),
        (
            "SELECT 1 FROM a JOIN store s ON store.key = s.key",
            f"SELECT 1 FROM a JOIN {S}store s ON store.key = s.key",
        ),
        ("SELECT 1 FROM checkpoints c, store s", f"SELECT 1 FROM {S}checkpoints c, {S}store s"),
        ("SELECT f(a, store) FROM x", "SELECT f(a, store) FROM x"),
        ("SELECT 1 FROM x ORDER BY a, store", "SELECT 1 FROM x ORDER BY a, store"),
        (
            "SELECT 1 FROM (checkpoints JOIN store USING (a))",
            f"SELECT 1 FROM ({S}checkpoints JOIN {S}store USING (a))",
        ),
        ("UPDATE store SET value = 1", f"UPDATE {S}store SET value = 1"),
        (
            "UPDATE ONLY store s SET a = 1 FROM x, checkpoints",
            f"UPDATE ONLY {S}store s SET a = 1 FROM x, {S}checkpoints",
        ),
        (
            "INSERT INTO store(a) VALUES (1) ON CONFLICT (a) DO UPDATE SET a = store.a",
            f"INSERT INTO {S}store(a) VALUES (1) ON CONFLICT (a) DO UPDATE SET a = store.a",
        ),
        (
            "DELETE FROM store USING checkpoints WHERE 1=1",
            f"DELETE FROM {S}store USING {S}checkpoints WHERE 1=1",
        ),
        (
            "CREATE TABLE IF NOT EXISTS store (store text)",
            f"CREATE TABLE IF NOT EXISTS {S}store (store text)",
        ),
        (
            "CREATE INDEX CONCURRENTLY i ON checkpoints(thread_id)",
            f"CREATE INDEX CONCURRENTLY i ON {S}checkpoints(thread_id)",
        ),
        (
            "CREATE TABLE v (FOREIGN KEY (a) REFERENCES store(a))",
            f"CREATE TABLE v (FOREIGN KEY (a) REFERENCES {S}store(a))",
        ),
        (
            "ALTER TABLE IF EXISTS ONLY store ADD COLUMN a int",
            f"ALTER TABLE IF EXISTS ONLY {S}store ADD COLUMN a int",
        ),
        ("DROP TABLE store, checkpoints", f"DROP TABLE {S}store, {S}checkpoints"),
        ("TRUNCATE store", f"TRUNCATE {S}store"),
        ("LOCK TABLE store", f"LOCK TABLE {S}store"),
        ("COPY checkpoints (a) FROM STDIN", f"COPY {S}checkpoints (a) FROM STDIN"),
        ("SELECT 1 FROM persistence_transfers", f"SELECT 1 FROM {S}persistence_transfers"),
        ("SELECT 1 FROM storefront JOIN my_store ON 1=1", "SELECT 1 FROM storefront JOIN my_store ON 1=1"),
        ("SELECT 'FROM store', $$ FROM store $$, E'\\'FROM store' FROM x", None),
        ("SELECT 1 -- FROM store\n FROM x /* JOIN store */", None),
        ("SELECT 1 FROM x FOR UPDATE OF store", None),
        ("SELECT a IS DISTINCT FROM store.b", None),
        (
            "SELECT 1 FROM store; SELECT 2 FROM checkpoints",
            f"SELECT 1 FROM {S}store; SELECT 2 FROM {S}checkpoints",
        ),
        (
            "WITH p AS (SELECT 1 FROM store) UPDATE store SET a=1 FROM p",
            f"WITH p AS (SELECT 1 FROM {S}store) UPDATE {S}store SET a=1 FROM p",
        ),
    ],
)
def test_tables_get_the_schema_and_nothing_else_does(statement: str, expected: str | None) -> None:
    assert qualify(statement, "app") == (statement if expected is None else expected)


def test_any_schema_name_is_quoted() -> None:
    assert qualify("SELECT 1 FROM store", 'We"ird x%') == 'SELECT 1 FROM "We""ird x%".store'
    assert qualify("SELECT %s FROM store", "x%", placeholders=True) == 'SELECT %s FROM "x%%".store'


def test_it_is_idempotent() -> None:
    once = qualify(checkpoints.SELECT_SQL, "app")
    assert qualify(once, "app") == once


def upstream_statements() -> dict[str, str]:
    """Every SQL text of LangGraph's Postgres modules, by name."""
    found: dict[str, str] = {}
    for module in (checkpoints, store):
        for name, value in vars(module).items():
            texts = value if isinstance(value, list | tuple) else [value]
            for number, item in enumerate(texts):
                text = item.sql if isinstance(item, store.Migration) else item
                if isinstance(text, str) and re.search(r"\b(from|into|table|update)\b", text, re.IGNORECASE):
                    if name.startswith("__"):
                        continue
                    found[f"{module.__name__.rpartition('.')[0]}:{name}:{number}"] = text
    return found


@pytest.mark.parametrize("name", upstream_statements())
def test_every_table_in_upstreams_statements_is_found(name: str) -> None:
    """A crude second reading: after these words, no table of LangGraph's stays bare."""
    text = re.sub(r"--[^\n]*", "", upstream_statements()[name])
    qualified = qualify(text, "app")
    tables = "|".join(sorted(LANGGRAPH_TABLES, key=len, reverse=True))
    words = r"(?:from|join|into|update|table|exists|references|\bon)\s+"
    assert re.findall(rf"{words}(?:{tables})\b(?!\s*\.)", qualified, re.IGNORECASE) == []
    assert len(re.findall(rf"{re.escape(S)}(?:{tables})\b", qualified)) == len(
        re.findall(rf"{words}(?:{tables})\b(?!\s*\.)", text, re.IGNORECASE)
    )


def test_there_are_statements_to_look_at() -> None:
    assert len(upstream_statements()) > 25
