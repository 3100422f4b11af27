"""A cut-over of a Postgres source: who may do it, the lock, the seal."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

import persistence
from persistence import schema, transfer
from persistence.backends.postgres import transfer_live
from persistence.errors import ConnectError, PersistenceError, SealedError, TransferError, VerificationError
from persistence.registry import provider_for
from tests.support import fresh_database
from tests.transfer import graphs, make
from tests.transfer.conftest import rows
from tests.transfer.test_cut_over import once
from tests.transfer.test_follow import follow_for

MOVED = "this database has moved to sqlite"


@pytest.fixture(scope="module")
def template(postgres_server: str) -> Iterator[str]:
    """A small database; not to be changed."""
    with fresh_database(postgres_server) as dsn:
        schema.setup(provider_for(dsn))
        with PostgresSaver.from_conn_string(dsn) as saver:
            make.put(saver, "log", {"c": ["first"]}, id="1f0")
            make.put(saver, "log", {"c": ["second"]}, versions={"c": "2.0"}, id="1f1", parent="1f0")
        yield dsn


@pytest.fixture
def source(template: str, postgres_server: str) -> Iterator[str]:
    """A copy of it that a test may change."""
    with fresh_database(postgres_server, template) as dsn:
        yield dsn


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'target.db'}"


@pytest.fixture
def role(source: str) -> Iterator[str]:
    """A role that may read the three tables and nothing else."""
    name = f"r_{uuid.uuid4().hex[:12]}"
    execute(
        source,
        f"CREATE ROLE {name} LOGIN",
        f"GRANT SELECT ON checkpoints, checkpoint_blobs, checkpoint_writes TO {name}",
    )
    yield name
    execute(source, f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


def execute(dsn: str, *statements: str) -> list[Any]:
    """What the last statement finds."""
    with psycopg.connect(dsn) as conn:
        for statement in statements:
            cursor = conn.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def put(dsn: str) -> None:
    with PostgresSaver.from_conn_string(dsn) as saver:
        make.put(saver, "new", {"c": ["x"]})


def sealed(dsn: str) -> list[str]:
    """The tables with a trigger."""
    found = execute(dsn, "SELECT tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1")
    return [name for (name,) in found]


def test_a_sealed_database(source: str, file: str, tmp_path: Path) -> None:
    done = transfer.cut_over(source, file)
    assert sealed(source) == ["checkpoint_blobs", "checkpoint_writes", "checkpoints"]
    before = rows(source)
    with pytest.raises(psycopg.IntegrityError, match=MOVED):
        put(source)
    for table in before:
        with pytest.raises(psycopg.IntegrityError, match="`persistence unseal` lets it be written again"):
            execute(source, f"TRUNCATE {table}")
    with persistence.open(source) as db:
        ours: Any = db.checkpointer
        (found, *_) = ours.list(graphs.config("log"))
        changes: list[Callable[[], object]] = [
            lambda: ours.put(found.config, found.checkpoint, {}, {}),
            lambda: ours.put_writes(found.config, [("c", 1)], "task"),
            lambda: ours.delete_thread("log"),
            lambda: ours.prune(["log"]),
            lambda: ours.copy_thread("log", "copy"),
        ]
        for change in changes:
            with pytest.raises(SealedError, match=rf"{MOVED}.*use the DSN"):
                change()
        health = db.health(60)
    assert (health.status, health.ready) == ("unavailable", False)
    assert health.problem is not None
    assert health.problem.code == "sealed"
    assert not schema.setup(provider_for(source)).changes
    assert rows(source) == before
    assert transfer.migrate(source, f"sqlite:///{tmp_path / 'copy.db'}").verified
    with pytest.raises(SealedError, match=MOVED):
        transfer.migrate(file, source, options=transfer.Options(on_conflict="replace"))

    again = transfer.cut_over(source, file)
    assert (again.already_done, again.sealed, again.run_id) == (True, True, done.run_id)
    with pytest.raises(TransferError, match=r"cut over .* already"):
        follow_for(source, file, 1)
    assert transfer.unseal(source)
    assert not transfer.unseal(source)
    assert sealed(source) == []
    put(source)


async def test_a_sealed_database_in_an_event_loop(source: str, file: str) -> None:
    transfer.cut_over(source, file)
    async with AsyncPostgresSaver.from_conn_string(source) as official:
        with pytest.raises(psycopg.IntegrityError, match=MOVED):
            await official.adelete_thread("log")
    async with persistence.aopen(source) as db:
        ours: Any = db.checkpointer
        with pytest.raises(SealedError, match=MOVED):
            await ours.adelete_thread("log")
        assert (await db.health(60)).status == "unavailable"


def test_left_open(source: str, file: str) -> None:
    assert not transfer.cut_over(source, file, seal=False).sealed
    assert sealed(source) == []
    put(source)


def test_somebody_does_not_finish(source: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that has written stops it; one that reads does not."""
    monkeypatch.setattr(transfer_live, "_LOCK_WAIT", 0.1)
    with closing(psycopg.connect(source)) as conn:
        conn.execute("DELETE FROM checkpoint_writes WHERE false")
        with pytest.raises(ConnectError, match=r"does not finish.*pg_stat_activity"):
            transfer.cut_over(source, file)
        put(source)
        conn.rollback()
        conn.execute("SELECT count(*) FROM checkpoints")
        done = transfer.cut_over(source, file)
    assert done.sealed
    assert transfer.verify(source, file).equal


def test_a_lock_that_comes_late(source: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried for again, writers go on between the tries, and the pause is that of the last one."""
    refused = threading.Event()
    locked = transfer_live._locked

    def tried(*args: Any) -> Any:
        if (lock := locked(*args)) is None:
            put(source)
            refused.set()
        return lock

    monkeypatch.setattr(transfer_live, "_locked", tried)
    with closing(psycopg.connect(source)) as conn:
        conn.execute("UPDATE checkpoints SET metadata = '{}' WHERE checkpoint_id = '1f0'")

        def finish() -> None:
            refused.wait(60)
            conn.commit()

        waits = threading.Thread(target=finish)
        waits.start()
        done = transfer.cut_over(source, file)
        waits.join()
    assert refused.is_set()
    assert done.last is not None
    assert done.last.threads == 2
    assert transfer.verify(source, file).equal


def test_the_target_lost_a_row(source: str, file: str) -> None:
    lose = once(lambda: make.execute(Path(file[10:]), "DELETE FROM checkpoints WHERE checkpoint_id = '1f1'"))
    with pytest.raises(VerificationError, match="'log'"):
        transfer.cut_over(source, file, told=lose)
    assert sealed(source) == []
    put(source)


def test_the_lock_is_lost(source: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last moment: nothing was sealed, so it is not said to be."""
    seal = transfer_live.LockedSnapshot.seal

    def lose(locked: transfer_live.LockedSnapshot, target: str) -> None:
        seal(locked, target)
        execute(source, f"SELECT pg_terminate_backend({locked.conn.info.backend_pid}, 60000)")

    monkeypatch.setattr(transfer_live.LockedSnapshot, "seal", lose)
    with pytest.raises(PersistenceError, match="lost the connection"):
        transfer.cut_over(source, file)
    assert sealed(source) == []
    put(source)
    monkeypatch.undo()
    assert transfer.cut_over(source, file).sealed
    assert transfer.verify(source, file).equal


def test_a_role_that_may_only_read(source: str, role: str, file: str, tmp_path: Path) -> None:
    """It follows; who cuts over needs more, and is told so before anything is copied."""
    reader = f"{source}&user={role}"
    follow_for(reader, file, 1)
    other = tmp_path / "other.db"
    for rights, lacking in (
        ("SELECT", "UPDATE or DELETE on checkpoint_blobs, to lock it"),
        ("UPDATE", "TRIGGER on checkpoint_blobs, to seal it"),
        ("TRIGGER", "CREATE on the schema public, to seal it"),
    ):
        execute(source, f"GRANT {rights} ON checkpoints, checkpoint_blobs, checkpoint_writes TO {role}")
        with pytest.raises(TransferError, match=lacking):
            transfer.cut_over(reader, f"sqlite:///{other}")
    assert not other.exists()
    assert not transfer.cut_over(reader, f"sqlite:///{other}", seal=False).sealed
    execute(source, f"GRANT CREATE ON SCHEMA public TO {role}")
    assert transfer.cut_over(reader, file).sealed
    assert transfer.unseal(reader), "though the role does not own the tables"
    assert transfer.cut_over(source, file).already_done


def test_a_server_that_only_reads(source: str, file: str) -> None:
    with pytest.raises(ConnectError, match="can only be read"):
        transfer.cut_over(f"{source}&options=-cdefault_transaction_read_only%3Don", file)


def test_what_the_seal_says_is_plain_text(source: str, tmp_path: Path) -> None:
    """Whatever the target is called."""
    transfer.cut_over(source, f"sqlite:///{tmp_path}/it's \\ $$ 100%25.db")
    with pytest.raises(psycopg.IntegrityError) as caught:
        put(source)
    assert str(caught.value).startswith(f"{MOVED}:///{tmp_path}/it's \\ $$ 100%25.db; `persistence unseal`")
