"""What an archive or a database holds is told without moving it, and reading is as safe as importing."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from persistence import transfer
from persistence.errors import ArchiveError, SourceError
from persistence.transfer.digest import digests
from persistence.transfer.sides import open_source
from tests.transfer import make


@pytest.fixture
def archive(filled: Path, tmp_path: Path) -> Path:
    transfer.export(filled, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_archive_by_its_manifest(filled: Path, archive: Path) -> None:
    (archive / "part-000001.msgpack.zst").write_bytes(b"not looked at")
    seen = transfer.inspect(archive)
    manifest = json.loads((archive / "manifest.json").read_text())
    assert seen.manifest == manifest
    assert seen.totals is not None
    assert seen.totals.threads == manifest["totals"]["threads"] == 4
    assert seen.threads is None
    assert seen.checkpoints is None
    assert json.loads(seen.to_json())["manifest"]["fingerprint"] == manifest["fingerprint"]


@pytest.mark.parametrize("kind", ["archive", "sqlite", "postgres"])
def test_lists_say_the_same_of_every_side(filled: Path, archive: Path, postgres_dsn: str, kind: str) -> None:
    side: Path | str = {"archive": archive, "sqlite": filled}.get(kind, postgres_dsn)
    if kind == "postgres":
        transfer.migrate(filled, postgres_dsn)
    with open_source(filled, None) as source:
        expected = {thread.thread_id: thread.sha256.hex() for thread in digests(source.records(data=False))}
    listed = transfer.inspect(side, threads=True).threads
    assert listed is not None
    assert {entry.thread_id: entry.digest for entry in listed} == expected
    assert sum(entry.bytes for entry in listed) == transfer.plan(filled, archive / "x").totals.bytes
    few = transfer.inspect(side, threads=True, limit=2)
    assert few.threads == listed[:2]
    assert few.more

    with closing(sqlite3.connect(filled)) as conn:
        ids = conn.execute(
            "SELECT checkpoint_ns, checkpoint_id, parent_checkpoint_id FROM checkpoints"
            " WHERE thread_id = 'chat 1 é' ORDER BY 1, 2"
        ).fetchall()
        (writes,) = conn.execute("SELECT count(*) FROM writes WHERE thread_id = 'chat 1 é'").fetchone()
    seen = transfer.inspect(side, thread="chat 1 é")
    assert seen.checkpoints is not None
    assert [(c.checkpoint_ns, c.checkpoint_id, c.parent_id) for c in seen.checkpoints] == ids
    assert sum(c.writes for c in seen.checkpoints) == writes
    assert {c.source for c in seen.checkpoints} <= {"input", "loop", "update", "fork"}
    assert all(c.made and isinstance(c.step, int) for c in seen.checkpoints)
    few = transfer.inspect(side, thread="chat 1 é", limit=3)
    assert few.checkpoints is not None
    assert [c.checkpoint_id for c in few.checkpoints] == [id_ for _, id_, _ in ids[:3]]
    assert few.more
    with pytest.raises(SourceError, match="no thread 'nobody'"):
        transfer.inspect(side, thread="nobody")


def test_a_database_as_a_whole(filled: Path) -> None:
    seen = transfer.inspect(filled)
    assert seen.totals is not None
    assert seen.totals.threads == 4
    assert seen.manifest is None
    assert seen.findings == []


def test_what_cannot_be_read_is_said(database: Path) -> None:
    make.execute(database, "UPDATE checkpoints SET type = 'pickle' WHERE thread_id = 'log'")
    seen = transfer.inspect(database)
    assert [(f.kind, f.severity, f.count) for f in seen.findings if f.severity == "refused"] == [
        ("pickle", "refused", 20)
    ]
    listed = transfer.inspect(database, threads=True).threads
    assert listed is not None
    assert {entry.thread_id for entry in listed if entry.digest is None} == {"log"}


def test_a_damaged_archive_is_not_listed(archive: Path) -> None:
    part = archive / "part-000001.msgpack.zst"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    for wanted in ({"threads": True}, {"thread": "log"}):
        with pytest.raises(ArchiveError, match="checksum"):
            transfer.inspect(archive, **wanted)
