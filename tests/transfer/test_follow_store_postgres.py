"""The store of a Postgres source is followed and sealed as that of a SQLite file is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.store.postgres import PostgresStore

import persistence
from persistence import schema, transfer
from persistence.backends.postgres import transfer_live
from persistence.backends.postgres.transfer_live_store import PostgresLiveStore
from persistence.errors import SealedError, TransferError, VerificationError
from persistence.registry import provider_for
from tests.support import COMMAND, fresh_database
from tests.transfer import make, store_writer, stores
from tests.transfer.targets import Target
from tests.transfer.test_cut_over import once
from tests.transfer.test_cut_over_postgres import execute, sealed
from tests.transfer.test_follow import KILLS, kill
from tests.transfer.test_follow_store import (
    AT,
    BOTH,
    STORE,
    StoreWriter,
    delete,
    file,
    follow,
    put,
    require_acknowledged,
    require_equal,
    target,
    texts,
)

__all__ = ["file", "target"]
ITEMS = 3


@pytest.fixture(scope="module")
def template(postgres_server: str) -> Iterator[str]:
    """A thread, and a few items; not to be changed."""
    with fresh_database(postgres_server) as dsn:
        schema.setup(provider_for(dsn))
        with Target(dsn).official() as saver:
            make.put(saver, "log", {"c": ["first"]})
        with stores.postgres_store(dsn) as store:
            store.setup()
            for key in ("changed", "deleted", "kept"):
                store.put(AT, key, {"text": "first"}, ttl=120)
        yield dsn


@pytest.fixture
def source(template: str, postgres_server: str) -> Iterator[str]:
    """A copy of it that a test may change."""
    with fresh_database(postgres_server, template) as dsn:
        yield dsn


@pytest.mark.parametrize(
    ("kind", "target"), [("official", "sqlite"), ("ours", "postgres")], indirect=["target"]
)
def test_an_application_goes_on_writing(kind: str, source: str, target: str) -> None:
    with StoreWriter(source, kind) as writer:
        follow(source, target, 2, lambda _: writer.wait_for(10))
        done = transfer.cut_over(source, target, told=lambda _: writer.wait_for(10))
    assert done.sealed
    assert done.mended == 0, "stamps show everything"
    require_equal(source, target)
    require_acknowledged(writer, target)
    transfer.undo(done.run_id, target)
    assert stores.official_items_of(target) == {}


def test_killed_at_random_instants(source: str, file: str) -> None:
    choose = random.Random(20)  # noqa: S311 - instants, not secrets
    include = ["--include", "checkpoints", "--include", "store"]
    commands = [
        [COMMAND, "cut-over", source, file, *include],
        [COMMAND, "migrate", source, file, "--follow", *include, "--follow-interval", "0.1"],
    ]
    with StoreWriter(source, "ours") as writer:
        for number in range((KILLS + 1) // 2):
            if not kill(commands[number % 2], choose.uniform(0.4, 1.2)):
                break  # a cut-over that was quicker
        transfer.cut_over(source, file, include=BOTH)
    require_equal(source, file)
    require_acknowledged(writer, file)


def test_a_transaction_that_commits_late(source: str, file: str) -> None:
    """It has a lower number than what was moved before."""
    with psycopg.connect(source) as conn:
        conn.execute("UPDATE store SET value = '{\"text\": \"other\"}' WHERE key = 'changed'")
        put(source, "added", "new")
        assert follow(source, file).items == ITEMS + 1
        conn.commit()
    assert follow(source, file).items == 1
    require_equal(source, file)


def test_whatever_is_changed_in_place_is_noticed(source: str, file: str) -> None:
    """Also where nothing has another length, or another time."""
    follow(source, file, include=STORE)
    for change in (
        "UPDATE store SET value = '{\"text\": \"other\"}' WHERE key = 'changed'",
        "UPDATE store SET ttl_minutes = 7 WHERE key = 'kept'",
        "WITH old AS (DELETE FROM store WHERE key = 'deleted' RETURNING *) SELECT count(*) FROM old",
    ):
        execute(source, change)
        assert follow(source, file, include=STORE).items == 1, change
        assert transfer.verify(source, file, include=STORE).equal, change
    with psycopg.connect(source, autocommit=True) as conn:
        conn.execute("VACUUM (FULL, FREEZE) store")
    assert follow(source, file, include=STORE).items == 0


def test_only_what_has_changed_is_read_under_the_lock(
    source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[str]] = []
    some = PostgresLiveStore.some

    def noted(self: PostgresLiveStore, keys: Any) -> Any:
        read.append([key for _, key in keys])
        return some(self, keys)

    def change() -> None:
        put(source, "added", "new")
        put(source, "changed", "other")
        delete(source, "deleted")
        read.clear()

    follow(source, target)
    monkeypatch.setattr(PostgresLiveStore, "some", noted)
    locked = transfer_live._locked

    def late(*args: Any) -> Any:
        change()
        return locked(*args)

    monkeypatch.setattr(transfer_live, "_locked", late)
    done = transfer.cut_over(source, target)
    assert read == [["added", "changed"]]
    assert done.last is not None
    assert (done.last.items, done.last.source_items) == (3, ITEMS)
    require_equal(source, target)


def test_somebody_else_wrote_to_the_target(source: str, file: str) -> None:
    """After the comparison: the source is not sealed."""
    follow(source, file)
    lose = once(lambda: Target(file).execute("DELETE FROM store WHERE key = 'kept'"))
    with pytest.raises(VerificationError, match=r"key 'kept' .* by somebody else"):
        transfer.cut_over(source, file, told=lose)
    assert sealed(source) == []
    put(source, "goes on", "x")


def test_a_sealed_store(source: str, file: str, tmp_path: Path) -> None:
    transfer.cut_over(source, file, include=BOTH)
    before, expiry = stores.official_items_of(source), stores.times_to_live(source)
    with PostgresStore.from_conn_string(source, ttl=store_writer.TTL) as official:
        with pytest.raises(psycopg.IntegrityError, match="has moved to sqlite"):
            official.put(AT, "new", {})
        with pytest.raises(psycopg.IntegrityError, match="has moved to sqlite"):
            official.delete(AT, "kept")
        read = official.get(AT, "kept")
        assert read is not None
        assert read.value == {"text": "first"}
        assert len(official.search(AT)) == ITEMS
    with persistence.open(source) as db:
        ours: Any = db.store
        with pytest.raises(SealedError, match="persistence unseal"):
            ours.put(AT, "kept", {"text": "other"})
        with pytest.raises(SealedError):
            ours.delete(AT, "kept")
        assert ours.get(AT, "kept").value == {"text": "first"}
        assert len(ours.search(AT)) == ITEMS
        assert db.health(60).status == "unavailable"
    for change in (
        "UPDATE store SET value = '{\"text\": \"other\"}', expires_at = NULL WHERE key = 'kept'",
        "UPDATE store SET ttl_minutes = NULL WHERE key = 'kept'",
        "DELETE FROM store WHERE false",
        "TRUNCATE store CASCADE",
    ):
        with pytest.raises(psycopg.IntegrityError, match="has moved"):
            execute(source, change)
    assert stores.official_items_of(source) == before
    assert stores.times_to_live(source) == expiry, "a read puts nothing off"
    assert transfer.migrate(source, f"sqlite:///{tmp_path / 'copy.db'}", options=stores.BOTH).verified
    again = transfer.cut_over(source, file)
    assert (again.already_done, again.sealed) == (True, True)
    assert transfer.unseal(source)
    assert sealed(source) == []
    put(source, "new", "x")


async def test_a_sealed_store_in_an_event_loop(source: str, file: str) -> None:
    transfer.cut_over(source, file, include=STORE)
    async with persistence.aopen(source) as db:
        ours: Any = db.store
        with pytest.raises(SealedError, match="persistence unseal"):
            await ours.aput(AT, "kept", {"text": "other"})
        assert (await ours.aget(AT, "kept")).value == {"text": "first"}
        assert (await db.health(60)).status == "unavailable"


def test_the_seal_of_one_part_keeps_that_of_the_other(source: str, file: str, tmp_path: Path) -> None:
    transfer.cut_over(source, file, include=STORE)
    with Target(source).official() as saver:
        make.put(saver, "goes on", {"c": ["x"]})
    second = f"sqlite:///{tmp_path / 'second.db'}"
    transfer.cut_over(source, second)
    with pytest.raises(psycopg.IntegrityError, match=r"has moved to .*target"):
        put(source, "new", "x")
    with Target(source).official() as saver, pytest.raises(psycopg.IntegrityError, match=r"to .*second"):
        make.put(saver, "new", {"c": ["x"]})
    assert transfer.unseal(source)
    assert sealed(source) == []


def test_a_role_lacks_rights_on_the_store(source: str, file: str, tmp_path: Path) -> None:
    """Reading is enough to follow; a cut-over needs more, on what it takes, and says so before it copies."""
    (name,) = execute(source, "SELECT 'r_' || md5(random()::text)")[0]
    reader = f"{source}&user={name}"
    threads = "checkpoints, checkpoint_blobs, checkpoint_writes"
    execute(source, f"CREATE ROLE {name} LOGIN", f"GRANT SELECT ON {threads}, store TO {name}")
    try:
        follow(reader, file, include=STORE)
        new = tmp_path / "new.db"
        for rights, lacking in (
            ("SELECT", "UPDATE or DELETE on store, to lock it"),
            ("DELETE", "TRIGGER on store, to seal it"),
            ("TRIGGER", "CREATE on the schema public, to seal it"),
        ):
            execute(source, f"GRANT {rights} ON store TO {name}")
            for side in (file, f"sqlite:///{new}"):
                include = None if side == file else STORE
                with pytest.raises(TransferError, match=lacking):
                    transfer.cut_over(reader, side, include=include)
        assert not new.exists()
        execute(source, f"GRANT CREATE ON SCHEMA public TO {name}")
        assert transfer.cut_over(reader, file).sealed
        assert sealed(source) == ["store", "store"]
        assert transfer.unseal(reader)
    finally:
        execute(source, f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


@pytest.mark.parametrize("late", [False, True])
def test_a_store_that_is_made_during_the_cut_over(
    late: bool, source: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the lock all of it is moved; after that the cut-over fails, and the next one moves it."""
    execute(source, "DROP TABLE store, store_migrations")
    locked = transfer_live._locked

    def set_up() -> None:
        with stores.postgres_store(source) as store:
            store.setup()
        put(source, "new", "x")

    def around(*args: Any) -> Any:
        if not late:
            set_up()
        lock = locked(*args)
        if late:
            set_up()
        return lock

    with monkeypatch.context() as patch:
        patch.setattr(transfer_live, "_locked", around)
        if not late:
            assert transfer.cut_over(source, file, include=BOTH).sealed
        else:
            with pytest.raises(TransferError, match=r"store .* set up during the cut-over.*run the command"):
                transfer.cut_over(source, file, include=BOTH)
            assert sealed(source) == []
    assert transfer.cut_over(source, file, include=BOTH).sealed
    assert texts(file) == {"new": "x"}
    with pytest.raises(psycopg.IntegrityError, match="has moved"):
        put(source, "later", "x")


def test_a_store_of_an_old_version(source: str, file: str) -> None:
    """Whose items do not expire: every statement is refused."""
    execute(source, "ALTER TABLE store DROP COLUMN expires_at, DROP COLUMN ttl_minutes")
    change = "UPDATE store SET value = '{\"text\": \"other\"}' WHERE key = 'changed'"
    follow(source, file)
    execute(source, change)
    assert follow(source, file).items == 1
    assert transfer.cut_over(source, file).sealed
    assert texts(file)["changed"] == "other"
    for statement in (change, "UPDATE store SET value = '{}' WHERE false"):
        with pytest.raises(psycopg.IntegrityError, match="has moved"):
            execute(source, statement)
    assert transfer.unseal(source)
    execute(source, change)


def test_within_one_database(source: str) -> None:
    """From one schema into another, with a role whose search path leads to neither."""
    into = f"{source}&schema=live"
    schema.setup(provider_for(into))
    done = transfer.cut_over(f"{source}&schema=public&options=-csearch_path%3Dpg_catalog", into, include=BOTH)
    assert done.sealed
    assert stores.official_items_of(into) == stores.official_items_of(source)
    with pytest.raises(psycopg.IntegrityError, match="has moved"):
        put(source, "new", "x")
    assert transfer.unseal(f"{source}&schema=public")
    put(source, "new", "x")
