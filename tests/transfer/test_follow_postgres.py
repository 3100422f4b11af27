"""A Postgres source is followed as a SQLite file is, and whatever its transactions do is noticed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from pydantic import SecretStr

import persistence
from persistence import schema, transfer
from persistence.errors import ConflictError, TransferError
from persistence.registry import provider_for
from persistence.settings import Settings
from tests.support import fresh_database
from tests.transfer import make
from tests.transfer.conftest import postgres_tuples, rows, sqlite_tuples
from tests.transfer.targets import Target
from tests.transfer.test_follow import FOLLOW, KILLS, Writer, follow_for, kill, plain, stopped

COPY_OF = """
INSERT INTO checkpoints SELECT thread_id, checkpoint_ns, '{id}', NULL, type,
    jsonb_set(checkpoint, '{{id}}', '"{id}"'), metadata
FROM checkpoints WHERE thread_id = '{thread}' LIMIT 1
"""


@pytest.fixture(scope="module")
def template(postgres_server: str, filled: Path) -> Iterator[str]:
    """A Postgres database with what graphs wrote; not to be changed."""
    with fresh_database(postgres_server) as dsn:
        transfer.migrate(filled, dsn)
        yield dsn


@pytest.fixture
def source(template: str, postgres_server: str) -> Iterator[str]:
    """A copy of it that a test may change."""
    with fresh_database(postgres_server, template) as dsn:
        yield dsn


@pytest.fixture
def file(tmp_path: Path) -> str:
    """An empty target where it does not matter which."""
    return f"sqlite:///{tmp_path / 'target.db'}"


@contextmanager
def saving(dsn: str) -> Iterator[PostgresSaver]:
    with PostgresSaver.from_conn_string(dsn) as saver:
        yield saver


def execute(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn) as conn:
        for statement in statements:
            conn.execute(statement.encode())


def one_round(source: str, target: str) -> tuple[int, int]:
    """Catch up once; gives how many threads and rows were moved."""
    last = transfer.follow(source, target, stop=stopped()).last
    return last.threads, last.rows


def require_equal(source: str, target: str) -> None:
    """By our digests, and by what the official savers of both sides list."""
    assert transfer.verify(source, target).differences == []
    tuples = sqlite_tuples(Path(target[10:])) if target.startswith("sqlite") else postgres_tuples(target)
    assert plain(postgres_tuples(source)) == plain(tuples)


@pytest.mark.parametrize(
    ("kind", "target"), [("official", "sqlite"), ("ours", "postgres")], indirect=["target"]
)
def test_an_application_goes_on_writing(kind: str, source: str, target: Target) -> None:
    with Writer(source, kind) as writer:
        follow_for(source, target.dsn, 3, lambda _: writer.wait_for(5))
        writer.wait_for(5)
        done = transfer.cut_over(source, target.dsn)
    assert done.sealed
    assert done.mended == 0, "stamps show everything"
    require_equal(source, target.dsn)
    there = {found.config["configurable"]["checkpoint_id"] for found in postgres_tuples(source)}
    assert writer.acknowledged
    assert set().union(*writer.acknowledged.values()) <= there
    transfer.undo(done.run_id, target.dsn)
    assert not any(target.rows().values())


def test_there_and_back_again(database: Path, postgres_dsn: str, tmp_path: Path) -> None:
    """A file, into Postgres, written to there, and followed back into a file."""
    transfer.migrate(database, postgres_dsn)
    back = tmp_path / "back.db"
    follow_for(postgres_dsn, f"sqlite:///{back}", 1)
    assert transfer.verify(database, back).equal
    with make.database(database) as one, saving(postgres_dsn) as other:
        for saver in (one, other):
            make.put(saver, "log", {"c": ["more"]}, id="1f9", ts="now")
    transfer.cut_over(postgres_dsn, f"sqlite:///{back}")
    assert transfer.verify(database, back).equal
    require_equal(postgres_dsn, f"sqlite:///{back}")


def test_killed_at_random_instants(source: str, postgres_dsn: str) -> None:
    choose = random.Random(18)  # noqa: S311 - instants, not secrets
    with Writer(source, "ours"):
        for _ in range((KILLS + 1) // 2):
            command = [*FOLLOW, "--follow-interval", "0.1", source, postgres_dsn]
            assert kill(command, choose.uniform(0.6, 2.0))
        transfer.cut_over(source, postgres_dsn)
    require_equal(source, postgres_dsn)


def test_a_transaction_that_commits_late(source: str, file: str) -> None:
    """It has a lower number than rows of the same thread that have arrived already."""
    with closing(psycopg.connect(source)) as conn:
        conn.execute(COPY_OF.format(thread="log", id="1f0").encode())
        with saving(source) as saver:
            make.put(saver, "log", {"c": ["meanwhile"]}, id="1f2")
            make.put(saver, "chat 0 é", {"c": ["meanwhile"]}, id="1f2")
        follow_for(source, file, 1)
        conn.execute(COPY_OF.format(thread="chat 0 é", id="1f1").encode())
        with provider_for(source).live() as live:
            before = live.version()
            conn.commit()
            assert live.version() != before, "a round is needed"
    with saving(source) as saver:
        make.put(saver, "log", {"c": ["later"]}, id="1f3")
    assert one_round(source, file)[0] == 2
    require_equal(source, file)


def test_only_what_was_added_is_written(source: str, target: Target) -> None:
    with saving(source) as saver:
        make.put(saver, "a", {"c": ["first"], "d": ["kept"]}, id="1f0")
        follow_for(source, target.dsn, 1)
        make.put(saver, "a", {"c": ["second"], "d": ["kept"]}, versions={"c": "2.0", "d": "1.0"}, id="1f1")
        assert one_round(source, target.dsn) == (1, 1)
        put_write(saver, 0)
        assert one_round(source, target.dsn) == (1, 1)
        make.put(saver, "b", {"c": ["new"]}, ns="sub")
        put_write(saver, 1)
        assert one_round(source, target.dsn) == (2, 2)
        saver.delete_thread("b")
        saver.delete_thread("log")
        assert one_round(source, target.dsn)[0] == 2
    require_equal(source, target.dsn)
    with psycopg.connect(source, autocommit=True) as conn:
        conn.execute("VACUUM (FULL, FREEZE)")
    assert one_round(source, target.dsn) == (0, 0)


def put_write(saver: PostgresSaver, number: int) -> None:
    place = {"thread_id": "a", "checkpoint_ns": "", "checkpoint_id": "1f0"}
    saver.put_writes({"configurable": place}, [("c", number)], f"task {number}")


def test_whatever_is_changed_in_place_is_noticed(source: str, target: Target) -> None:
    """Also where nothing has another length."""
    with saving(source) as saver:
        make.put(saver, "a", {"c": ["first"]}, id="1f0")
        make.put(saver, "a", {"c": ["first"]}, id="1f1")
        put_write(saver, 0)
        put_write(saver, 1)
    follow_for(source, target.dsn, 1)
    value = "replace(encode(blob, 'hex'), encode('first', 'hex'), encode('other', 'hex'))"
    keep = "CREATE TABLE kept AS SELECT * FROM checkpoint_blobs WHERE thread_id = 'a'"
    for change in (
        f"UPDATE checkpoint_blobs SET blob = decode({value}, 'hex') WHERE thread_id = 'a'",
        "UPDATE checkpoints SET metadata = '{}' WHERE thread_id = 'a'",
        "UPDATE checkpoint_writes SET blob = '\\xc0' WHERE thread_id = 'a' AND task_id = 'task 0'",
        "DELETE FROM checkpoint_writes WHERE thread_id = 'a' AND task_id = 'task 0'",
        "UPDATE checkpoints SET parent_checkpoint_id = '1f0' WHERE thread_id = 'a' AND checkpoint_id = '1f1'",
        f"{keep}; DELETE FROM checkpoint_blobs WHERE thread_id = 'a'",
        # A value that comes later than the checkpoints that name its version.
        "INSERT INTO checkpoint_blobs SELECT * FROM kept",
        "DELETE FROM checkpoints WHERE thread_id = 'a' AND checkpoint_id = '1f0'",
    ):
        execute(source, change)
        assert one_round(source, target.dsn)[0] == 1, change
        assert transfer.verify(source, target.dsn).equal, change


def test_what_our_saver_does_to_many_rows(source: str, file: str) -> None:
    follow_for(source, file, 1)
    with persistence.open(source) as db:
        assert db.checkpointer is not None
        db.checkpointer.copy_thread("log", "copy")
        db.checkpointer.prune(["log", "chat 0 é"])
        db.checkpointer.prune(["chat 1 é"], strategy="delete")
    assert one_round(source, file)[0] == 4
    require_equal(source, file)


def test_within_one_database(source: str) -> None:
    """From one schema into another; into itself is refused, by whatever name."""
    target = f"{source}&schema=live"
    with pytest.raises(TransferError, match=r"in the database that is read.*persistence setup"):
        follow_for(source, target, 1)
    schema.setup(provider_for(target))
    follow_for(f"{source}&schema=public", target, 1)
    assert one_round(source, target) == (0, 0)
    before = rows(source)
    with pytest.raises(ConflictError, match="the same database"):
        transfer.cut_over(source, f"{source}&schema=public&application_name=other")
    assert transfer.cut_over(source, target).sealed
    assert rows(source) == before == rows(source, "live")
    with saving(f"{source}&options=-csearch_path%3Dlive") as saver:
        make.put(saver, "goes on", {"c": ["x"]})


def test_values_that_are_encrypted(source: str, file: str) -> None:
    """By another key on each side of it; the source has both kinds of rows."""
    settings = Settings(encryption_key=SecretStr("0123456789abcdef"), allow_plaintext=True)
    follow(source, file, settings)
    with persistence.open(source, settings=settings) as db:
        assert db.checkpointer is not None
        make.put(db.checkpointer, "log", {"c": ["secret"]}, id="1f9")
        make.put(db.checkpointer, "new", {"c": ["secret"]}, id="1f9")
    assert follow(source, file, settings) == (2, 2)
    assert transfer.verify(source, file, settings=settings).equal


def follow(source: str, target: str, settings: Settings) -> tuple[int, int]:
    stop = threading.Event()
    done = transfer.follow(source, target, stop=stop, settings=settings, told=lambda _: stop.set())
    return done.last.threads, done.last.rows
