"""A store followed while an application goes on writing to it, and cut over: nothing is lost."""

from __future__ import annotations

import random
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.store.sqlite import SqliteStore

import persistence
from persistence import transfer
from persistence.backends.sqlite.transfer_store_follower import SqliteStoreFollower
from persistence.errors import (
    ConflictError,
    SealedError,
    TransferError,
    VerificationError,
)
from persistence.transfer.options import THREADS, Part
from persistence.transfer.preflight import RefusedError
from tests.support import COMMAND, fresh_database
from tests.transfer import make, store_writer, stores
from tests.transfer.conftest import file_rows, rows
from tests.transfer.stores import items_of
from tests.transfer.targets import Target
from tests.transfer.test_cut_over import IN_PLACE, once, triggers
from tests.transfer.test_follow import KILLS, Writer, kill, stopped

BOTH: Sequence[Part] = ("checkpoints", "store")
STORE: Sequence[Part] = ("store",)
AT = ("facts",)
REFUSED = (sqlite3.IntegrityError, psycopg.IntegrityError)


@pytest.fixture
def source(database: Path) -> Path:
    """Threads, and items of many kinds."""
    fill(database)
    return database


def fill(path: Path) -> None:
    stores.fill(path)
    with stores.sqlite_store(path) as store:
        for key in ("changed", "deleted", "kept"):
            store.put(AT, key, {"text": "first"})


@pytest.fixture
def file(tmp_path: Path) -> str:
    """An empty target where it does not matter which."""
    return f"sqlite:///{tmp_path / 'target.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest) -> str:
    dsn: str = request.getfixturevalue("file" if request.param == "sqlite" else "postgres_dsn")
    return dsn


@pytest.fixture(scope="module")
def template(postgres_server: str, filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres database with the same; not to be changed."""
    path = Path(shutil.copy(filled, tmp_path_factory.mktemp("stored") / "chat.db"))
    fill(path)
    with fresh_database(postgres_server) as dsn:
        transfer.migrate(path, dsn, options=stores.BOTH)
        yield dsn


@pytest.fixture
def database_source(template: str, postgres_server: str) -> Iterator[str]:
    """A copy of it that a test may change."""
    with fresh_database(postgres_server, template) as dsn:
        yield dsn


@pytest.fixture(params=["sqlite", "postgres"])
def either(request: pytest.FixtureRequest) -> Path | str:
    """Where it is the same for both sources."""
    name = "source" if request.param == "sqlite" else "database_source"
    found: Path | str = request.getfixturevalue(name)
    return found


class StoreWriter(Writer):
    """A process of :mod:`tests.transfer.store_writer`, and the items that it was told are stored."""

    module = "tests.transfer.store_writer"

    def _read(self) -> None:
        self.items: dict[str, int] = {}
        assert self._process.stdout is not None
        for line in self._process.stdout:
            match line.split():
                case ["+", key, number]:
                    self.items[key] = int(number)
                case ["-", key]:
                    self.items.pop(key, None)
            self.lines += 1


def follow(
    source: Path | str,
    target: str,
    rounds: int = 1,
    then: Callable[[transfer.Round], None] | None = None,
    include: Sequence[Part] | None = BOTH,
    **options: Any,
) -> transfer.Round:
    """Follow until so many rounds were done; gives the last."""
    stop, done = stopped(), 0
    stop.clear()

    def told(found: transfer.Round) -> None:
        nonlocal done
        done += 1
        if then is not None:
            then(found)
        if done >= rounds:
            stop.set()

    return transfer.follow(
        source, target, interval=0.1, include=include, stop=stop, told=told, **options
    ).last


def put(side: Path | str, key: str, text: str, **more: Any) -> None:
    with stores.official(side) as store:
        store.put(AT, key, {"text": text}, **more)


def delete(side: Path | str, key: str) -> None:
    with stores.official(side) as store:
        store.delete(AT, key)


def texts(dsn: str) -> dict[str, Any]:
    return {key: found[0]["text"] for (at, key), found in stores.official_items_of(dsn).items() if at == AT}


def require_equal(source: Path | str, target: str) -> None:
    """By our digests, by what both stores show, and by what only the rows hold."""
    assert transfer.verify(source, target, include=BOTH).equal
    assert items_of(target) == stores.official_items_of(stores.dsn_of(source))
    assert stores.times_to_live(target) == stores.times_to_live(stores.dsn_of(source))


def require_acknowledged(writer: StoreWriter, target: str) -> None:
    found = stores.official_items_of(target)
    live = {key: value["n"] for (at, key), (value, *_) in found.items() if at == store_writer.NAMESPACE}
    assert live == writer.items
    assert live


@pytest.mark.parametrize("kind", ["official", "ours"])
def test_an_application_goes_on_writing(kind: str, source: Path, postgres_dsn: str) -> None:
    with StoreWriter(source, kind) as writer:
        follow(source, postgres_dsn, 2, lambda _: writer.wait_for(10))
        done = transfer.cut_over(source, postgres_dsn, told=lambda _: writer.wait_for(10))
    assert done.sealed
    require_equal(source, postgres_dsn)
    require_acknowledged(writer, postgres_dsn)
    transfer.undo(done.run_id, postgres_dsn)
    assert stores.official_items_of(postgres_dsn) == {}
    assert not any(rows(postgres_dsn).values())
    assert done.last is not None
    sys.stdout.write(f"{kind}: write pause {done.pause_seconds:.3f} s with {done.last.items} items left\n")


def test_killed_at_random_instants(source: Path, postgres_dsn: str) -> None:
    """Followers, and cut-overs, of which the last may be through."""
    choose = random.Random(19)  # noqa: S311 - instants, not secrets
    include = ["--include", "checkpoints", "--include", "store"]
    command = [COMMAND, "migrate", f"sqlite:///{source}", postgres_dsn, "--follow", *include]
    commands = [[*command, "--follow-interval", "0.1"], [COMMAND, "cut-over", *command[2:4], *include]]
    with StoreWriter(source, "official") as writer:
        for number in range(KILLS):
            if not kill(commands[number % 2], choose.uniform(0.5, 2.0)):
                break  # a cut-over that was quicker
        transfer.cut_over(source, postgres_dsn, include=BOTH)
    require_equal(source, postgres_dsn)
    require_acknowledged(writer, postgres_dsn)
    with closing(sqlite3.connect(source)) as conn:
        notes = conn.execute("SELECT name FROM sqlite_master WHERE name LIKE 'persistence_changed%'")
        assert notes.fetchall() == []


def test_interrupted_at_each_commit(source: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first copy of the store, which ends after each batch in turn, before and after its commit."""
    apply, left = SqliteStoreFollower.apply, 0
    monkeypatch.setattr("persistence.transfer.follow_store._ITEMS_AT_ONCE", 5)

    def ends(self: SqliteStoreFollower, changes: Any) -> None:
        if left == 1:
            raise KeyboardInterrupt
        apply(self, changes)
        if left == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SqliteStoreFollower, "apply", ends)
        for number in range(4):
            left = number % 2
            with pytest.raises(KeyboardInterrupt):
                follow(source, file)
    assert 0 < len(stores.official_items_of(file)) < len(stores.official_items_of(f"sqlite:///{source}"))
    follow(source, file)
    require_equal(source, file)
    assert len(transfer.runs(file)) == 1


def test_what_a_round_finds(either: Path | str, target: str) -> None:
    follow(either, target)
    assert follow(either, target).items == 0
    put(either, "added", "new", ttl=60)
    put(either, "changed", "other")
    delete(either, "deleted")
    soon = "UPDATE store SET expires_at = '2031-01-01 00:00:00' WHERE key = 'soon'"
    Target(stores.dsn_of(either)).execute(soon)
    assert follow(either, target).items == 4
    require_equal(either, target)
    assert texts(target) == {"added": "new", "changed": "other", "kept": "first"}


def test_a_file_that_was_vacuumed(source: Path, file: str) -> None:
    """Every item has another rowid, and none is written."""
    follow(source, file)
    delete(source, "changed")
    make.execute(source, "VACUUM")
    assert follow(source, file).items == 1
    require_equal(source, file)


def test_a_change_that_no_stamp_shows(source: Path, target: str) -> None:
    follow(source, target)
    put(source, "long", "x" * 100)
    follow(source, target)
    other = """CAST(replace(CAST(value AS TEXT), 'xx"', 'yy"') AS BLOB)"""
    make.execute(source, f"UPDATE store SET value = {other} WHERE key = 'long'")
    follow(source, target)
    assert texts(target)["long"].endswith("xx")
    assert transfer.cut_over(source, target).mended == 1
    assert texts(target)["long"].endswith("yy")
    require_equal(source, target)


def test_changed_during_the_cut_over(source: Path, target: str) -> None:
    """Also the newest item deleted and put again: the same rowid, moments, length and beginning."""
    put(source, "newest", "x" * 100 + "1")
    with closing(sqlite3.connect(source)) as conn:
        (at, rowid) = conn.execute("SELECT updated_at, rowid FROM store WHERE key = 'newest'").fetchone()

    def change() -> None:
        delete(source, "newest")
        put(source, "newest", "x" * 100 + "2")
        make.execute(source, "UPDATE store SET created_at = ?, updated_at = ? WHERE key = 'newest'", at, at)
        with closing(sqlite3.connect(source)) as conn:
            assert conn.execute("SELECT rowid FROM store WHERE key = 'newest'").fetchone() == (rowid,)
        delete(source, "deleted")
        put(source, "added", "new")

    follow(source, target)
    done = transfer.cut_over(source, target, told=once(change))
    assert done.mended == 1
    require_equal(source, target)


def test_a_target_that_has_an_item(source: Path, target: str) -> None:
    """The very item, too: it is not this run's."""
    options = transfer.Options(include=STORE)
    transfer.migrate(source, target, options=options)
    before, threads = stores.official_items_of(target), Target(target).rows()
    with pytest.raises(ConflictError, match=r"already has an item in namespace"):
        follow(source, target)
    assert stores.official_items_of(target) == before
    assert Target(target).rows() == threads


@pytest.mark.parametrize("key", ["changed", "added"])
def test_somebody_else_wrote_to_the_target(key: str, source: Path, target: str) -> None:
    follow(source, target)
    with persistence.open(target) as db:
        store: Any = db.store
        store.put(AT, key, {"text": "theirs"})
    put(source, key, "ours")
    with pytest.raises(ConflictError, match=f"key '{key}' .* not as this transfer left it"):
        follow(source, target)
    assert texts(target)[key] == "theirs"


@pytest.mark.parametrize("gone", [False, True])
def test_somebody_else_wrote_before_the_cut_over(gone: bool, source: Path, target: str) -> None:
    follow(source, target)
    with persistence.open(target) as db:
        store: Any = db.store
        store.put(AT, "kept", None if gone else {"text": "theirs"})
    with pytest.raises(ConflictError, match=r"key 'kept' .* not as this transfer left it"):
        transfer.cut_over(source, target)
    assert triggers(source) == []
    put(source, "goes on", "x")


@pytest.mark.parametrize("gone", [False, True])
def test_somebody_else_wrote_during_the_cut_over(gone: bool, source: Path, target: str) -> None:
    """After the comparison; no content is compared under the lock."""

    def write() -> None:
        with persistence.open(target) as db:
            store: Any = db.store
            store.put(AT, "kept", None if gone else {"text": "theirs"})

    make.execute(source, "UPDATE store SET updated_at = '2020-01-01 00:00:00' WHERE key = 'kept'")
    with pytest.raises(VerificationError, match=r"key 'kept' .* by somebody else"):
        transfer.cut_over(source, target, include=BOTH, told=once(write))
    assert triggers(source) == []
    put(source, "goes on", "x")


def test_a_claim_that_was_lost(source: Path, file: str) -> None:
    lose = "DELETE FROM persistence_followed_items WHERE key = 'kept'"
    with pytest.raises(VerificationError, match=r"items of the store were brought to .*, the source has"):
        transfer.cut_over(source, file, include=BOTH, told=once(lambda: Target(file).execute(lose)))
    assert triggers(source) == []


def test_items_that_were_deleted_by_hand(source: Path, file: str) -> None:
    """A run of which nothing is left does not count; one of which some is left goes on, and is a conflict."""
    follow(source, file, include=STORE)
    Target(file).execute("DELETE FROM store WHERE key <> 'kept'")
    with pytest.raises(ConflictError, match="not as this transfer left it"):
        transfer.cut_over(source, file, include=STORE)
    Target(file).execute("DELETE FROM store")
    assert transfer.cut_over(source, file, include=STORE).sealed
    assert len(transfer.runs(file)) == 2
    assert transfer.verify(source, file, include=STORE).equal


def test_an_item_that_expired_in_the_target(source: Path, target: str) -> None:
    """Its own store may delete it; the source has it still."""
    follow(source, target)
    swept = "DELETE FROM store WHERE key = 'gone'"
    Target(target).execute(swept)
    done = transfer.cut_over(source, target, told=once(lambda: Target(target).execute(swept)))
    assert done.sealed
    assert done.last is not None
    assert done.last.source_items == len(stores.official_items_of(f"sqlite:///{source}"))


def test_what_the_target_cannot_hold(source: Path, postgres_dsn: str) -> None:
    put(source, "bad", "nul \0")
    with pytest.raises(RefusedError, match="NUL"):
        follow(source, postgres_dsn)
    delete(source, "bad")
    follow(source, postgres_dsn)
    put(source, "bad", "nul \0")
    with pytest.raises(RefusedError, match=r"NUL.*goes on"):
        follow(source, postgres_dsn)
    delete(source, "bad")
    follow(source, postgres_dsn)
    require_equal(source, postgres_dsn)


def test_the_run_knows_what_it_follows(source: Path, file: str) -> None:
    follow(source, file)
    put(source, "added", "new")
    assert follow(source, file, include=None).items == 1
    for others in (STORE, THREADS):
        with pytest.raises(ConflictError, match="follows the threads and store of this source"):
            follow(source, file, include=others)
    with pytest.raises(ConflictError, match="not what is asked for"):
        transfer.cut_over(source, file, vectors=False)
    put(source, "changed", "other")
    assert transfer.cut_over(source, file).sealed
    require_equal(source, file)


def test_without_the_store(source: Path, file: str) -> None:
    """As plain migrations do, it takes threads unless it is told; and says what stays."""
    items = len(stores.official_items_of(f"sqlite:///{source}"))
    told: list[int] = []

    def one_more(done: transfer.Round) -> None:
        told.append(done.items_left_out)
        put(source, f"number {done.number}", "more")

    follow(source, file, 2, one_more, include=None)
    assert told == [items, items], "they are counted once"
    items += 2
    with pytest.raises(ConflictError, match="follows the threads of this source"):
        follow(source, file, include=BOTH)
    done = transfer.cut_over(source, file)
    assert done.last is not None
    assert (done.last.items_left_out, done.last.source_items) == (items, 0)
    assert stores.official_items_of(file) == {}
    put(source, "goes on", "x")


def test_only_the_store(either: Path | str, file: str) -> None:
    follow(either, file, include=STORE)
    before = file_rows(Path(file.removeprefix("sqlite:///")))
    with pytest.raises(ConflictError, match=r"follows this source"):
        transfer.migrate(either, file, options=transfer.Options(include=STORE))
    put(either, "changed", "other")
    done = transfer.cut_over(either, file)
    assert done.sealed
    assert file_rows(Path(file.removeprefix("sqlite:///"))) == before
    assert transfer.verify(either, file, include=STORE).equal
    with Target(stores.dsn_of(either)).official() as saver:
        make.put(saver, "goes on", {"c": ["x"]})
    with pytest.raises(REFUSED, match="has moved"):
        put(either, "changed", "again")
    transfer.undo(done.run_id, file)
    assert stores.official_items_of(file) == {}


def test_a_sealed_store(source: Path, file: str) -> None:
    transfer.cut_over(source, file, include=BOTH)
    found = stores.official_items_of(f"sqlite:///{source}")
    expiry = stores.times_to_live(f"sqlite:///{source}")
    with SqliteStore.from_conn_string(str(source), ttl=store_writer.TTL) as official:
        with pytest.raises(sqlite3.IntegrityError, match="has moved to sqlite"):
            official.put(AT, "new", {})
        with pytest.raises(sqlite3.IntegrityError, match="has moved to sqlite"):
            official.delete(AT, "kept")
        read = official.get(("users",), "soon")
        assert read is not None
        assert read.value == {"x": 1}
        assert official.search(("users",), query=None)
    with persistence.open(f"sqlite:///{source}") as db:
        ours: Any = db.store
        with pytest.raises(SealedError, match="persistence unseal"):
            ours.put(AT, "kept", {"text": "other"})
        with pytest.raises(SealedError):
            ours.delete(AT, "kept")
        assert ours.get(AT, "kept").value == {"text": "first"}
    assert stores.official_items_of(f"sqlite:///{source}") == found
    assert stores.times_to_live(f"sqlite:///{source}") == expiry, "a read puts nothing off"
    with pytest.raises(sqlite3.IntegrityError):
        make.execute(source, "UPDATE store SET value = '{}', expires_at = NULL")
    again = transfer.cut_over(source, file)
    assert (again.already_done, again.sealed) == (True, True)
    assert transfer.unseal(source)
    assert triggers(source) == []
    put(source, "new", "x")


def test_the_seal_of_one_part_keeps_that_of_the_other(source: Path, file: str, tmp_path: Path) -> None:
    transfer.cut_over(source, file, include=STORE)
    with make.database(source) as saver:
        make.put(saver, "changed", {"c": ["first"]})
    second = f"sqlite:///{tmp_path / 'second.db'}"
    done = transfer.cut_over(source, second, told=once(lambda: make.execute(source, IN_PLACE)))
    assert done.mended == 1
    assert transfer.verify(source, second).equal
    with pytest.raises(sqlite3.IntegrityError, match=r"has moved to .*target"):
        put(source, "new", "x")
    with (
        make.database(source) as saver,
        pytest.raises(sqlite3.IntegrityError, match=r"has moved to .*second"),
    ):
        make.put(saver, "new", {"c": ["x"]})


def test_a_cut_over_that_ended_after_the_seal(either: Path | str, file: str, monkeypatch: Any) -> None:
    follow(either, file)
    with monkeypatch.context() as patch:
        patch.setattr("persistence.transfer.ledger.Ledger.advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transfer.cut_over(either, file)
    with pytest.raises(REFUSED, match="has moved"):
        put(either, "new", "x")
    done = transfer.cut_over(either, file)
    assert (done.already_done, done.sealed) == (False, True)
    require_equal(either, file)


def test_a_store_that_is_made_during_the_cut_over(database: Path, file: str) -> None:
    def set_up() -> None:
        stores.fill(database)

    with pytest.raises(TransferError, match=r"store .* set up during the cut-over.*run the command again"):
        transfer.cut_over(database, file, include=BOTH, told=once(set_up))
    assert triggers(database) == []
    transfer.cut_over(database, file)
    require_equal(database, file)


def test_undo_takes_what_the_run_brought(source: Path, target: str) -> None:
    with persistence.open(target) as db:
        store: Any = db.store
        store.put(AT, "theirs", {"text": "theirs"})
    before = stores.official_items_of(target)
    follow(source, target)
    put(source, "added", "new")
    put(source, "changed", "other")
    delete(source, "deleted")
    run = transfer.cut_over(source, target).run_id
    with persistence.open(target) as db:
        later: Any = db.store
        later.put(AT, "deleted", {"text": "first"})  # the run has deleted it itself
        later.put(AT, "kept", {"text": "written later"})
    undone = transfer.undo(run, target)
    assert undone.items == len(stores.official_items_of(f"sqlite:///{source}")) - 1
    assert undone.changed == 1
    assert texts(target) == {"theirs": "theirs", "deleted": "first", "kept": "written later"}
    assert before.items() <= stores.official_items_of(target).items()


def test_a_run_that_was_undone_is_followed_anew(source: Path, target: str) -> None:
    follow(source, target)
    (run,) = transfer.runs(target)
    transfer.undo(run.run_id, target)
    put(source, "changed", "other")
    follow(source, target)
    require_equal(source, target)


def test_another_store_beside(source: Path, postgres_dsn: str) -> None:
    """Items of others in the target, between those of the source, stay and are not compared."""
    with persistence.open(postgres_dsn) as db:
        store: Any = db.store
        for key in ("a", "m", "z"):
            store.put(AT, key, {"text": "theirs"})
    assert transfer.cut_over(source, postgres_dsn, include=BOTH).sealed
    assert transfer.verify(source, postgres_dsn, include=BOTH, subset=True).equal
    assert texts(postgres_dsn)["m"] == "theirs"
    with psycopg.connect(postgres_dsn) as conn:
        (brought,) = conn.execute("SELECT count(*) FROM persistence_followed_items").fetchone() or (0,)
    assert brought == len(stores.official_items_of(f"sqlite:///{source}"))
