"""``tools/verify_persistence.py`` passes where the database keeps conversations, and fails elsewhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import persistence
from tests.docs.pages import DOCS, blocks, commands
from tests.support import ROOT, Result, clean_environment
from tests.warm import Warm


def verify(warm: Warm, *arguments: str, folder: Path) -> Result:
    return subprocess.run(
        [warm.python, ROOT / "tools" / "verify_persistence.py", *arguments],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_a_database_is_verified(backend: str, postgres_dsn: str, tmp_path: Path, warm: Warm) -> None:
    dsn = {"sqlite": "sqlite:///chat.db", "postgres": postgres_dsn}[backend]
    result = verify(warm, "--dsn", dsn, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (page,) = (block for block in blocks(DOCS / "deployment.md") if "verify_persistence" in block.text)
    (promised,) = commands(page)
    *same, cut_off, last = result.stdout.splitlines()
    assert same[1:] == promised.expected[1:-2]
    assert cut_off.startswith(promised.expected[-2].rpartition(":")[0])
    assert last == promised.expected[-1]
    with persistence.open(dsn) as db:  # sqlite: in tmp_path, where the test runs as well
        assert db.checkpointer is not None
        assert list(db.checkpointer.list(None)) == []


def test_memory_is_found_out(tmp_path: Path, warm: Warm) -> None:
    result = verify(warm, "--dsn", "memory://", "--json", folder=tmp_path)
    assert result.returncode == 1, result
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["steps"][0] == "the database is memory://"
    assert report["failure"] == (
        "the database has nothing of the conversation, only the process that was killed had it"
    )
