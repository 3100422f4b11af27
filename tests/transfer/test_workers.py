"""Several processes write at once: the rows are those that one writes, whoever is killed meanwhile."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from persistence import schema, transfer
from persistence.errors import ArchiveError, ConflictError, SourceError, TransferError
from persistence.registry import provider_for
from persistence.settings import Settings
from persistence.transfer import Options, workers
from persistence.transfer.archive import ArchiveSource
from tests.transfer import make
from tests.transfer.conftest import rows

# Segments of a few records, and the pids of the workers on its output.
SCRIPT = """
import sys
from pathlib import Path
from persistence import schema, transfer
from persistence.transfer import Options, ahead, engine, workers
engine.BATCH_RECORDS, engine.SEGMENT_BATCHES, ahead.LIMIT = 9, 1, -1
started = workers.subprocess.Popen
def traced(*args, **kwargs):
    process = started(*args, **kwargs)
    print(process.pid, flush=True)
    return process
workers.subprocess.Popen = traced
source, target, count = sys.argv[1:]
report = transfer.migrate(Path(source), target, options=Options(workers=int(count)))
assert report.verified
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Threads short and long, and one of writes alone."""
    path = tmp_path_factory.mktemp("workers") / "chat.db"
    with make.database(path) as saver:
        for number in range(30):
            for step in range(1 + number % 7):
                values = {"c": ["x" * (step // 2)], "n": number}
                make.put(saver, f"thread {number} é", values, versions={"c": step // 2, "n": 1})
        config = make.put(saver, "alone", {"c": [1]})
        saver.put_writes(
            {"configurable": {"thread_id": "alone", "checkpoint_ns": "", "checkpoint_id": config}},
            [("c", [2])],
            "task",
        )
        saver.conn.execute("DELETE FROM checkpoints WHERE thread_id = 'alone'")
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    monkeypatch.setattr("persistence.transfer.engine.SEGMENT_BATCHES", 1)
    monkeypatch.setattr("persistence.transfer.ahead.LIMIT", -1)


def run(source: Path, target: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(source), target, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ledger(dsn: str, schema: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as conn:
        return conn.execute(
            "SELECT batch_no, thread_id, digest, checkpoints, writes, blobs, bytes"
            f' FROM "{schema}".persistence_transfer_batches ORDER BY batch_no'.encode()
        ).fetchall()


def batches(dsn: str, schema: str) -> int:
    """How many are committed."""
    with psycopg.connect(dsn) as conn:
        row = conn.execute(
            f'SELECT count(*) FROM "{schema}".persistence_transfer_batches'.encode()
        ).fetchone()
    return int(row[0]) if row else 0


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("small")
def test_the_number_of_workers_changes_no_row(source: Path, postgres_dsn: str, tmp_path: Path) -> None:
    alone = transfer.migrate(source, f"{postgres_dsn}&schema=alone", options=Options(workers=1))
    side_by_side = transfer.migrate(source, f"{postgres_dsn}&schema=three", options=Options(workers=3))
    assert alone.verified
    assert side_by_side.verified
    assert side_by_side.batches_written == alone.batches_written > 10
    assert rows(postgres_dsn, "three") == rows(postgres_dsn, "alone")
    assert ledger(postgres_dsn, "three") == ledger(postgres_dsn, "alone")
    # From Postgres, and from an archive.
    back = transfer.migrate(
        f"{postgres_dsn}&schema=three", f"{postgres_dsn}&schema=again&workers=2", archive=tmp_path / "archive"
    )
    assert back.verified
    assert rows(postgres_dsn, "again") == rows(postgres_dsn, "alone")


@pytest.mark.usefixtures("small")
def test_workers_of_a_postgres_source_read_its_snapshot(source: Path, postgres_dsn: str) -> None:
    transfer.migrate(source, postgres_dsn)
    provider = provider_for(postgres_dsn)
    with provider.source() as snapshot:
        before = list(snapshot.records())
        with psycopg.connect(postgres_dsn) as conn:
            conn.execute("DELETE FROM checkpoints")
        opens = workers.shared(snapshot)
        assert opens is not None
        with opens() as again:
            assert list(again.records()) == before


def killed(process: subprocess.Popen[str], pids: list[int]) -> None:
    """Kill the parent, and see its workers go."""
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    process.communicate()


def test_a_killed_parent_leaves_no_worker(source: Path, postgres_dsn: str) -> None:
    """In the middle of a batch, and between two; what two workers began, three and then one go on with."""
    transfer.migrate(source, f"{postgres_dsn}&schema=clean")
    schema.setup(provider_for(f"{postgres_dsn}&schema=killed"))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("LOCK TABLE killed.checkpoints IN EXCLUSIVE MODE")
        process = run(source, f"{postgres_dsn}&schema=killed", 2)
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(1)]
        waiting = (
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'killed.checkpoints'::regclass"
        )
        while conn.execute(waiting).fetchone() != (2,):
            assert process.poll() is None
            time.sleep(0.02)
        killed(process, pids)
    process = run(source, f"{postgres_dsn}&schema=killed", 3)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    while batches(postgres_dsn, "killed") == 0:
        assert process.poll() is None
        time.sleep(0.005)
    killed(process, pids)
    last = run(source, f"{postgres_dsn}&schema=killed", 1)
    _, err = last.communicate(timeout=60)
    assert last.returncode == 0, err
    assert rows(postgres_dsn, "killed") == rows(postgres_dsn, "clean")


@pytest.mark.usefixtures("small")
def test_the_error_of_a_worker(source: Path, postgres_dsn: str) -> None:
    """It comes out as it would from one process, and the run can be continued."""
    transfer.migrate(source, f"{postgres_dsn}&schema=clean", options=Options(workers=1))
    schema.setup(provider_for(postgres_dsn))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE unique_violation USING DETAIL = 'it is theirs'; END $$"
        )
        conn.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON checkpoints FOR EACH ROW"
            " WHEN (NEW.thread_id = 'thread 25 é') EXECUTE FUNCTION refuse()"
        )
    with pytest.raises(ConflictError, match="it is theirs"):
        transfer.migrate(source, postgres_dsn, options=Options(workers=2))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("DROP TRIGGER refuse ON checkpoints")
    assert transfer.migrate(source, postgres_dsn, options=Options(workers=2)).verified
    assert rows(postgres_dsn) == rows(postgres_dsn, "clean")


@pytest.mark.usefixtures("small")
def test_conflicts_are_settled_by_workers_too(source: Path, postgres_dsn: str) -> None:
    transfer.migrate(source, f"{postgres_dsn}&schema=clean")
    for choice in ("replace", "merge"):
        name = f"{postgres_dsn}&schema={choice}"
        transfer.migrate(source, name)
        with psycopg.connect(postgres_dsn) as conn:
            conn.execute(f"DELETE FROM {choice}.checkpoints WHERE thread_id LIKE '%5%'".encode())
            conn.execute(f"DELETE FROM {choice}.checkpoint_blobs WHERE thread_id LIKE '%5%'".encode())
        report = transfer.migrate(source, name, options=Options(workers=2, on_conflict=choice))
        assert report.verified
        assert rows(postgres_dsn, choice) == rows(postgres_dsn, "clean")


@pytest.mark.usefixtures("small")
def test_a_file_in_use_has_one_worker(
    source: Path, postgres_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    used = tmp_path / "used.db"
    used.write_bytes(source.read_bytes())
    with closing(sqlite3.connect(used)) as conn:
        conn.execute("CREATE TABLE more (n)")
        assert transfer.migrate(used, postgres_dsn, options=Options(workers=2)).verified
    assert "there is one worker" in caplog.text


def test_a_file_that_changed_since_is_not_joined(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "chat.db"
    copy.write_bytes(source.read_bytes())
    with provider_for(f"sqlite:///{copy}").source() as opened:
        opens = workers.shared(opened)
        assert opens is not None
        make.execute(copy, "DELETE FROM writes")
        with pytest.raises(SourceError, match="was written to"), opens():
            pass


def test_an_archive_that_was_exchanged_is_not_read(source: Path, tmp_path: Path) -> None:
    transfer.export(source, tmp_path / "archive")
    with ArchiveSource(tmp_path / "archive") as opened:
        opens = opened.share()
        part = next((tmp_path / "archive").glob("*.zst"))
        part.write_bytes(b"x" * part.stat().st_size)
        with opens() as again, pytest.raises(ArchiveError, match="damaged"):
            list(again.records())


def test_how_many_are_sensible(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, many in ((1, 1), (2, 1), (4, 2), (32, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert workers.sensible(None) == many
        assert workers.sensible(8) == 8


def test_settings_and_dsn() -> None:
    assert Settings(transfer_workers=3).transfer_workers == 3
    assert provider_for("postgresql://h/x?workers=5").settings.transfer_workers == 5


def test_a_worker_that_cannot_start(
    source: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    monkeypatch.setattr("persistence.transfer.workers._PROGRAM", "raise SystemExit(3)")
    with pytest.raises(TransferError, match="a worker of the transfer ended"):
        transfer.migrate(source, postgres_dsn, options=Options(workers=2))
