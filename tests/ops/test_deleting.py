"""Whoever deletes while another builds on what is deleted: no stored checkpoint loses a value."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import psycopg
import pytest

import persistence
from persistence import transfer
from persistence.errors import ConflictError
from persistence.testing.subject import LoopThread, at, bare
from tests.support import fresh_database

_PATIENCE = 60
OLD, NEW = {"kept": ["old"], "other": ["old"]}, {"kept": ["new"], "other": ["old"]}
FORK = {"kept": ["old"], "other": ["fork"]}
DELETE: dict[str, Callable[[Any, str], None]] = {
    "prune": lambda saver, thread: saver.prune([thread]),
    "run": lambda saver, thread: saver.delete_for_runs([thread]),
    "thread": lambda saver, thread: saver.delete_thread(thread),
}
WHEN = {
    "who puts": "BEFORE INSERT ON checkpoints FOR EACH ROW",
    "who deletes": "BEFORE DELETE ON checkpoint_blobs FOR EACH STATEMENT",
}
FRESH = map("thread {}".format, itertools.count())


class Place(NamedTuple):
    """A database with two savers, and a connection for which waits whoever does what :meth:`hold` says."""

    putting: Any
    deleting: Any
    """Of the other colour."""
    watch: psycopg.Connection[Any]
    dsn: str

    def hold(self, what: str) -> None:
        self.watch.execute(f"CREATE OR REPLACE TRIGGER held {what} EXECUTE FUNCTION held()")
        self.watch.execute("SELECT pg_advisory_lock(1)")

    def let_go(self, what: str) -> None:
        self.watch.execute("SELECT pg_advisory_unlock(1)")
        self.watch.execute(f"DROP TRIGGER held ON {what.split()[3]}")

    def until_waiting(self, number: int, task: Future[Any]) -> None:
        """So many wait for a lock; or the task is over, as it did not have to."""
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        waiting += " AND datname = current_database()"
        while not task.done() and self.watch.execute(waiting).fetchall()[0][0] < number:
            time.sleep(0.001)


@pytest.fixture(scope="module", params=["read committed", "repeatable read"])
def place(request: pytest.FixtureRequest, postgres_server: str) -> Iterator[Place]:
    """Whatever isolation the database has by default."""
    loop = LoopThread()
    isolation = quote(request.param.replace(" ", "\\ "))
    with fresh_database(postgres_server) as plain:
        dsn = f"{plain}&options=-c%20default_transaction_isolation%3D{isolation}"
        db = persistence.open(dsn)
        other = loop.run(persistence.aopen(dsn).__aenter__())
        with psycopg.connect(dsn, autocommit=True) as watch:
            watch.execute("""
                CREATE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                    PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW;
                END $$""")
            yield Place(db.checkpointer, other.checkpointer, watch, dsn)
        loop.run(other.__aexit__(None, None, None))
        db.close()
    loop.stop()


def put(saver: Any, config: Any, id_: str, values: Any, versions: Any, new: Any = None) -> None:
    run = config["configurable"]["thread_id"] if id_ == "1" else "another"
    saver.put(config, bare(id_, values, versions), {"run_id": run}, versions if new is None else new)


@pytest.mark.parametrize("known", ["by the saver", "by the parent", "by its version", "by its value"])
@pytest.mark.parametrize("first", WHEN)
@pytest.mark.parametrize("delete", DELETE)
def test_who_builds_on_what_is_deleted_loses_nothing(
    place: Place, delete: str, first: str, known: str
) -> None:
    """A fork of an old checkpoint keeps one of its values, which is found in one of four ways."""
    thread = next(FRESH)
    put(place.deleting, at(thread), "1", OLD, {"kept": "1", "other": "1"})
    put(place.deleting, at(thread, "1"), "2", NEW, {"kept": "2", "other": "1"}, {"kept": "2"})
    if known == "by the saver":
        place.putting.get_tuple(at(thread, "1"))
    parent = "nowhere" if known == "by its version" else "1"
    new = None if known == "by its value" else {"other": "3"}

    def fork() -> None:
        put(place.putting, at(thread, parent), "3", FORK, {"kept": "1", "other": "3"}, new)

    def remove() -> None:
        DELETE[delete](place.deleting, thread)

    begin, follow = (fork, remove) if first == "who puts" else (remove, fork)
    with ThreadPoolExecutor(2) as threads:
        place.hold(WHEN[first])
        one = threads.submit(begin)
        place.until_waiting(1, one)
        assert not one.done()
        other = threads.submit(follow)
        place.until_waiting(2, other)
        place.let_go(WHEN[first])
        one.result(_PATIENCE)
        other.result(_PATIENCE)
    found = {f.checkpoint["id"]: f.checkpoint["channel_values"] for f in place.putting.list(at(thread))}
    assert found == {id_: {"1": OLD, "2": NEW, "3": FORK}[id_] for id_ in found}
    assert delete == "thread" or "3" in found


@pytest.mark.parametrize("delete", ["prune", "run"])
def test_who_builds_on_what_is_deleted_is_seen_even_if_it_needs_no_value(place: Place, delete: str) -> None:
    """It could need the writes of its ancestors; here it loses its parent, as whoever was there before."""
    thread, versions = next(FRESH), {"kept": "1"}
    put(place.deleting, at(thread), "1", {"kept": "in the row"}, versions)
    put(place.deleting, at(thread, "1"), "2", {"kept": "too"}, {"kept": "2"})
    with ThreadPoolExecutor(2) as threads:
        place.hold(WHEN["who puts"])
        one = threads.submit(put, place.putting, at(thread, "1"), "3", {"kept": "in the row"}, versions, {})
        place.until_waiting(1, one)
        other = threads.submit(DELETE[delete], place.deleting, thread)
        place.until_waiting(2, other)
        place.let_go(WHEN["who puts"])
        one.result(_PATIENCE)
        other.result(_PATIENCE)
    found = place.putting.get_tuple(at(thread))
    assert found.checkpoint["channel_values"] == {"kept": "in the row"}
    assert found.parent_config is None


@pytest.mark.parametrize("delete", DELETE)
@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_what_a_saver_remembers_is_not_taken_for_stored_once_another_has_deleted_it(
    request: pytest.FixtureRequest, tmp_path: Path, delete: str, backend: str
) -> None:
    """Two savers as in two processes; the parent goes, and so may the values of its versions."""
    dsn = request.getfixturevalue("postgres_dsn") if backend == "postgres" else f"sqlite:///{tmp_path}/x.db"
    thread = next(FRESH)
    with persistence.open(dsn) as here, persistence.open(dsn) as there:
        mine, theirs = here.checkpointer, there.checkpointer
        assert mine is not None
        put(mine, at(thread), "1", OLD, {"kept": "1", "other": "1"})
        put(theirs, at(thread), "2", NEW, {"kept": "2", "other": "2"})
        DELETE[delete](theirs, thread)
        put(mine, at(thread, "1"), "3", FORK, {"kept": "1", "other": "3"}, {"other": "3"})
        found = mine.get_tuple(at(thread))
        assert found is not None
        assert found.checkpoint["channel_values"] == FORK
        assert mine.get_tuple(at(thread, "1")) is None


@pytest.mark.parametrize("follows", [False, True], ids=["replace", "follow"])
def test_who_builds_on_what_a_transfer_replaces_loses_nothing(
    place: Place, tmp_path: Path, *, follows: bool
) -> None:
    """The transfer is refused."""
    thread, source = next(FRESH), f"sqlite:///{tmp_path}/source.db"

    def move() -> object:
        if follows:
            stop = threading.Event()
            return transfer.follow(source, place.dsn, stop=stop, told=lambda _: stop.set())
        return transfer.migrate(source, place.dsn, options=transfer.Options(on_conflict="replace"))

    with persistence.open(source) as db:
        saver: Any = db.checkpointer
        put(saver, at(thread), "1", OLD, {"kept": "1", "other": "1"})
        if follows:
            move()
            saver.delete_thread(thread)
        else:
            put(place.deleting, at(thread), "1", OLD, {"kept": "1", "other": "1"})
        put(saver, at(thread), "2", NEW, {"kept": "2", "other": "1"})
    place.putting.get_tuple(at(thread))
    with ThreadPoolExecutor(2) as threads:
        place.hold(WHEN["who puts"])
        fork = (place.putting, at(thread, "1"), "3", FORK, {"kept": "1", "other": "3"}, {"other": "3"})
        one = threads.submit(put, *fork)
        place.until_waiting(1, one)
        other = threads.submit(move)
        place.until_waiting(2, other)
        place.let_go(WHEN["who puts"])
        one.result(_PATIENCE)
        with pytest.raises(ConflictError, match=f"somebody has written to thread '{thread}'"):
            other.result(_PATIENCE)
    found = {f.checkpoint["id"]: f.checkpoint["channel_values"] for f in place.putting.list(at(thread))}
    assert found == {"1": OLD, "3": FORK}
