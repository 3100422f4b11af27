"""Kills runs of a scenario, finishes them, and compares all rows with those of one clean run."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tests.support import ROOT, clean_environment
from tests.transfer.kills.scenarios import Place, Rows, Scenario

REFUSED = {"ArchiveError", "ConflictError", "ConnectError"}
"""How one of two runs at once may end."""


@dataclass
class Nursery:
    """The process that forks the children."""

    process: subprocess.Popen[str]

    def run(self, scenario: Scenario, place: Place, *runs: tuple[int | None, float | None]) -> list[Any]:
        """Run once for each of ``runs``, all at once: where it dies, and after how many seconds."""
        request = {
            "scenario": scenario.name,
            "place": {name: str(value) for name, value in asdict(place).items()},
            "runs": [{"die_at": die_at, "kill_after": kill_after} for die_at, kill_after in runs],
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the nursery died"
        return list(json.loads(answer))


@contextmanager
def nursery() -> Iterator[Nursery]:
    """Start it, end it."""
    environment = clean_environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.transfer.kills.nursery"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        try:
            yield Nursery(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)


@dataclass
class Campaign:
    """All kills of one scenario."""

    nursery: Nursery
    scenario: Scenario
    folder: Path
    server: str
    source: Path
    kills: int = 0
    steps: list[str] = field(default_factory=list)
    """Where a clean run can die."""
    seconds: float = 0.0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        with self._place() as place:
            clean = self._finish(place)
            self.steps, self.seconds = clean["steps"], clean["seconds"]
            self._rows: Rows = self.scenario.rows(place)
        assert any(self._rows.values())
        # The first run of all may set up what others find: only then are the places those of every run.
        assert self.steps, "no commit was seen"

    def at_commits(self, places: Sequence[int]) -> None:
        """Die at places of a clean run, counted from 1, each in a run of its own."""
        for die_at in places:
            with self._place() as place:
                done = self._run(place, (die_at, None))
                assert done["killed"], f"{self.scenario.name} did not come to {self.steps[die_at - 1]!r}"
                self._compare(place, f"killed {self.steps[die_at - 1]} (place {die_at})")

    def at_random(self, runs: int, choose: random.Random) -> None:
        """Die at any instant, up to three times before the run may end."""
        for _ in range(runs):
            with self._place() as place:
                instants = [choose.uniform(0, self.seconds) for _ in range(choose.randint(1, 3))]
                for instant in instants:
                    self._run(place, (None, instant))
                self._compare(place, f"killed after {instants}")

    def two_at_once(self, places: Sequence[int | None]) -> None:
        """Two runs into one target: one waits or is refused, and goes on if the other dies there."""
        for die_at in places:
            with self._place() as place:
                for done in self.nursery.run(self.scenario, place, (die_at, None), (None, None)):
                    self.kills += done["killed"]
                    assert done["killed"] or "steps" in done or done["error"] in REFUSED, done["text"]
                self._compare(place, f"two at once, one of them killed at place {die_at}")

    def _run(self, place: Place, run: tuple[int | None, float | None]) -> dict[str, Any]:
        (done,) = self.nursery.run(self.scenario, place, run)
        assert done["killed"] or "steps" in done, done.get("text")
        self.kills += done["killed"]
        return dict(done)

    def _finish(self, place: Place) -> dict[str, Any]:
        done = self._run(place, (None, None))
        assert not done["killed"]
        return done

    def _compare(self, place: Place, how: str) -> None:
        self._finish(place)
        rows = self.scenario.rows(place)
        assert rows == self._rows, f"{self.scenario.name}, {how}: other rows than after one clean run"

    @contextmanager
    def _place(self) -> Iterator[Place]:
        number = next(self._numbers)
        schema = f"k{number}_{self.scenario.name.replace('-', '_')}"
        folder = self.folder / f"{self.scenario.name}-{number}"
        folder.mkdir()
        place = Place(folder, schema, self.server, self.source)
        self.scenario.prepare(place)
        yield place
        with psycopg.connect(self.server, autocommit=True) as conn:
            conn.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE'.encode())
