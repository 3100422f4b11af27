"""Render docs/parity.md: which clause of docs/contract.md is proved on which backend, in which colour.

Runs the contract suite, or reads the JUnit file of a run, and counts the tests of each clause.

    python tools/parity_matrix.py                      run the suite, write docs/parity.md
    python tools/parity_matrix.py --junit result.xml   read a run instead
    python tools/parity_matrix.py --check              write no page; exit code 1 if it is stale

The page of a run that was read is written beside its JUnit file too, so that CI keeps what it saw.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parity.md"
CONTRACT = ROOT / "docs" / "contract.md"
SUITE = "tests/contract"
SIX = [(backend, colour) for backend in ("memory", "postgres", "sqlite") for colour in ("async", "sync")]
"""The columns of a test that drives all savers at once."""

# What a clause promises and no test shows yet. A row with an entry is not called complete.
NOT_YET = {
    "V1": "`bytearray` nested in another value: LangGraph's serializer gives it back as `bytes`",
    "R2": "a database that sorts as a language does is tried where the server has ICU (`make matrix`)",
    "F1": "`delete_for_runs` reads the metadata of all checkpoints, unless you add an index on Postgres",
    "R3": "a filter reads the metadata of every checkpoint in its scope, unless you add an index on Postgres",
    "W6": "a lost power supply; a killed process and (`tests/faults`) a crashed server are tried",
}

_CLAUSE = re.compile(r"^- \*\*([A-Z]\d+)\b[ ]?(.*?)\.?\*\*", re.MULTILINE)

Column = tuple[str, str]


@dataclass
class Results:
    """What a run showed."""

    passed: Counter[tuple[str, Column]] = field(default_factory=Counter)
    failed: Counter[tuple[str, Column]] = field(default_factory=Counter)
    examples: Counter[tuple[str, Column]] = field(default_factory=Counter)
    columns: list[Column] = field(default_factory=list)
    skipped: int = 0

    def cell(self, clause: str, column: Column) -> str:
        """One cell: how many tests, whether all of them passed, and the examples that were generated."""
        bad, good = self.failed[clause, column], self.passed[clause, column]
        if bad:
            return f"**{bad} of {bad + good} fail**"
        examples = self.examples[clause, column]
        return (f"✓ {good}" + (f" ({examples})" if examples else "")) if good else "-"


def read(path: Path) -> Results:
    """The results in a JUnit file that pytest wrote for the contract suite."""
    results = Results()
    for case in ElementTree.parse(path).getroot().iter("testcase"):  # noqa: S314 - our own file
        found = case.find("properties/property[@name='parity']")
        if found is None:
            continue
        about = json.loads(found.attrib["value"])
        columns = [tuple(about["column"])] if about["column"] else SIX
        results.columns += [column for column in columns if column not in results.columns]
        if case.find("skipped") is not None:
            results.skipped += 1
            continue
        bad = case.find("failure") is not None or case.find("error") is not None
        for cell in product(about["clauses"], columns):
            (results.failed if bad else results.passed)[cell] += 1
            results.examples[cell] += about["examples"]
    return results


def clauses() -> dict[str, str]:
    """Id and title of every clause, from the contract."""
    return dict(_CLAUSE.findall(CONTRACT.read_text(encoding="utf-8")))


def render(results: Results) -> str:
    """The page."""
    columns = sorted(results.columns)
    lines = [
        "# Parity matrix",
        "",
        "Made by `tools/parity_matrix.py` from a run of `tests/contract`; not to be edited. A cell counts",
        "the tests that prove a [clause](contract.md) on one backend in one colour, and in brackets the",
        "examples that Hypothesis generated for them; a test is the same code in every column. LangGraph's",
        "conformance suite drives savers by their asynchronous methods. A backend that can be looked at from",
        "outside has more tests: raw bytes, killed processes, official savers. `make fuzz` tries more.",
        "",
        "| clause | " + " | ".join(f"{backend}, {colour}" for backend, colour in columns) + " | not yet |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for clause, title in clauses().items():
        cells = [results.cell(clause, column) for column in columns]
        name = f"{clause} {title}".strip()
        lines.append(f"| {name} | {' | '.join(cells)} | {NOT_YET.get(clause, '')} |")
    total = sum(results.failed.values())
    lines += ["", f"Failing: {total}. Skipped: {results.skipped}.", ""]
    return "\n".join(lines)


def run_suite(junit: Path) -> None:
    """Run the contract suite in this environment; its own output goes to the terminal."""
    command = [sys.executable, "-m", "pytest", SUITE, "-q", f"--junitxml={junit}", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=ROOT, check=False)  # noqa: S603 - a failing test is a row of the page


def main(argv: list[str] | None = None) -> int:
    """Make the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--junit", type=Path, help="read this run instead of running the suite")
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        junit = options.junit or Path(folder) / "contract.xml"
        if options.junit is None:
            run_suite(junit)
        results = read(junit)
    if unknown := sorted({clause for clause, _ in results.passed + results.failed} - set(clauses())):
        print(f"tests name clauses that {CONTRACT.name} does not have: {', '.join(unknown)}", file=sys.stderr)
        return 1
    page = render(results)
    if options.junit:
        options.junit.with_name(PAGE.name).write_text(page, encoding="utf-8")
    if options.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            print(f"docs/{PAGE.name} is stale: run tools/parity_matrix.py", file=sys.stderr)
            return 1
    else:
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote docs/{PAGE.name}")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
