"""Memory does not grow with the source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from persistence import transfer
from tests.transfer import make

SCRIPT = """
import resource, sys
from pathlib import Path
from persistence import transfer
report = transfer.migrate(Path(sys.argv[1]), sys.argv[2], archive=Path(sys.argv[3]))
assert report.verified
assert transfer.migrate(sys.argv[2], f"sqlite:///{sys.argv[3]}.db").verified
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
MEGABYTE = 1_000_000


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """One thread each, 10 and 90 MB of values that differ, and one that every checkpoint repeats."""
    paths, same = [], ["x" * (MEGABYTE // 2)]
    for size in (10, 90):
        path = tmp_path / f"{size}.db"
        with make.database(path) as saver:
            saver.conn.execute("PRAGMA synchronous = OFF")
            for number in range(size * 2):
                values = {"c": [os.urandom(MEGABYTE // 2)], "same": same}
                make.put(saver, "t", values, versions={"c": number, "same": "1"})
        paths.append(path)
    return paths


def test_peak_memory(sources: list[Path], postgres_dsn: str, tmp_path: Path) -> None:
    peaks = []
    for path in sources:
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                SCRIPT,
                str(path),
                f"{postgres_dsn}&schema=s{path.stem}",
                str(tmp_path / f"archive {path.stem}"),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 25 * MEGABYTE, peaks
    assert transfer.verify_archive(tmp_path / "archive 90").verified
