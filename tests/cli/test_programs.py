"""The programs of a checkout: the demo, the migration tool, the benchmark, the generated reference."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT, Result, clean_environment
from tests.warm import Warm

Program = Callable[..., Result]


@pytest.fixture
def program(tmp_path: Path, warm: Warm) -> Program:
    """Runs a program of ``tools/``."""

    def program(name: str, *arguments: str, env: dict[str, str] | None = None, root: Path = ROOT) -> Result:
        return subprocess.run(
            [warm.python, root / "tools" / name, *arguments],
            cwd=tmp_path,
            env=clean_environment() | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=840,
        )

    return program


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the demo needs, so that a ``.demo`` of the person's own is left alone."""
    folder = tmp_path / "checkout"
    for name in ("tools", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_demo(checkout: Path, postgres_server: str, program: Program) -> None:
    """Twice: it begins anew each time."""
    for env in ({}, {"PERSISTENCE_TEST_POSTGRES": postgres_server}):
        result = program("demo.py", env=env, root=checkout)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "waiting for an answer: 3 nights in Lisbon cost 241.5. Book?" in result.stdout
        assert "migrated, verified by content" in result.stdout
        assert "ai: Your 3 nights in Lisbon are booked." in result.stdout
        assert result.stdout.rstrip().splitlines()[-1].startswith("verified.")
        assert (checkout / ".demo" / "postgres").exists() == (not env)
    assert (checkout / ".demo" / "archive" / "manifest.json").exists()


def test_demo_keeps_what_it_did_not_make(checkout: Path, program: Program) -> None:
    (checkout / ".demo").mkdir()
    (checkout / ".demo" / "mine").write_text("keep")
    result = program("demo.py", root=checkout)
    assert result.returncode == 1
    assert (checkout / ".demo" / "mine").read_text() == "keep"


@pytest.mark.parametrize("spelling", ["chat.db", "sqlite:///chat.db"])
def test_sqlite_to_postgres(chat: Path, postgres_dsn: str, spelling: str, program: Program) -> None:
    result = program("sqlite_to_postgres.py", spelling, postgres_dsn, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["verified"] is True


def test_sqlite_to_postgres_without_a_source(tmp_path: Path, program: Program) -> None:
    result = program("sqlite_to_postgres.py", "none 100%.db", "postgresql://h/x")
    assert result.returncode == 5
    assert "none%20100%25.db does not exist" in result.stderr
    assert program("sqlite_to_postgres.py").returncode == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(900)
def test_bench_runs(tmp_path: Path, program: Program) -> None:
    """Every kind of work; each saver did it, and found no wrong state; on a durable server."""
    result = program("bench.py", "--short", "--json", "bench.json", "--chart", "bench.svg")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    works = found["works"]
    kinds = {"steps", "graph", "store", "history", "large", "transfer", "transfer memory"}
    assert {work["kind"] for work in works} == kinds
    for work in works:
        rivals = [contender["name"] for contender in work["contenders"]]
        assert rivals[:2] == ["ours", "official"] or (rivals, work["kind"]) == (["ours"], "transfer memory")
        for contender in work["contenders"]:
            # Whether a program that happens to be installed can do its part, is not ours to say.
            if contender["name"] != "pgloader":
                assert (contender["errors"], contender["first errors"]) == (0, [])
            assert all(figure["median"] >= 0 for figure in contender["summary"].values())
    assert "<svg" in (tmp_path / "bench.svg").read_text()
    (tmp_path / "bench.json").write_text(json.dumps({**found, "works": works[1:]}))  # as if interrupted
    resumed = program("bench.py", "--short", "--json", "bench.json", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    now = json.loads((tmp_path / "bench.json").read_text())["works"]
    assert now[:-1] == works[1:]
    assert now[-1]["name"] == works[0]["name"]


def test_cli_reference_is_checked(checkout: Path, program: Program) -> None:
    (checkout / "docs").mkdir()
    assert program("cli_reference.py", "--check", root=checkout).returncode == 1
    assert program("cli_reference.py", root=checkout).returncode == 0
    assert program("cli_reference.py", "--check", root=checkout).returncode == 0
    page = checkout / "docs" / "cli.md"
    assert page.read_text() == (ROOT / "docs" / "cli.md").read_text()
    page.write_text(page.read_text().replace("verify", "compare"))
    assert program("cli_reference.py", "--check", root=checkout).returncode == 1
