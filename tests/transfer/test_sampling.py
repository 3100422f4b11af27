"""A sample says that it is one, can be drawn again, and reads no more than it needs; how to resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import psycopg
import pytest

from persistence import transfer
from persistence.errors import ArchiveError, ConfigurationError, SourceError
from persistence.transfer import archive_format as fmt
from persistence.transfer import comparison, reading
from persistence.transfer.digest import ThreadDigest
from persistence.transfer.sampling import Sample
from persistence.transfer.verify import compare
from tests.support import COMMAND
from tests.transfer import make

THREADS = [f"thread {number:03}" for number in range(200)]


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "chat.db"
    with make.database(path) as saver:
        saver.conn.execute("PRAGMA synchronous = OFF")
        for thread in THREADS:
            make.put(saver, thread, {"c": [thread, "x" * 300]})
    return path


@pytest.fixture
def other(many: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(many, tmp_path / "other.db"))


def sampled(left: Any, right: Any, size: str, seed: int | None = None, **more: Any) -> transfer.Verdict:
    return transfer.verify(left, right, check=transfer.Check(sample=size, seed=seed, **more))


@pytest.mark.parametrize("depth", ["digests", "semantic"])
def test_a_sample_says_so(many: Path, other: Path, depth: transfer.Depth) -> None:
    verdict = sampled(many, other, "10", seed=7, depth=depth)
    assert verdict.equal
    assert (verdict.sampled, verdict.threads, verdict.total_threads) == (True, 10, 200)
    assert verdict.summary() == "equal in a sample of 10 of 200 threads (--sample 10 --seed 7)"
    document = json.loads(verdict.to_json())
    assert (document["sampled"], document["seed"], document["sample"]) == (True, 7, "10")
    whole = transfer.verify(many, other)
    assert (whole.sampled, whole.threads, whole.total_threads) == (False, 200, 200)
    assert whole.summary() == "equal"


def test_the_same_seed_finds_the_same(many: Path, other: Path) -> None:
    make.execute(other, "UPDATE checkpoints SET metadata = '{}' WHERE thread_id LIKE '%5'")

    def found(size: str, seed: int) -> set[str]:
        return {each.thread_id for each in sampled(many, other, size, seed).differences}

    assert found("20%", 1) == found("20%", 1)
    assert len({frozenset(found("20%", seed)) for seed in range(4)}) > 1
    assert found("20%", 1) <= found("60%", 1)
    assert found("100%", 1) == {thread for thread in THREADS if thread.endswith("5")}
    verdict = sampled(many, other, "100%", 1)
    assert verdict.summary().startswith("the two sides differ in 20 threads in a sample of 200 of 200")


def test_size_of_a_share(many: Path, other: Path) -> None:
    sizes = [sampled(many, other, "25%", seed).threads for seed in range(10)]
    assert 30 < sum(sizes) / len(sizes) < 70
    assert sampled(many, other, "0.0001%", 3).threads == 1
    assert sampled(many, other, "1000", 3).threads == 200


@pytest.mark.parametrize("size", ["", "5 %%", "0", "0%", "101%", "-3", "many", "1e3"])
def test_no_sample(size: str) -> None:
    with pytest.raises(ConfigurationError, match="is no sample"):
        Sample(size, 1)


def test_a_thread_on_one_side_only_may_be_chosen(many: Path, other: Path) -> None:
    make.execute(other, "DELETE FROM checkpoints WHERE thread_id = 'thread 007'")
    assert sampled(many, other, "200", 1).differing_threads == 1
    assert sampled(other, many, "200", 1).differing_threads == 1


def test_with_postgres_and_an_archive(many: Path, postgres_dsn: str, tmp_path: Path) -> None:
    transfer.migrate(many, postgres_dsn, archive=tmp_path / "archive")
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoint_blobs SET blob = blob || 'x'")
    verdicts = [sampled(side, postgres_dsn, "12", 5) for side in (many, tmp_path / "archive")]
    for verdict in verdicts:
        assert (verdict.threads, verdict.differing_threads) == (12, 12)
    assert verdicts[0].differences == verdicts[1].differences


@pytest.fixture
def archive(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty parts or so; threads span them."""
    monkeypatch.setattr(fmt, "PART_BYTES", 5_000)
    transfer.export(many, tmp_path / "archive")
    return tmp_path / "archive"


@pytest.mark.parametrize("depth", ["digests", "checksums"])
def test_archive_alone_reads_the_parts_of_the_sample(
    archive: Path, monkeypatch: pytest.MonkeyPatch, depth: transfer.Depth
) -> None:
    opened: list[str] = []
    original = fmt.open_regular

    def traced(folder: Path, name: str) -> AbstractContextManager[BinaryIO]:
        opened.append(name)
        return original(folder, name)

    monkeypatch.setattr(fmt, "open_regular", traced)
    check = transfer.verify_archive(archive, check=transfer.Check(sample="5%", seed=3, depth=depth))
    parts = [name for name in opened if name != fmt.MANIFEST]
    assert check.total_parts > 15
    assert 1 <= len(parts) <= 4
    assert (check.sampled, check.seed, check.total_threads) == (True, 3, 200)
    assert "in a sample of" in check.summary()
    assert "--sample 5% --seed 3" in check.summary()
    if depth == "digests":
        assert 10 <= check.totals.threads <= 30
        assert check.totals.threads == check.totals.checkpoints
    opened.clear()
    transfer.verify_archive(archive, check=transfer.Check(sample="5%", seed=3, depth=depth))
    assert parts == [name for name in opened if name != fmt.MANIFEST]


def test_samples_of_all_seeds_find_damage_anywhere(archive: Path) -> None:
    """Each thread begins in one part; together the parts' samples are the whole."""
    whole = transfer.verify_archive(archive)
    assert whole.summary() == "intact, verified by content"
    every = transfer.verify_archive(archive, check=transfer.Check(sample="100%", seed=1))
    assert every.totals.threads == whole.totals.threads
    assert every.totals.checkpoints == whole.totals.checkpoints
    part = sorted(archive.glob("part-*"))[5]
    part.write_bytes(part.read_bytes()[:-1])
    found = 0
    for seed in range(30):
        try:
            transfer.verify_archive(archive, check=transfer.Check(sample="10%", seed=seed))
        except ArchiveError:
            found += 1
    assert 0 < found < 30


def test_command(many: Path, other: Path, tmp_path: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([COMMAND, "verify", *args], capture_output=True, text=True, timeout=60)

    done = run(str(many), str(other), "--sample", "5%", "--json")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["sampled"], verdict["total_threads"]) == (0, True, 200)
    make.execute(other, "UPDATE checkpoints SET metadata = '{}'")
    again = run(str(many), str(other), "--sample", "5%", "--seed", str(verdict["seed"]))
    assert again.returncode == 7
    assert f"the two sides differ in {verdict['threads']} threads in a sample of" in again.stdout
    assert run(str(many), str(other), "--depth", "deep").returncode == 2
    assert run(str(many), str(other), "--sample", "none").returncode == 2


# Resuming


SCRIPT = """
import os, signal, sys
from pathlib import Path
from persistence import transfer
from persistence.transfer import comparison, progress_file, reading
reading._FIRST = reading._MOST = 10
comparison._SAVED_EVERY = 0
saved, write = 0, progress_file.ProgressFile._write
def traced(self, state):
    global saved
    if saved == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, state)
    saved += 1
progress_file.ProgressFile._write = traced
side = lambda text: text if "://" in text else Path(text)
check = transfer.Check(resume=Path(sys.argv[3]), sample=sys.argv[5] or None)
transfer.verify(side(sys.argv[1]), side(sys.argv[2]), check=check)
"""


def killed(left: Path | str, right: Path | str, file: Path, *, rounds: int, sample: str = "") -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(left), str(right), str(file), str(rounds), sample],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_FIRST", 10)
    monkeypatch.setattr(reading, "_MOST", 10)


def test_a_killed_comparison_goes_on(
    many: Path, other: Path, tmp_path: Path, small_rounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.execute(
        other, "UPDATE checkpoints SET metadata = '{}' WHERE thread_id IN ('thread 003', 'thread 150')"
    )
    file, resumed = tmp_path / "progress", transfer.Check(resume=tmp_path / "progress")
    killed(many, other, file, rounds=8)
    assert json.loads(file.read_text())["after"] == "thread 079"
    read: list[str] = []
    original = compare

    def traced(left: Any, right: Any, lefts: Iterable[ThreadDigest], *rest: Any) -> None:
        digests = list(lefts)
        read.extend(each.thread_id for each in digests)
        original(left, right, digests, *rest)

    monkeypatch.setattr(comparison, "compare", traced)
    verdict = transfer.verify(many, other, check=resumed)
    assert read == THREADS[80:]
    assert verdict == transfer.verify(many, other)
    assert not file.exists()


def test_a_resumed_sample_is_the_same_sample(
    many: Path, other: Path, tmp_path: Path, small_rounds: None
) -> None:
    make.execute(other, "UPDATE checkpoints SET metadata = '{}' WHERE thread_id LIKE '%5'")
    file = tmp_path / "progress"
    killed(many, other, file, rounds=3, sample="50%")
    seed = json.loads(file.read_text())["verdict"]["seed"]
    check = transfer.Check(sample="50%", resume=file)
    with pytest.raises(SourceError, match="other options"):
        transfer.verify(many, other, check=transfer.Check(sample="50%", seed=seed + 1, resume=file))
    verdict = transfer.verify(many, other, check=check)
    assert verdict == sampled(many, other, "50%", seed)
    assert verdict.seed == seed
    assert verdict.differing_threads > 0


@pytest.mark.parametrize("change", ["UPDATE", "INSERT", "DELETE"])
def test_postgres_that_changed_is_told(
    many: Path, postgres_dsn: str, tmp_path: Path, small_rounds: None, change: str
) -> None:
    statements = {
        "UPDATE": "UPDATE checkpoints SET metadata = '{}' WHERE thread_id = %s",
        "INSERT": "INSERT INTO checkpoint_writes VALUES (%s, '', 'c', 't', 0, 'a', 'null', '', '')",
        "DELETE": "DELETE FROM checkpoints WHERE thread_id = %s",
    }
    transfer.migrate(many, postgres_dsn, verify=False)
    file = tmp_path / "progress"
    killed(many, postgres_dsn, file, rounds=8)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(statements[change].encode(), ["thread 199"])  # not compared yet
    check = transfer.Check(resume=file)
    before = file.read_bytes()
    assert transfer.verify(many, postgres_dsn, check=check).differing_threads == 1
    file.write_bytes(before)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(statements[change].encode(), ["thread 079"])
    with pytest.raises(SourceError, match=r"threads of postgresql.* that were compared"):
        transfer.verify(many, postgres_dsn, check=check)


def test_a_side_that_is_another(
    many: Path, other: Path, tmp_path: Path, small_rounds: None, archive: Path
) -> None:
    file = tmp_path / "progress"
    killed(many, other, file, rounds=8)
    check = transfer.Check(resume=file)
    third = shutil.copy(other, tmp_path / "third.db")
    for left, right in ((many, third), (other, many), (many, archive)):
        with pytest.raises(SourceError, match="another database or archive"):
            transfer.verify(left, right, check=check)
    with pytest.raises(SourceError, match="other options"):
        transfer.verify(many, other, check=transfer.Check(resume=file, depth="semantic"))
    with make.database(other) as saver:
        make.put(saver, "thread 003", {"c": ["late"]})
    with pytest.raises(SourceError, match=r"threads of sqlite.*other\.db that were compared"):
        transfer.verify(many, other, check=check)


def test_a_file_that_is_none(many: Path, other: Path, tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{}", b'{"format": "x"}', b"\xff", b"[" * 100_000):
        (tmp_path / "progress").write_bytes(content)
        with pytest.raises(SourceError, match="does not hold the progress"):
            transfer.verify(many, other, check=transfer.Check(resume=tmp_path / "progress"))
    with pytest.raises(SourceError, match="cannot write"):
        transfer.verify(many, other, check=transfer.Check(resume=tmp_path / "nowhere" / "progress"))
