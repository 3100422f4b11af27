"""The Compose file, the Dockerfile and the Makefile, as far as they can be tested without Docker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support import ROOT


@pytest.fixture(scope="module")
def compose() -> Any:
    """The Compose file."""
    with (ROOT / "docker-compose.yml").open() as file:
        return YAML(typ="safe").load(file)


def test_compose_file_fits_the_published_schema() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    result = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_services_wait_for_each_other(compose: Any) -> None:
    services = compose["services"]
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["app"]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert services["postgres"]["healthcheck"]["test"][1] == "pg_isready"


def test_ports_are_open_to_this_machine_only(compose: Any) -> None:
    for name in ("postgres", "app"):
        assert all(port.startswith("127.0.0.1:") for port in compose["services"][name]["ports"])


def test_services_run_real_commands(compose: Any) -> None:
    """Each command is one of the environment's programs, with arguments that it knows."""
    assert compose["services"]["migrate"]["command"] == ["persistence", "setup"]
    program, target, *_ = compose["services"]["app"]["command"]
    assert Path(sys.executable).with_name(program).exists()
    module, _, name = target.partition(":")
    code = f"import {module}; {module}.{name}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_dockerfile_copies_what_there_is_and_drops_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            *sources, _ = line.split()[1:]
            for source in sources:
                assert (ROOT / source).exists(), line
                assert f"!{source}" in (ROOT / ".dockerignore").read_text(), source
    users = [line for line in lines if line.startswith("USER ")]
    assert users and lines.index(users[-1]) > lines.index("FROM python:3.13-slim")
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    (installed,) = re.findall(r"\*\.whl\)\[([\w,]+)\]", "\n".join(lines))
    assert set(installed.split(",")) <= set(extras)


class TestMakefile:
    """What can be seen without making an environment; CI itself runs in one that make made."""

    def make(self, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
        """Run make in the checkout."""
        return subprocess.run(
            ["make", *arguments],
            cwd=ROOT,
            env={"PATH": path, "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def test_help_lists_the_targets(self) -> None:
        listed = re.findall(r"make (\w+)", self.make("help").stdout)
        assert {"demo", "test", "lint", "bench", "docs", "clean"} <= set(listed)

    def test_no_python_is_said_clearly(self, tmp_path: Path) -> None:
        for name in ("sh", "sed", "expand"):
            (tmp_path / name).symlink_to(f"/bin/{name}")
        result = subprocess.run(
            ["/bin/sh", ROOT / "tools" / "make_venv.sh", tmp_path / "venv"],
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 1
        assert "3.11" in result.stderr
        assert not (tmp_path / "venv").exists()
