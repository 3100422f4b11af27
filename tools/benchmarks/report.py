"""What a run says: the machine, a table for each work, the goals; on the terminal and on a page."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from tools.benchmarks.contenders import OURS, POOL
from tools.benchmarks.goals import Verdict, ratio
from tools.benchmarks.transfers import PGLOADER
from tools.benchmarks.works import MEMORY, Outcome, Series

FIGURES = {
    "steps": [
        "steps/s",
        "save p50 ms",
        "save p95 ms",
        "save p99 ms",
        "save writes p50 ms",
        "load p50 ms",
        "load p95 ms",
        "load p99 ms",
    ],
    "graph": ["turns/s", "turn p50 ms", "turn p95 ms"],
    "store": ["put/s", "get/s", "search/s"],
    "history": ["list ms", "list peak MB"],
    "large": ["save ms", "load ms", "save peak MB", "load peak MB"],
    "transfer": ["whole s", "verify s"],
    MEMORY: ["peak MB", "largest MB"],
}
COMPARED = {
    "steps": ["steps/s"],
    "graph": ["turns/s"],
    "store": ["put/s", "get/s", "search/s"],
    "history": ["list ms"],
    "large": ["save ms", "load ms"],
    "transfer": ["whole s"],
    MEMORY: [],
}
"""Figures of which the ratio is shown."""
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PACKAGES = (
    "langgraph",
    "langgraph-checkpoint",
    "langgraph-checkpoint-sqlite",
    "langgraph-checkpoint-postgres",
    "langgraph-persistence",
    "psycopg",
    "psycopg-pool",
    "aiosqlite",
)


def machine(folder: Path) -> dict[str, str]:
    """What the figures depend on."""
    kind, options = filesystem(folder)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": f"{usable} of {os.cpu_count()}",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "SQLite's default synchronous in WAL mode": _synchronous(folder),
        "libpq": str(psycopg.pq.version()),
        "file system": f"{kind} ({options})",
        "connections at most": str(POOL),
        **{name: version(name) for name in PACKAGES},
        "pgloader": _pgloader(),
    }


def _pgloader() -> str:
    program = shutil.which(PGLOADER)
    if program is None:
        return "not installed, so it takes no part"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    return said.splitlines()[0] if said else "of an unknown version"


def _synchronous(folder: Path) -> str:
    """What the official SQLite savers have, who set nothing; the run gives them FULL, as it is for ours."""
    path = folder / "default.sqlite"
    conn = sqlite3.connect(path)
    conn.execute("PRAGMA journal_mode = WAL")
    (number,) = conn.execute("PRAGMA synchronous").fetchone()
    conn.close()
    path.unlink()
    return {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}[number]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def filesystem(folder: Path) -> tuple[str, str]:
    """Kind and mount options of the file system that ``folder`` is on."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown", "no /proc"
    best = ("", "unknown", "")
    for line in mounts.read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if folder.resolve().is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, kind, options)
    return best[1], best[2]


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(outcome: Outcome) -> list[list[str]]:
    """Heading and rows: the first figure with its spread, the others by their medians, then ratios."""
    kind = outcome.work.kind
    first, *others = FIGURES[kind]
    compared = COMPARED[kind]
    ratios = [f"ours / this: {figure.split('/')[0].removesuffix(' s')}" for figure in compared]
    rows = [["saver", first, "min .. max", "IQR", *others, *ratios, "errors"]]
    for series in outcome.series:
        spread = series.summary().get(first)
        row = [series.contender]
        row += _spread(spread) if spread else ["-", "-", "-"]
        row += [_median(series, figure) for figure in others]
        row += [_ratio(outcome, series, figure) for figure in compared]
        rows.append([*row, str(len(series.errors))])
    return rows


def _spread(spread: dict[str, float]) -> list[str]:
    return [
        number(spread["median"]),
        f"{number(spread['min'])} .. {number(spread['max'])}",
        number(spread["q3"] - spread["q1"]),
    ]


def _median(series: Series, figure: str) -> str:
    found = series.median(figure)
    return "-" if found is None else number(found)


def _ratio(outcome: Outcome, series: Series, figure: str) -> str:
    found = None if series.contender == OURS else ratio(outcome, series.contender, figure)
    return "" if found is None else f"{found:.2f}"


def show(console: Console, outcome: Outcome) -> None:
    """Print one work."""
    heading, *rows = table(outcome)
    out = Table(title=outcome.work.name, title_justify="left")
    for n, name in enumerate(heading):
        out.add_column(name, justify="right" if n else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    console.print(out)
    for series in outcome.series:
        for error in list(dict.fromkeys(series.errors))[:3]:
            console.print(f"  {series.contender}: {error}", markup=False)


def show_goals(console: Console, verdicts: list[Verdict]) -> None:
    """Print the goals."""
    out = Table("work", "against", "goal", "found", "", title="Goals", title_justify="left")
    for one in verdicts:
        out.add_row(one.work, one.against, one.goal, one.found, said(one.met))
    console.print(out)
    measured = [one.met for one in verdicts if one.met is not None]
    console.print(f"{sum(measured)} of {len(measured)} measured goals met")


def said(met: bool | None) -> str:
    """In words."""
    return {True: "met", False: "not met", None: ""}[met]


def markdown(rows: list[list[str]]) -> str:
    """A table for a page."""
    heading, *body = rows
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_page(page: Path, run: dict[str, Any], outcomes: list[Outcome], verdicts: list[Verdict]) -> None:
    """Put the figures between the page's two markers.

    Raises:
        SystemExit: The page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no {BEGIN} ... {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    goals = [["work", "against", "goal", "found", "verdict"]]
    goals += [[v.work, v.against, v.goal, v.found, said(v.met)] for v in verdicts]
    parts = [
        BEGIN,
        f"Made by `{run['command']}` on {run['date']}: {run['rounds']} rounds of {run['seconds']:g} s each.",
        markdown([["where", ""], *([key, value] for key, value in run["machine"].items())]),
        "### Goals and what was found",
        markdown(goals),
    ]
    for outcome in outcomes:
        parts += [f"### {outcome.work.name}", markdown(table(outcome))]
    page.write_text(before + "\n\n".join([*parts, END]) + after, encoding="utf-8")
