"""What the first reading kept is what a second one would give; what was not kept is read twice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

import persistence
from persistence import schema, transfer
from persistence.backends.sqlite.transfer import SqliteSource
from persistence.errors import TransferError
from persistence.registry import provider_for
from persistence.settings import get_settings
from persistence.transfer import Options, chunks, recording
from persistence.transfer.recording import Recording
from tests.transfer import graphs, make
from tests.transfer.conftest import rows
from tests.transfer.test_in_place import HELD
from tests.transfer.test_resume import interrupted

# Stops for good in one phase of a transfer, and says when it has come there.
HANGS = """
import sys, time
from pathlib import Path
import persistence
from persistence import schema, transfer
from persistence.transfer import ahead
ahead.LIMIT = -1
source, target, where, workers = sys.argv[1:]
def wait(phase, done, total, size):
    if phase == where and done > 10:
        print("there", flush=True)
        time.sleep(60)
transfer.migrate(Path(source), target, progress=wait, options=transfer.Options(workers=int(workers)))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("recording") / "chat.db", threads=1)


def fill(path: Path, threads: int) -> Path:
    """Graphs' threads, one that spans batches, one changed in place, and a value that has no version."""
    graphs.fill(path, threads=threads, turns=1)
    with SqliteSaver.from_conn_string(str(path)) as saver:
        for number in range(25):
            make.put(saver, "long", {"c": ["x" * (number // 2)]}, versions={"c": number // 2})
        for value in ("other", "list", "absent", "long"):
            held = {"c": HELD[value]} if value != "absent" else {}
            make.put(saver, "in place", held, versions={"c": "1"})
        make.put(saver, "no version", {"c": ["free"]}, versions={})
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, written_afterwards: None) -> None:
    """Many batches, segments, chunks and parts, all of them written after the reading."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    monkeypatch.setattr(recording, "PART_BYTES", 1_000)
    monkeypatch.setattr(chunks, "_ROOM", 20_000)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether there was room, for each part that was to be kept here."""
    seen: list[bool] = []
    append = Recording.append

    def noted(self: Recording, part: Any) -> Any:
        place = append(self, part)
        seen.append(place is not None)
        return place

    monkeypatch.setattr(Recording, "append", noted)
    yield seen


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[list[str] | None]:
    """Which threads were read of a SQLite file, each time."""
    seen: list[list[str] | None] = []
    read = SqliteSource.records

    def noted(self: SqliteSource, threads: Any = None, *, data: bool = True) -> Any:
        seen.append(threads if threads is None else list(threads))
        return read(self, threads, data=data)

    monkeypatch.setattr(SqliteSource, "records", noted)
    return seen


def ledger(dsn: str, name: str) -> list[tuple[Any, ...]]:
    """Its batches, with the keys and marks of their rows."""
    with psycopg.connect(dsn) as conn:
        return conn.execute(
            "SELECT batch_no, thread_id, digest, checkpoints, writes, blobs, bytes, keys"
            f' FROM "{name}".persistence_transfer_batches LEFT JOIN "{name}".persistence_transfer_keys'
            " USING (run_id, batch_no) ORDER BY batch_no".encode()
        ).fetchall()


def outcome(dsn: str, name: str) -> tuple[Any, ...]:
    return rows(dsn, name), ledger(dsn, name)


def read_twice(source: Path, dsn: str, name: str) -> tuple[Any, ...]:
    """What is to come out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "LIMIT", 0)
        assert transfer.migrate(source, f"{dsn}&schema={name}", options=Options(workers=1)).verified
    return outcome(dsn, name)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_source_is_read_once(
    source: Path, postgres_dsn: str, readings: list[list[str] | None], workers: int
) -> None:
    """But for the thread whose rows hold something else than its records."""
    options = Options(workers=workers)
    once = transfer.migrate(source, f"{postgres_dsn}&schema=once", options=options, verify=False)
    assert once.batches_written > 5
    if workers == 1:
        assert readings == [None, ["in place"]]
    assert outcome(postgres_dsn, "once") == read_twice(source, postgres_dsn, "twice")
    assert once.totals == transfer.plan(source, postgres_dsn).totals
    schema.setup(provider_for(f"{postgres_dsn}&schema=again"))
    back = transfer.migrate(f"{postgres_dsn}&schema=once", f"{postgres_dsn}&schema=again", options=options)
    assert back.verified
    assert rows(postgres_dsn, "again") == rows(postgres_dsn, "once")


@pytest.mark.parametrize("full", ["limit", "disk", "writing", "folder"])
def test_no_room(
    source: Path, postgres_dsn: str, kept: list[bool], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """From some thread on, or from the first one."""
    expected = read_twice(source, postgres_dsn, "twice")
    kept.clear()
    if full == "limit":
        monkeypatch.setattr(recording, "LIMIT", 6_000)
    elif full == "disk":
        monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result((4096, 1, 0, 0, 1, 0, 0, 0, 0, 255)))
    elif full == "writing":
        monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    else:
        monkeypatch.setattr(tempfile, "TemporaryFile", failing(errno.EROFS))
    assert transfer.migrate(source, f"{postgres_dsn}&schema=once", options=Options(workers=1)).verified
    assert outcome(postgres_dsn, "once") == expected
    assert (True in kept, False in kept) == {"limit": (True, True), "folder": (False, False)}.get(
        full, (False, True)
    )


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_thread_with_a_large_value(
    source: Path, postgres_dsn: str, readings: list[list[str] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be in memory several times."""
    expected = read_twice(source, postgres_dsn, "twice")
    readings.clear()
    monkeypatch.setattr(recording, "_LARGE", 1_000)
    transfer.migrate(source, f"{postgres_dsn}&schema=once", options=Options(workers=1), verify=False)
    assert len({thread for some in readings[1:] for thread in some or ()}) > 2
    assert outcome(postgres_dsn, "once") == expected


@pytest.mark.parametrize("decrypt", [False, True])
def test_nothing_that_was_encrypted(
    tmp_path: Path, postgres_dsn: str, kept: list[bool], monkeypatch: pytest.MonkeyPatch, decrypt: bool
) -> None:
    """Nothing of it is on the disk in plaintext, though the target may hold it so."""
    monkeypatch.setenv("PERSISTENCE_ENCRYPTION_KEY", "0123456789abcdef")
    get_settings.cache_clear()
    path = tmp_path / "sealed.db"
    with persistence.open(f"sqlite:///{path}") as db:
        assert db.checkpointer is not None
        graphs.chat(db.checkpointer).invoke({"messages": ["hello"]}, graphs.config("chat"))
    assert transfer.migrate(path, postgres_dsn, options=Options(decrypt=decrypt)).verified
    assert kept == []


def test_a_target_that_encrypts(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the source is: rows would be sealed, but not what the ledger needs."""
    with provider_for(postgres_dsn).sink() as sink:
        assert recording.recorder(Recording(-1), sink.preflight()) is not None
    monkeypatch.setenv("PERSISTENCE_ENCRYPTION_KEY", "0123456789abcdef")
    get_settings.cache_clear()
    with provider_for(postgres_dsn).sink() as sink:
        assert recording.recorder(Recording(-1), sink.preflight()) is None


def test_a_run_is_continued_either_way(
    source: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one that keeps what it read, and by one that does not."""
    expected = read_twice(source, postgres_dsn, "clean")
    interrupted(source, f"{postgres_dsn}&schema=first")
    read_twice(source, postgres_dsn, "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "LIMIT", 0)
        interrupted(source, f"{postgres_dsn}&schema=second")
    report = transfer.migrate(source, f"{postgres_dsn}&schema=second")
    assert (report.batches_skipped, report.verified) == (3, True)
    assert outcome(postgres_dsn, "first") == outcome(postgres_dsn, "second") == expected


def test_a_damaged_file(source: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written of what cannot be read; the next run goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda fd, size, start: b"\xc1")
        with pytest.raises(TransferError, match="temporary file of the transfer cannot be read"):
            transfer.migrate(source, postgres_dsn)
    assert rows(postgres_dsn) == {table: [] for table in rows(postgres_dsn)}
    assert transfer.migrate(source, postgres_dsn).verified


@pytest.mark.parametrize(("phase", "workers"), [("read", 1), ("write", 2)])
def test_who_is_killed_leaves_no_file(
    source: Path, postgres_dsn: str, tmp_path: Path, phase: str, workers: int
) -> None:
    """Nor is there one by a name before that."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HANGS, source, postgres_dsn, phase, str(workers)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        opened = [str(path.readlink()) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert list(folder.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    assert any(target.startswith(str(folder)) for target in opened)
    assert list(folder.iterdir()) == []
