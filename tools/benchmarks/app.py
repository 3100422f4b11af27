"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.benchmarks import goals, report
from tools.benchmarks.chart import svg
from tools.benchmarks.server import Server, delayed, server
from tools.benchmarks.works import MEMORY, Arena, Outcome, Work, perform, plan

ROUND_TRIP = 1.0
"""Milliseconds that the proxy adds to each question and its answer."""


def main(argv: list[str] | None = None) -> int:
    """Run or read the measurements, then print and write them. Goals that are not met are no failure."""
    options = _options(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    run = json.loads(options.read.read_text()) if options.read else _run(options, console)
    outcomes = [Outcome.from_json(data) for data in run["works"]]
    verdicts = goals.judge(outcomes)
    run["goals"] = [asdict(verdict) for verdict in verdicts]
    if options.read:
        for outcome in outcomes:
            report.show(console, outcome)
    if not options.short:
        report.show_goals(console, verdicts)
    _save(options.json, run)
    if options.chart:
        options.chart.write_text(svg(outcomes), encoding="utf-8")
    if options.page:
        report.write_page(options.page, run, outcomes, verdicts)
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our savers against the official ones, side by side.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="seconds: show that it runs, not how fast it is")
    length.add_argument("--full", action="store_true", help="also 500 workflows and states of 100 MB")
    length.add_argument("--read", type=Path, metavar="JSON", help="measure nothing, take an earlier run")
    parser.add_argument("--list", action="store_true", help="name the works and end")
    parser.add_argument("--only", metavar="TEXT", action="append", help="works with this in their name")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the databases are: a folder on a real disk")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all samples there, after each work")
    parser.add_argument("--resume", action="store_true", help="do only what is not in the --json file yet")
    parser.add_argument("--chart", type=Path, metavar="PATH", help="write an SVG chart there")
    parser.add_argument(
        "--page", type=Path, metavar="PATH", help="put the tables between this page's markers"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("at least one round, and more than no time")
    if options.resume and not options.json:
        parser.error("--resume goes on with a file: name it with --json")
    options.works = [
        work
        for work in plan(short=options.short, full=options.full)
        if not options.only or any(text in work.name for text in options.only)
    ]
    if options.list:
        parser.exit(message="".join(f"{work.name}\n" for work in options.works))
    if not options.works:
        parser.error("no work has such a name; --list shows them")
    if options.short:
        options.rounds, options.seconds = 1, 0.05
    return options


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    with _place(options.folder) as folder, server(folder) as conninfo, delayed(conninfo, ROUND_TRIP) as far:
        return _measure(options, console, folder, Server(conninfo, far))


@contextmanager
def _place(asked: Path | None) -> Iterator[Path]:
    """A new folder, removed afterwards. /var/tmp is on a disk where /tmp may be memory."""
    disk = Path("/var/tmp")  # noqa: S108 - the name below it is random
    parent = asked or (disk if os.access(disk, os.W_OK) else Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix="persistence-bench-", dir=parent) as name:
        yield Path(name)


def _measure(options: argparse.Namespace, console: Console, folder: Path, where: Server) -> dict[str, Any]:
    for name in [n for n in os.environ if n.startswith("PERSISTENCE_") and n != "PERSISTENCE_TEST_POSTGRES"]:
        del os.environ[name]  # the run has the settings that it says it has
    machine = report.machine(folder)
    if machine["file system"].startswith(("tmpfs", "ramfs")):
        console.print("warning: the databases are in memory; name a folder on a disk with --folder")
    machine |= {f"Postgres: {key}": value for key, value in where.describe().items()}
    for key, value in machine.items():
        console.print(f"{key}: {value}", markup=False, highlight=False)
    run: dict[str, Any] = {
        "command": " ".join(["python", "tools/bench.py", *(a for a in sys.argv[1:] if a != "--resume")]),
        "date": datetime.date.today().isoformat(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "machine": machine,
        "works": [],
    }
    if options.resume and options.json.exists():
        run["works"] = _done(json.loads(options.json.read_text(encoding="utf-8")), run)
    done = {data["name"] for data in run["works"]}
    with Arena(folder, where, seeded=5 if options.short else 100) as arena:
        for work in options.works:
            if work.name not in done:
                outcome = _one(work, arena, options)
                report.show(console, outcome)
                run["works"].append(outcome.as_json())
                _save(options.json, run)
    return run


def _done(earlier: dict[str, Any], run: dict[str, Any]) -> list[dict[str, Any]]:
    """The works of an interrupted run; contenders are compared within a work, so each is whole.

    Raises:
        SystemExit: It was another measurement.
    """

    def measured(some: dict[str, Any]) -> tuple[Any, ...]:
        machine = {key: value for key, value in some["machine"].items() if "round trip" not in key}
        return some["rounds"], some["seconds"], machine

    if measured(earlier) != measured(run):
        raise SystemExit("the file is of another machine, other versions or other rounds: begin a new one")
    works: list[dict[str, Any]] = earlier["works"]
    return works


def _save(path: Path | None, run: dict[str, Any]) -> None:
    """Replace the file: an interrupted run keeps what it has measured."""
    if path is not None:
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        new.replace(path)


def _one(work: Work, arena: Arena, options: argparse.Namespace) -> Outcome:
    # A large state takes seconds, and its children are processes that begin cold each time.
    # So are those whose memory is looked at; and what is moved into a new database is never warm.
    rounds = min(options.rounds, 3) if work.kind in ("large", "history", MEMORY) else options.rounds
    warm_up = not options.short and work.kind in ("steps", "graph", "store")
    return perform(work, arena, rounds=rounds, warm_up=warm_up, seconds=options.seconds)
