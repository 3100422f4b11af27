"""Killed at any instant and run again, the store in the target is the one of one clean run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from persistence import transfer
from persistence.errors import ConflictError, TransferError
from tests.transfer import make, stores
from tests.transfer.stores import BOTH, STORE
from tests.transfer.test_resume import finish, source

__all__ = ["source"]

# The engine with tiny batches, and a place to die: before a batch of items, with its rows and its entry in
# the ledger written but not committed, or after its commit.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from persistence import transfer
from persistence.backends.postgres.transfer_sink import PostgresSink
from persistence.backends.postgres.transfer_store import PostgresStoreSink
from persistence.backends.sqlite.transfer_sink import SqliteSink
from persistence.backends.sqlite.transfer_store import SqliteStoreSink
from persistence.transfer import engine
engine.BATCH_RECORDS = 9
source, target, include, die_at = sys.argv[1:5]
steps = 0
def step():
    global steps
    steps += 1
    if steps == int(die_at):
        os.kill(os.getpid(), signal.SIGKILL)
def trace(kind, sink):
    write, enter = kind.write, sink.enter
    def traced_write(self, batch, rule):
        step()
        write(self, batch, rule)
        step()
    def traced_enter(self, where, entry, keys):
        enter(self, where, entry, keys)
        if entry.number < 0:
            step()
    kind.write, sink.enter = traced_write, traced_enter
trace(PostgresStoreSink, PostgresSink)
trace(SqliteStoreSink, SqliteSink)
print("ready", flush=True)
options = transfer.Options(include=include.split(","))
print(transfer.migrate(Path(source), target, options=options).to_json())
"""


def run(source: Path, target: str, *, die_at: int = 0, include: str = "store") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(source), target, include, str(die_at)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def stored(source: Path) -> Path:
    """Threads, and 37 items: five batches."""
    stores.fill(source)
    with stores.sqlite_store(source) as store:
        for number in range(20):
            store.put(("more",), f"k{number:02}", {"n": number})
    return source


@pytest.fixture(params=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        dsn: str = request.getfixturevalue("postgres_dsn")
        return dsn
    return f"sqlite:///{tmp_path}/killed.db"


def other(target: str) -> str:
    return target.replace("killed.db", "clean.db") if "killed" in target else f"{target}&schema=clean"


def rows(target: str) -> Any:
    """All of the store and of the ledger."""
    if target.startswith("sqlite"):
        return stores.rows(Path(target.removeprefix("sqlite:///")))
    dsn, _, schema = target.partition("&schema=")
    with psycopg.connect(dsn) as conn:
        return [
            conn.execute(query.format(schema or "public").encode()).fetchall()
            for query in (
                'SELECT * FROM {}.store ORDER BY prefix COLLATE "C", key COLLATE "C"',
                "SELECT batch_no, digest FROM {}.persistence_transfer_batches ORDER BY 1",
            )
        ]


def test_killed_around_every_commit(stored: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    transfer.migrate(stored, other(target), options=BOTH)
    # Before, inside and after the transaction of a batch, in turn; each run goes on where the last one died.
    for die_at in [1, 2, 3]:
        assert finish(run(stored, target, die_at=die_at, include="checkpoints,store")) == -signal.SIGKILL
    assert finish(run(stored, target, include="checkpoints,store")) == 0
    assert rows(target) == rows(other(target))
    report = transfer.migrate(stored, target, options=BOTH)
    assert (report.already_done, report.verified) == (True, True)


def test_killed_at_random_instants(stored: Path, target: str) -> None:
    choose = random.Random(5)  # noqa: S311 - instants, not secrets
    for _ in range(2):
        process = run(stored, target)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(choose.uniform(0, 0.8))
        process.kill()
        process.communicate()
    assert finish(run(stored, target)) == 0
    assert transfer.verify(stored, target, include=["store"]).equal
    assert stores.items_of(target) == stores.items_of(f"sqlite:///{stored}")


def test_resumed_after_the_application_has_changed_items(stored: Path, tmp_path: Path) -> None:
    """What was moved and then changed is a conflict for a new run, not for the one that goes on."""
    target = tmp_path / "killed.db"
    assert finish(run(stored, f"sqlite:///{target}", die_at=6)) == -signal.SIGKILL
    batches = len(stores.rows(target)["ledger"])
    assert batches == 2
    make.execute(target, "UPDATE store SET value = '{}' WHERE key = ''")
    changed = tmp_path / "changed.db"
    changed.write_bytes(stored.read_bytes())
    make.execute(changed, "DELETE FROM store WHERE key = 'k19'")
    with pytest.raises(ConflictError, match="namespace 'Users', key ''"):
        transfer.migrate(changed, f"sqlite:///{target}", options=STORE)
    report = transfer.migrate(stored, f"sqlite:///{target}", options=STORE, verify=False)
    assert report.batches_skipped == 2
    verdict = transfer.verify(stored, target, include=["store"])
    assert [str(d) for d in verdict.item_differences] == [
        "namespace 'Users', key '' of the store: differs in value"
    ]


def test_batches_that_are_not_the_same_are_refused(stored: Path, tmp_path: Path) -> None:
    target = tmp_path / "killed.db"
    assert finish(run(stored, f"sqlite:///{target}", die_at=6)) == -signal.SIGKILL
    make.execute(target, "UPDATE persistence_transfer_batches SET digest = 'x' WHERE batch_no = -1")
    with pytest.raises(TransferError, match="batch -1"):
        transfer.migrate(stored, f"sqlite:///{target}", options=STORE)


def test_items_written_meanwhile_are_a_conflict(
    stored: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application is already running on the target: its item is not overwritten."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    written = False

    def write_to_target(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        nonlocal written
        if phase == "write" and not written:
            written = True
            import persistence

            with persistence.open(target) as db:
                assert db.store is not None
                db.store.put(("more",), "k07", {"from": "the application"})

    with pytest.raises(ConflictError, match="already has another item in namespace 'more', key 'k07'"):
        transfer.migrate(stored, target, options=BOTH, progress=write_to_target)
    found = stores.items_of(target)
    assert found[("more",), "k07"][0] == {"from": "the application"}
    assert transfer.migrate(stored, target, options=replace(BOTH, on_conflict="merge")).verified
    assert stores.items_of(target)[("more",), "k07"][0] == {"from": "the application"}
