"""The workflow and ``make matrix`` try what the package says it supports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.docs.pages import DOCS, blocks
from tests.support import ROOT
from tools.matrix import SUPPORTED

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def load(text: str) -> Any:
    return YAML(typ="safe").load(text)


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def example() -> str:
    """The workflow that docs/testing.md offers."""
    (block,) = (block for block in blocks(DOCS / "testing.md") if block.language == "yaml")
    return block.text


def test_workflows_fit_the_published_schema(example: str, tmp_path: Path) -> None:
    (tmp_path / "example.yml").write_text(example)
    checker = Path(sys.executable).with_name("check-jsonschema")
    for path in (WORKFLOW, tmp_path / "example.yml"):
        command = [str(checker), "--builtin-schema", "vendor.github-workflows", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr


def test_matrix_is_what_the_package_supports(project: Any, example: str) -> None:
    classifiers = " ".join(project["classifiers"])
    pythons = re.findall(r"Python :: (\d\.\d+)", classifiers)
    for text in (WORKFLOW.read_text(), example):
        matrix = load(text)["jobs"]["matrix"]["strategy"]["matrix"]
        assert matrix["python"] == pythons
        assert matrix["postgres"] == [str(version) for version in SUPPORTED]


def test_oldest_versions_are_the_lower_bounds(project: Any) -> None:
    requirements = project["dependencies"] + project["optional-dependencies"]["postgres"]
    bounds = {
        f"{name}=={bound}{'.0' * (2 - bound.count('.'))}"
        for name, bound in re.findall(r"(langgraph[\w-]*)>=([\d.]+)", " ".join(requirements))
    }
    upstream = load(WORKFLOW.read_text())["jobs"]["matrix"]["strategy"]["matrix"]["upstream"]
    assert set(upstream[1]["versions"].split()) == bounds


def test_actions_are_pinned() -> None:
    used = re.findall(r"uses: (\S+)", WORKFLOW.read_text())
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)


@pytest.mark.timeout(600)
def test_make_matrix_runs_the_suite_on_every_server_that_is_here() -> None:
    command = [sys.executable, "tools/matrix.py", "-k", "test_limit and postgres", "-n", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [row for row in result.stdout.splitlines() if row.startswith("│")]
    assert len(rows) >= 2  # the wheel's two
    assert all("│ 2      │ 0      │ 0       │" in row for row in rows), result.stdout
