"""The source is only read: whatever state the file is in, it and its folder stay as they were."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.sqlite import SqliteSaver

import persistence
from persistence import transfer
from persistence.errors import ArchiveError, SourceError
from tests.transfer import make


def picture(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith("-shm")
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def path(folder: Path) -> Path:
    path = folder / "odd name é %41?#.db"
    with closing(sqlite3.connect(path)) as conn:
        saver = SqliteSaver(conn)
        saver.setup()
        make.put(saver, "t", {"c": [1]})
    return path


@pytest.fixture
def crashed(path: Path) -> Path:
    """A writer was killed: what it committed stands in the ``-wal`` file only."""
    script = (
        "import os, signal, sqlite3, sys\n"
        "conn = sqlite3.connect(sys.argv[1])\n"
        "conn.execute('PRAGMA wal_autocheckpoint = 0')\n"
        "conn.execute(\"INSERT INTO writes VALUES ('late', '', 'c', 'task', '', 0, 'a', 'null', x'')\")\n"
        "conn.commit()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.with_name(path.name + "-wal").stat().st_size > 0
    return path


def exported(path: Path, archive: Path) -> transfer.Totals:
    return transfer.export(path, archive).totals


def test_idle_file(path: Path, folder: Path, tmp_path: Path) -> None:
    before = picture(folder)
    assert exported(path, tmp_path / "archive").checkpoints == 1
    assert picture(folder) == before
    assert names(folder) == {path.name}


def test_rollback_journal_mode(path: Path, folder: Path, tmp_path: Path) -> None:
    make.execute(path, "PRAGMA journal_mode = DELETE")
    before = picture(folder)
    assert exported(path, tmp_path / "archive").checkpoints == 1
    assert picture(folder) == before
    assert names(folder) == {path.name}


def test_wal_of_a_crashed_writer(crashed: Path, folder: Path, tmp_path: Path) -> None:
    before = picture(folder)
    assert exported(crashed, tmp_path / "archive").writes == 1
    assert picture(folder) == before


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions do not hold root back, so root becomes nobody for a while."""
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if as_root:
            os.seteuid(0)


def test_crashed_writer_in_a_read_only_folder(crashed: Path, folder: Path, open_folder: Path) -> None:
    """Without its ``-shm`` file SQLite cannot read a WAL in place there; a copy is read."""
    media = open_folder / "media"
    shutil.copytree(folder, media)
    (media / f"{crashed.name}-shm").unlink()
    for file in media.iterdir():
        file.chmod(0o444)
    media.chmod(0o555)
    before = names(media)
    try:
        with ordinary_user():
            totals = exported(media / crashed.name, open_folder / "archive")
    finally:
        media.chmod(0o755)
    assert totals.writes == 1
    assert names(media) == before


def test_hot_rollback_journal(path: Path, folder: Path, tmp_path: Path) -> None:
    """A writer without WAL was killed in the middle of a transaction: it never happened."""
    make.execute(path, "PRAGMA journal_mode = DELETE")
    script = (
        "import os, signal, sqlite3, sys\n"
        "conn = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "conn.execute('PRAGMA cache_size = 1')\n"
        "conn.execute('BEGIN')\n"
        "for n in range(300):\n"
        "    conn.execute(\"INSERT INTO writes VALUES ('t', '', ?, 'task', '', 0, 'a', 'null', x'')\", [n])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert path.with_name(path.name + "-journal").exists()
    before = picture(folder)
    totals = exported(path, tmp_path / "archive")
    assert (totals.checkpoints, totals.writes) == (1, 0)
    assert picture(folder) == before


def test_a_live_writer_does_not_show(path: Path, tmp_path: Path) -> None:
    """One snapshot: what is written after the reading began is not in it, nor half of it."""
    stop = threading.Event()

    def write() -> None:
        with SqliteSaver.from_conn_string(str(path)) as saver:
            while not stop.is_set():
                number = make.put(saver, "live", {"c": ["x"]})
                saver.put_writes(
                    {"configurable": {"thread_id": "live", "checkpoint_ns": "", "checkpoint_id": number}},
                    [("a", 1)],
                    "task",
                )

    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.setup()  # the file stays open in WAL mode
        make.put(saver, "live", {"c": ["x"]})
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for number in range(5):
                archive = tmp_path / f"archive {number}"
                totals = exported(path, archive)
                assert totals.checkpoints - totals.writes in (2, 3)
                assert transfer.verify_archive(archive).verified
        finally:
            stop.set()
            writer.join()


def test_a_change_without_a_lock_is_noticed(path: Path, tmp_path: Path) -> None:
    """An idle WAL file is read without a lock, because a lock would leave files behind."""
    with make.database(path) as saver:
        for number in range(100):
            make.put(saver, "t", {"c": [number]}, versions={"c": number})
    changed = False

    def change(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        nonlocal changed
        if not changed:
            changed = True
            make.execute(path, "DELETE FROM writes")
            with make.database(path) as saver:
                make.put(saver, "t", {"c": [1]})

    with pytest.raises(SourceError, match="was written to while it was read"):
        transfer.export(path, tmp_path / "archive", progress=change)
    assert not (tmp_path / "archive").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/locks")
def test_the_locks_of_an_application_that_exports_its_own_file_stay(tmp_path: Path) -> None:
    """Closing a file gives up all locks that the process has on it, those of its other connections too."""
    path = tmp_path / "x.db"
    given: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}

    def locks() -> list[str]:
        inode = f":{path.stat().st_ino} "
        return [line for line in Path("/proc/locks").read_text().splitlines() if inode in line]

    with persistence.open(f"sqlite:///{path}") as db:
        assert db.checkpointer is not None
        db.checkpointer.put(given, empty_checkpoint(), {}, {})
        before = locks()
        assert before
        transfer.export(f"sqlite:///{path}", tmp_path / "archive")
        transfer.verify(f"sqlite:///{path}", tmp_path / "archive").require()
        assert len(locks()) == len(before)


def test_without_task_path(folder: Path, tmp_path: Path) -> None:
    """The tables as old versions of the saver made them."""
    path = folder / "old.db"
    make.execute(
        path,
        "CREATE TABLE checkpoints (thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '',"
        " checkpoint_id TEXT NOT NULL, parent_checkpoint_id TEXT, type TEXT, checkpoint BLOB, metadata BLOB,"
        " PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id))",
    )
    make.execute(
        path,
        "CREATE TABLE writes (thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '',"
        " checkpoint_id TEXT NOT NULL, task_id TEXT NOT NULL, idx INTEGER NOT NULL, channel TEXT NOT NULL,"
        " type TEXT, value BLOB, PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, idx))",
    )
    make.execute(path, "INSERT INTO writes VALUES ('t', '', 'c', 'task', 0, 'a', 'null', x'')")
    before = picture(folder)
    assert exported(path, tmp_path / "archive").writes == 1
    assert picture(folder) == before


def test_path_with_two_slashes(path: Path, tmp_path: Path) -> None:
    assert exported(Path(f"/{path}"), tmp_path / "archive").checkpoints == 1


def not_there(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def text_file(path: Path) -> None:
    path.write_text("This is not a database, only a text that is long enough for a header.\n" * 20)


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def other_tables(path: Path) -> None:
    path.unlink()
    make.execute(path, "CREATE TABLE users (id INTEGER)")


def missing_column(path: Path) -> None:
    make.execute(path, "ALTER TABLE checkpoints DROP COLUMN metadata")


def damaged_page(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xee" * (size - 4096))


def bytes_as_thread(path: Path) -> None:
    make.execute(path, "UPDATE checkpoints SET thread_id = x'00ff'")


CASES = {
    not_there: "does not exist",
    directory: "is a directory",
    text_file: "not a SQLite database",
    empty_file: "an empty database",
    other_tables: "an empty database",
    missing_column: "missing checkpoints.metadata",
    damaged_page: "cannot read|malformed|not a SQLite",
    bytes_as_thread: "stored as bytes",
}


@pytest.mark.parametrize(("spoil", "reason"), CASES.items(), ids=[case.__name__ for case in CASES])
def test_clear_errors(path: Path, folder: Path, tmp_path: Path, spoil: object, reason: str) -> None:
    assert callable(spoil)
    spoil(path)
    before = names(folder)
    with pytest.raises(SourceError, match=reason) as raised:
        transfer.export(f"sqlite:///{path}".replace("%", "%25").replace("?", "%3F"), tmp_path / "archive")
    assert raised.value.exit_code == 5
    assert "\n" not in str(raised.value)
    assert names(folder) == before
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize("odd", ["encoding", "collation"])
def test_text_that_sorts_otherwise(path: Path, tmp_path: Path, odd: str) -> None:
    """Both sides of a comparison, and both tables of a file, are read in the order of UTF-8 bytes."""
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as conn, closing(sqlite3.connect(path)) as plain:
        conn.execute(f"PRAGMA encoding = '{'UTF-16le' if odd == 'encoding' else 'UTF-8'}'")
        for (statement,) in plain.execute("SELECT sql FROM sqlite_master WHERE type = 'table'"):
            key = "thread_id TEXT COLLATE NOCASE" if odd == "collation" else "thread_id TEXT"
            conn.execute(statement.replace("thread_id TEXT", key))
    for source, target in ((other, tmp_path / "new.db"), (path, other)):
        with pytest.raises(SourceError, match="sorts its text in another way"):
            transfer.migrate(source, f"sqlite:///{target}")
    assert not (tmp_path / "new.db").exists()


def test_several_rows_of_one_key(path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("CREATE TABLE copied AS SELECT * FROM checkpoints")
        conn.execute("DROP TABLE checkpoints")
        conn.execute("ALTER TABLE copied RENAME TO checkpoints")
        conn.execute("INSERT INTO checkpoints SELECT * FROM checkpoints")
    with pytest.raises(transfer.RefusedError, match="1 x there are several rows of this key"):
        transfer.migrate(path, f"sqlite:///{tmp_path / 'new.db'}")
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_not_allowed(path: Path, open_folder: Path, closed: str) -> None:
    folder = shutil.copytree(path.parent, open_folder / "data")
    (folder if closed == "folder" else folder / path.name).chmod(0)
    try:
        with ordinary_user(), pytest.raises(SourceError, match="Permission denied"):
            transfer.export(folder / path.name, open_folder / "archive")
    finally:
        folder.chmod(0o755)


def test_archive_in_a_closed_folder(path: Path, open_folder: Path) -> None:
    source = Path(shutil.copy(path, open_folder))
    closed = open_folder / "closed"
    closed.mkdir(mode=0)
    try:
        for folder in (closed, closed / "archive"):
            with ordinary_user(), pytest.raises(ArchiveError, match="Permission denied"):
                transfer.export(source, folder)
    finally:
        closed.chmod(0o755)
