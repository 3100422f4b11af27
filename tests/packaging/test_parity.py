"""The parity matrix says what a run showed, and an old page is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

from tests.support import ROOT
from tools import parity_matrix

BOTH = [["memory", "sync"], ["sqlite", "async"]]


def case(clauses: list[str], column: list[str] | None, inside: str = "", examples: int = 0) -> str:
    about = quoteattr(json.dumps({"clauses": clauses, "column": column, "examples": examples}))
    return f"<testcase><properties><property name='parity' value={about}/></properties>{inside}</testcase>"


@pytest.fixture
def junit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(parity_matrix, "PAGE", tmp_path / "docs" / "parity.md")
    (tmp_path / "docs").mkdir()
    return tmp_path / "tests.xml"


def run(junit: Path, *cases: str, check: bool = False) -> int:
    junit.write_text(f"<testsuites><testsuite>{''.join(cases)}<testcase/></testsuite></testsuites>")
    return parity_matrix.main(["--junit", str(junit), *(["--check"] if check else [])])


def row(clause: str) -> list[str]:
    """The cells of a clause."""
    lines = parity_matrix.PAGE.read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"| {clause} "))
    return [cell.strip() for cell in found.split("|")[2:-2]]


def test_cells_count_tests_and_examples(junit: Path) -> None:
    tried = case(["R1", "R4"], BOTH[0], examples=40)
    assert run(junit, tried, tried, *(case(["R4"], column) for column in BOTH)) == 0
    assert row("R4") == ["✓ 3 (80)", "✓ 1"]
    assert row("R1") == ["✓ 2 (80)", "-"]
    assert row("W1") == ["-", "-"]
    assert run(junit, case(["R4"], None, examples=20)) == 0
    assert row("R4") == ["✓ 1 (20)"] * 6


@pytest.mark.parametrize("inside", ["<failure/>", "<error/>"])
def test_failing_test_shows(junit: Path, inside: str) -> None:
    assert run(junit, case(["R4"], BOTH[0]), case(["R4"], BOTH[0], inside)) == 1
    assert row("R4") == ["**1 of 2 fail**"]
    assert "Failing: 1. Skipped: 0." in parity_matrix.PAGE.read_text()


def test_page_of_another_run_is_stale(junit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [case(["R4"], column, examples=1) for column in BOTH]
    assert run(junit, *good) == 0
    page = parity_matrix.PAGE.read_text()
    assert run(junit, *reversed(good), check=True) == 0
    for other in (
        [*good, good[0]],
        good[:1],
        [good[0], case(["R4"], BOTH[1], "<skipped/>", examples=1)],
        [good[0], case(["R4"], BOTH[1], "<failure/>", examples=1)],
        [good[0], case(["R4"], BOTH[1], examples=2)],
        [good[0], case(["R5"], BOTH[1], examples=1)],
        [],
    ):
        assert run(junit, *other, check=True) == 1
        assert "is stale" in capsys.readouterr().err
        assert parity_matrix.PAGE.read_text() == page
        assert junit.with_name("parity.md").read_text() != page  # what this run showed


def test_clause_that_nobody_wrote_is_refused(junit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(junit, case(["R99"], BOTH[0])) == 1
    assert "R99" in capsys.readouterr().err
    assert not parity_matrix.PAGE.exists()


def test_test_whose_fixtures_fail_counts_as_failing(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/contract/test_reading.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(
        [*command, "-k", "test_limit and postgres", f"--junitxml={junit}"],
        cwd=ROOT,
        env=os.environ | {"PERSISTENCE_TEST_POSTGRES": f"host={tmp_path} connect_timeout=2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    results = parity_matrix.read(junit)
    assert results.failed == {("R4", ("postgres", colour)): 1 for colour in ("sync", "async")}
