"""Ten processes, and several threads, set up one empty database at the same moment."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest

from persistence import schema
from persistence.errors import SchemaError
from tests.schema.conftest import Place
from tests.warm import Warm

PROCESSES = 10
ROUNDS = 3

# Imports and waits first, so that all begin at the same moment when told to.
WORKER = """
import sys
from persistence import schema
from persistence.registry import provider_for
from persistence.settings import Settings
import alembic.command, langgraph.checkpoint.sqlite, langgraph.store.sqlite
import langgraph.checkpoint.postgres, langgraph.store.postgres
print("ready", flush=True)
for line in sys.stdin:
    dsn, name = line.rstrip("\\n").split("\\t")
    try:
        report = schema.setup(provider_for(dsn, Settings(db_schema=name or None)))
        print("changed" if report.changes else "nothing", flush=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}".replace("\\n", " "), flush=True)
"""

Worker = subprocess.Popen[str]
Start = Callable[[int], list[Worker]]


@pytest.fixture(scope="module")
def start(warm: Warm) -> Iterator[Start]:
    """Start worker processes that wait for their first line."""
    with ExitStack() as stack:

        def begin(count: int) -> list[Worker]:
            workers = []
            for _ in range(count):
                worker = subprocess.Popen(
                    [warm.python, "-c", WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                stack.enter_context(worker)
                stack.callback(worker.kill)
                workers.append(worker)
            for worker in workers:
                assert _answer(worker) == "ready"
            return workers

        yield begin


@pytest.fixture(scope="module")
def workers(start: Start) -> list[Worker]:
    """Starting them takes far longer than what they are for."""
    return start(PROCESSES)


def _tell(worker: Worker, place: Place) -> None:
    assert worker.stdin is not None
    worker.stdin.write(f"{place.dsn}\t{place.schema or ''}\n")
    worker.stdin.flush()


def _answer(worker: Worker) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def _empty_places(kind: str, postgres_dsn: str, folder: Path) -> Iterator[Place]:
    if kind == "postgres":
        yield Place(postgres_dsn)
    for number in range(ROUNDS):
        if kind == "postgres":
            yield Place(postgres_dsn, schema=f"round {number}")
        else:
            yield Place(f"sqlite:///{folder}/{number}.db", path=folder / f"{number}.db")


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_ten_processes_at_once(kind: str, workers: list[Worker], postgres_dsn: str, tmp_path: Path) -> None:
    for place in _empty_places(kind, postgres_dsn, tmp_path):
        for worker in workers:
            _tell(worker, place)
        answers = [_answer(worker) for worker in workers]
        assert set(answers) <= {"changed", "nothing"}, answers
        assert "changed" in answers
        assert schema.check(place.provider) == []


def test_a_process_killed_in_the_middle_leaves_work_that_the_others_finish(
    start: Start, workers: list[Worker], postgres_dsn: str, tmp_path: Path
) -> None:
    kinds = ("sqlite", "postgres")
    places = [place for kind in kinds for place in _empty_places(kind, postgres_dsn, tmp_path)]
    for place, victim in zip(places, start(len(places)), strict=True):
        others = workers[:2]
        for worker in (victim, *others):
            _tell(worker, place)
        time.sleep(random.uniform(0, 0.05))  # noqa: S311 - a different instant each time
        victim.kill()
        answers = [_answer(worker) for worker in others]
        assert set(answers) <= {"changed", "nothing"}, answers
        assert schema.check(place.provider) == []


def test_threads_of_one_process_set_up_databases_of_their_own(tmp_path: Path, postgres_dsn: str) -> None:
    """Alembic keeps its environment in module globals."""
    places = [Place(f"sqlite:///{tmp_path}/{number}.db") for number in range(4)]
    places += [Place(postgres_dsn, schema=f"thread {number}") for number in range(2)]
    together = threading.Barrier(len(places))
    failed: list[BaseException] = []

    def run(place: Place) -> None:
        together.wait()
        try:
            schema.setup(place.provider)
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert [schema.check(place.provider) for place in places] == [[]] * len(places)


def test_the_wait_for_another_setup_is_bounded(
    either_postgres: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persistence.backends.postgres.tables import PostgresTables

    monkeypatch.setattr(PostgresTables, "lock_timeout", 0.5)
    with either_postgres.provider.tables() as tables, tables.setup_lock():
        began = time.monotonic()
        with pytest.raises(SchemaError, match=r"another process has been setting up .* 0.5 s"):
            schema.setup(either_postgres.provider)
        assert time.monotonic() - began < 10
    schema.setup(either_postgres.provider)


def test_two_schemas_do_not_wait_for_each_other(postgres_dsn: str) -> None:
    one, two = Place(postgres_dsn, schema="one"), Place(postgres_dsn, schema="two")
    with one.provider.tables() as tables, tables.setup_lock():
        schema.setup(two.provider)


def test_no_schema_and_the_schema_that_it_means_wait_for_each_other(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persistence.backends.postgres.tables import PostgresTables

    monkeypatch.setattr(PostgresTables, "lock_timeout", 0.3)
    with (
        Place(postgres_dsn).provider.tables() as tables,
        tables.setup_lock(),
        pytest.raises(SchemaError, match="another process"),
    ):
        schema.setup(Place(postgres_dsn, schema="public").provider)


def test_the_holder_of_the_lock_holds_no_snapshot(postgres_place: Place) -> None:
    """``CREATE INDEX CONCURRENTLY`` waits for every snapshot older than its own, for ever if need be."""
    with postgres_place.provider.tables() as tables, tables.setup_lock():
        rows = postgres_place.run(
            "SELECT state, backend_xmin FROM pg_stat_activity"
            " WHERE application_name LIKE 'langgraph-persistence%' AND state LIKE 'idle in transaction%'"
        )
        assert rows == [("idle in transaction", None)]


def test_a_server_that_ends_idle_transactions_does_not_end_the_lock(postgres_place: Place) -> None:
    database = postgres_place.run("SELECT current_database()")[0][0]
    postgres_place.run(f"ALTER DATABASE {database} SET idle_in_transaction_session_timeout = '100ms'")
    with postgres_place.provider.tables() as tables, tables.setup_lock():
        time.sleep(0.5)
        with closing(psycopg.connect(postgres_place.dsn)) as connection:
            held = connection.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone()
    assert held == (1,)
