"""``persistence inspect`` in text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from persistence import transfer
from tests.cli.conftest import Run
from tests.transfer import make


def test_inspect(run: Run, tmp_path: Path) -> None:
    with make.database(tmp_path / "a.db") as saver:
        for number, thread in enumerate(("evil\x1b[31m\0", "plain")):
            make.put(saver, thread, {"c": ["x" * 1000 * (number + 1)]}, v=4)
    transfer.export(tmp_path / "a.db", tmp_path / "copy")
    overview = run("inspect", "copy").stdout
    assert "langgraph-persistence archive, version 1" in overview
    assert "\nthreads         2\n" in overview
    listed = run("inspect", "copy", "--threads").stdout
    assert r"evil\x1b[31m\x00" in listed
    assert "\x1b" not in listed
    assert "plain" in listed
    limited = run("inspect", "copy", "--threads", "--limit", "1").stdout
    assert "plain" not in limited
    assert "and more" in limited
    document = json.loads(run("inspect", "sqlite:///a.db", "--thread", "plain", "--json").stdout)
    (checkpoint,) = document["checkpoints"]
    assert checkpoint["channels"] == 1
    assert checkpoint["bytes"] > 2000
    missing = run("inspect", "copy", "--thread", "nobody")
    assert missing.returncode == 5
    assert "no thread 'nobody'" in missing.stderr
    assert run("inspect", "copy", "--threads", "--thread", "plain").returncode == 2
