"""What the Postgres savers' statements must keep to, so that distributed tables can run them (docs/citus.md).

`make citus` runs them there; these are the rules that can be read off their text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest

from persistence.backends.postgres import sql
from persistence.backends.postgres.qualify import qualify

ACROSS = {"list all", "RUNS"}
"""They ask for rows of any thread, so for those of all machines."""

_ALIAS = r"(?: (?:AS )?(?!WHERE|ORDER|LIMIT|USING)(\w+))?"
_TABLE = re.compile(rf"\b(FROM|JOIN|UPDATE|INTO) (checkpoint\w*){_ALIAS}")


def _statements() -> Iterator[tuple[str, str]]:
    for name, value in vars(sql).items():
        if name.isupper() and not name.startswith("_") and isinstance(value, str) and "FROM " in value:
            yield name, value
    yield from ((f"COPY_THREAD {number}", text) for number, text in enumerate(sql.COPY_THREAD))
    yield "get latest", sql.select(sql.LATEST, one_thread=True)
    yield "list thread", sql.select("thread_id = %(thread)s AND metadata @> '{}'", one_thread=True)
    yield "list all", sql.select("metadata @> '{}'", one_thread=False)
    for own, kept, search in ((True, False, False), (False, True, False), (True, True, True)):
        yield f"put {own} {kept} {search}", sql.put(own=own, kept=kept, search=search)
    for blobs in (0, 1, 9):
        for kept in (False, True):
            yield f"put_known {blobs} {kept}", sql.put_known(blobs=blobs, kept=kept)
    yield from ((f"put_writes {number}", sql.put_writes(number)) for number in (1, 9))


STATEMENTS: Mapping[str, str] = dict(_statements())


@pytest.fixture(params=STATEMENTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _rest(statement: str, start: int) -> str:
    """What follows in the same sub-select."""
    depth = 0
    for at, character in enumerate(statement[start:], start):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return statement[start:at]
    return statement[start:]


def test_each_table_is_named_with_the_schema(name: str) -> None:
    qualified = qualify(STATEMENTS[name], "app", placeholders=True)
    assert not _TABLE.search(qualified)
    assert qualified.count('"app".') == len(_TABLE.findall(STATEMENTS[name])) > 0


def test_each_sub_select_names_the_thread(name: str) -> None:
    """As a constant, so that one machine is asked, and only that one is needed."""
    if name in ACROSS:
        return
    statement = STATEMENTS[name]
    for found in _TABLE.finditer(statement):
        word, table, alias = found.groups()
        rest = _rest(statement, found.end())
        where = rf"(?<![\w.])(?:{alias}\.)?thread_id = (?:ANY\()?%\((?:thread|threads|source)\)s"
        if word == "INTO":
            where = r"(?:VALUES \(|SELECT )(?:%\((?:thread|target)\)s|p\.thread_id),"
        assert re.search(where, rest), f"{word} {table} {alias}"


def test_functions_that_give_rows_are_lateral(name: str) -> None:
    """Where one takes a column of a table: else Citus fails with ``invalid attnum``."""
    for found in re.finditer(r"(\w+)\s+jsonb_each_text\(", STATEMENTS[name]):
        assert found[1] == "LATERAL"


def test_what_replaces_a_row_calls_no_function(name: str) -> None:
    for found in re.finditer(r"DO UPDATE SET(.*?)(?:RETURNING|WHERE|$)", STATEMENTS[name], re.DOTALL):
        assert "(" not in found[1]


def test_listing_across_threads_can_be_taken_apart() -> None:
    """What is fetched for chosen rows is grouped by the thread, and has neither ``LIMIT`` nor ``OFFSET``."""
    chosen, fetched = STATEMENTS["list all"].split("LIMIT %(limit)s")
    assert "LIMIT" not in fetched
    assert "OFFSET" not in chosen + fetched
    assert fetched.count("json_agg(") == fetched.count("GROUP BY t.thread_id\n") == 3
