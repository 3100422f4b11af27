"""Environments as a user has them: the wheel and its dependencies in a venv, outside the checkout."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT, Result, clean_environment, make_chat


@dataclass(frozen=True)
class Installation:
    """One venv with the wheel in it."""

    folder: Path

    def run(self, cwd: Path, program: str, *arguments: str, timeout: float = 180) -> Result:
        """Run one of its programs; nothing of the checkout is in reach."""
        environment = {k: v for k, v in clean_environment().items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git tracks or would track, without leftovers."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    target = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", target, source],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def sqlite_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Without extras."""
    return _install(tmp_path_factory.mktemp("plain"), str(wheel))


@pytest.fixture(scope="session")
def complete(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """With all extras."""
    return _install(tmp_path_factory.mktemp("all"), f"{wheel}[all]")


def _install(folder: Path, requirement: str) -> Installation:
    """By uv, which needs a tenth of pip's time."""
    uv, environment = Path(sys.executable).with_name("uv"), folder / "venv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True, timeout=60)
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", environment, requirement], check=True, timeout=600
    )
    return Installation(environment)


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A SQLite database with two conversations."""
    return make_chat(tmp_path)
