"""SQLite files: what cannot be opened says so, and how what can be is opened."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from shutil import copyfile

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

import persistence
from persistence.backends.sqlite.connection import SqliteDatabase
from persistence.backends.sqlite.provider import SqliteProvider
from persistence.dsn import Dsn
from persistence.errors import ConnectError, SourceError
from persistence.registry import provider_for
from persistence.schema import setup
from persistence.settings import Settings
from tests.ops.conftest import counter, thread


def database(dsn: str) -> SqliteDatabase:
    provider = provider_for(dsn)
    assert isinstance(provider, SqliteProvider)
    return provider.database


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="folder does not exist") as caught:
        persistence.open(f"sqlite:///{tmp_path}/no/x.db")
    assert str(tmp_path / "no") in caught.value.message
    assert not (tmp_path / "no").exists()


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="not a file but a folder"):
        persistence.open(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("content", [b"this is no database, however long one looks at it" * 50, b"x"])
def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ConnectError, match=r"not a SQLite database: .*notes\.txt"):
        persistence.open(f"sqlite:///{path}")
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_these_errors_are_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConnectError):
        persistence.open(f"sqlite:///{tmp_path}/no/x.db")
    assert "attempt" not in caplog.text


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").touch()
    with persistence.open(f"sqlite:///{tmp_path}/x.db") as db:
        counter().compile(checkpointer=db.checkpointer).invoke({"n": 1}, thread())


def test_every_connection_has_the_settings(tmp_path: Path) -> None:
    for name, number in (("off", 0), ("normal", 1), ("full", 2), ("extra", 3)):
        with closing(
            database(f"sqlite:///{tmp_path}/x.db?synchronous={name}&busy_timeout=2").connect()
        ) as conn:
            assert conn.execute("PRAGMA synchronous").fetchone() == (number,)
            assert conn.execute("PRAGMA busy_timeout").fetchone() == (2000,)
            assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert conn.isolation_level is None
    with closing(database(f"sqlite:///{tmp_path}/x.db").connect()) as conn:
        assert conn.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_path_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "a b?c#d%20é.db"
    with persistence.open(f"sqlite:///{tmp_path}/a b%3Fc#d%2520é.db") as db:
        counter().compile(checkpointer=db.checkpointer).invoke({"n": 1}, thread())
    assert path.exists()


def test_a_read_only_connection_refuses_writes_and_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConnectError):
        database(f"sqlite:///{tmp_path}/x.db").connect(readonly=True)
    assert list(tmp_path.iterdir()) == []
    for dsn in (f"sqlite:///{tmp_path}/x.db", "sqlite://"):
        base = database(dsn)
        base.hold()
        with closing(base.connect()) as conn:
            conn.execute("CREATE TABLE t (a)")
        with closing(base.connect(readonly=True)) as conn:
            assert conn.execute("SELECT * FROM t").fetchall() == []
            with pytest.raises(sqlite3.OperationalError, match=r"readonly|query_only"):
                conn.execute("INSERT INTO t VALUES (1)")
        base.close()


def test_a_database_in_memory_is_shared_by_its_connections_and_by_nobody_else() -> None:
    one, two = database("sqlite://"), database("sqlite://")
    for base in (one, two):
        base.hold()
    with closing(one.connect()) as conn:
        conn.execute("CREATE TABLE t (a)")
    with closing(one.connect()) as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        assert conn.execute("SELECT a FROM t").fetchall() == [(1,)]
    with closing(two.connect()) as conn, pytest.raises(sqlite3.OperationalError, match="no such table"):
        conn.execute("SELECT a FROM t")
    one.close()
    two.close()
    with closing(one.connect()) as conn, pytest.raises(sqlite3.OperationalError, match="no such table"):
        conn.execute("SELECT a FROM t")  # gone with the last holder
    one.close()


def test_a_database_in_memory_needs_a_recent_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 35, 0))
    with pytest.raises(ConnectError, match=r"needs SQLite 3\.36.*memory://"):
        persistence.open("sqlite://")


def test_the_switch_to_the_write_ahead_log_waits_for_a_writer(tmp_path: Path) -> None:
    """SQLite itself would give up at once here, whatever its busy timeout."""
    with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE t (a)")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConnectError, match="locked") as caught:
            database(f"sqlite:///{tmp_path}/x.db?busy_timeout=0.1").connect()
        assert caught.value.transient
        done = threading.Timer(0.3, other.execute, ["COMMIT"])
        done.start()
        with closing(database(f"sqlite:///{tmp_path}/x.db?busy_timeout=60").connect()) as conn:
            assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        done.join()


AS_USER = """
import os, sys
import persistence, persistence.backends.sqlite.backend, persistence.schema
from persistence.errors import PersistenceError
from tests.ops.conftest import thread
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with persistence.open(sys.argv[1]) as db:
        print("opened", db.checkpointer.get_tuple(thread()).checkpoint["channel_values"]["n"])
        db.checkpointer.delete_thread("t")
except PersistenceError as error:
    print(error)
"""


def as_ordinary_user(dsn: str) -> str:
    """What an ordinary user sees, also where the tests run as root."""
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, dsn],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def shared(open_folder: Path) -> Path:
    """A folder that every user may enter, with a database in it."""
    folder = open_folder / "shared"
    folder.mkdir(mode=0o755)
    with persistence.open(f"sqlite:///{folder}/x.db") as db:
        counter().compile(checkpointer=db.checkpointer).invoke({"n": 1}, thread())
    with closing(sqlite3.connect(folder / "x.db")) as conn:
        conn.execute("PRAGMA journal_mode = DELETE")
    return folder


def test_a_file_that_may_only_be_read_can_be_read(shared: Path) -> None:
    (shared / "x.db").chmod(0o444)
    (shared).chmod(0o555)
    try:
        said = as_ordinary_user(f"sqlite:///{shared}/x.db")
    finally:
        shared.chmod(0o755)
    assert said.splitlines()[0] == "opened 2"
    assert "can only be read" in said.splitlines()[1]


def test_a_file_that_may_not_be_read_says_so(shared: Path) -> None:
    (shared / "x.db").chmod(0o000)
    assert "no permission to read" in as_ordinary_user(f"sqlite:///{shared}/x.db")


def test_a_folder_that_may_not_be_entered_says_so(shared: Path) -> None:
    shared.chmod(0o000)
    try:
        assert "no permission" in as_ordinary_user(f"sqlite:///{shared}/x.db")
    finally:
        shared.chmod(0o755)


def test_the_name_shows_no_secret() -> None:
    assert SqliteDatabase(Dsn.parse("sqlite:///x.db"), Settings()).name == "sqlite:///x.db"


def test_a_session_that_only_read_leaves_one_file(tmp_path: Path) -> None:
    """A copy of the file alone must be the whole database, as it is with the official saver."""
    for _ in range(2):
        with persistence.open(f"sqlite:///{tmp_path}/x.db") as db:
            assert db.checkpointer is not None
            db.ping()
            db.checkpointer.get_tuple(thread("t"))
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.db"]


def test_a_path_with_two_leading_slashes(tmp_path: Path) -> None:
    with persistence.open(f"sqlite:////{tmp_path}/x.db"):
        pass
    assert (tmp_path / "x.db").exists()


def test_setup_alone_leaves_one_file(tmp_path: Path) -> None:
    for _ in range(2):
        setup(provider_for(f"sqlite:///{tmp_path}/x.db"))
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.db"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    dsn = f"sqlite:///{tmp_path}/pipe"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConnectError, match="not a regular file"):
        persistence.open(dsn)
    with pytest.raises(SourceError, match="not a regular file"), provider_for(dsn).source():
        pass


@pytest.mark.parametrize("synchronous", ["full", "normal"])
def test_the_log_is_made_longer_ahead_of_the_commits(tmp_path: Path, synchronous: str) -> None:
    """So that a commit only overwrites. What lies in the log behind the last commit changes nothing."""
    path, crashed = tmp_path / "x.db", tmp_path / "crashed.db"
    log = tmp_path / "x.db-wal"
    with persistence.open(f"sqlite:///{path}?synchronous={synchronous}") as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        lengths = []
        for _ in range(12):
            graph.invoke({"n": 1}, thread())
            lengths.append(log.stat().st_size)
        state = graph.get_state(thread())
        copyfile(path, crashed)
        copyfile(log, tmp_path / "crashed.db-wal")
    if synchronous == "full":
        assert len(set(lengths)) < 5
        assert not any((tmp_path / "crashed.db-wal").read_bytes()[-(1 << 12) :])
    else:
        assert len(set(lengths)) == 12
    with closing(sqlite3.connect(crashed)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = SqliteSaver(conn).get_tuple(thread())
    assert found is not None and found.config == state.config
