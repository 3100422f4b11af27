"""Rows that the server is asked for before anybody wants them."""

from __future__ import annotations

import time
from pathlib import Path

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver

from persistence import transfer
from persistence.backends.postgres import transfer_cursors
from persistence.backends.postgres.transfer_cursors import Cut, Query, Where
from persistence.backends.postgres.transfer_source import PostgresSource
from persistence.errors import SourceError
from persistence.registry import provider_for
from tests.transfer import make
from tests.transfer.test_refusals import config

THREADS = ["a", "b", "c; DROP TABLE checkpoints", "d'%s\\"]
_OPEN = "SELECT count(*) FROM pg_cursors WHERE name <> ''"
_WORKING = """
SELECT count(*) FROM pg_stat_activity
WHERE state = 'active' AND query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()
"""


@pytest.fixture
def source(postgres_dsn: str) -> str:
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.setup()
        for thread in THREADS:
            for number in range(7):
                make.put(saver, thread, {"c": [number], "large": "x" * 5_000})
            saver.put_writes(config(thread), [("c", [1]), ("d", [2])], "task")
    return postgres_dsn


def opened(dsn: str) -> PostgresSource:
    found = provider_for(dsn).source()
    assert isinstance(found, PostgresSource)
    return found


def test_two_readings_at_once(source: str) -> None:
    with opened(source) as one:
        whole = list(one.records(THREADS, data=False))
        assert {record.thread_id for record in whole} == set(THREADS)
        first, second = (one.records(THREADS[n::2], data=False) for n in range(2))
        assert one.identity and list(one.threads()) == sorted(THREADS)
        found = [record for both in zip(first, second, strict=True) for record in both]
        assert sorted(map(str, found)) == sorted(map(str, whole))
        assert list(one.records(THREADS, data=False)) == whole
        assert list(one.records([])) == []


@pytest.mark.parametrize("limit", ["_FETCH", "_FETCH_BYTES"])
def test_rows_that_come_a_few_at_a_time(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    with opened(source) as one:
        whole = [list(one.records(data=data)) for data in (False, True)]
        monkeypatch.setattr(transfer_cursors, limit, 2)
        assert [list(one.records(data=data)) for data in (False, True)] == whole
        assert [list(one.records(THREADS, data=data)) for data in (False, True)] == whole
    assert transfer.migrate(source, f"sqlite:///{tmp_path / 'new.db'}").verified


def test_nothing_is_left_on_the_connection(source: str) -> None:
    with opened(source) as one:
        for _ in range(3):
            list(one.records(THREADS, data=False))
        (count,) = one.cursor().execute(_OPEN).fetchall()[0]
        assert count <= 4, "those of the last reading, which the next request closes"
        one.cursors.close()
        assert one.cursor().execute(_OPEN).fetchall() == [(0,)]
        assert len(list(one.records(THREADS, data=False))) == len(THREADS) * 9


def test_who_leaves_does_not_wait(source: str) -> None:
    slow = Cut(Query("slow", "pg_sleep(60)", "", "", ""), "pg_sleep(60)", Where(), sized=False)
    began = time.monotonic()
    with psycopg.connect(source, autocommit=True) as conn:
        with pytest.raises(KeyboardInterrupt), opened(source) as one:
            one.cursors.asked(slow)
            while conn.execute(_WORKING).fetchone() != (1,):
                assert time.monotonic() - began < 30
            raise KeyboardInterrupt
        while conn.execute(_WORKING).fetchone() != (0,):
            assert time.monotonic() - began < 30


def test_an_error_of_the_server(source: str) -> None:
    with opened(source) as one, pytest.raises(SourceError, match="division by zero"), one.errors():
        list(one.cursors.each("wrong", "SELECT 1 / (thread_id = '')::int FROM checkpoints"))
