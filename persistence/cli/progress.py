"""How far a transfer has come: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from persistence.cli.console import invocation, note, terminal

if TYPE_CHECKING:
    from persistence.transfer.report import Phase, Progress

LINE_EVERY = 10.0
"""Seconds between two plain lines of one phase: enough for a log, not a flood."""


@contextmanager
def progress() -> Iterator[Progress]:
    """Something to show progress with, right for where standard error goes."""
    if invocation.json or not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description:<7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>10}"),
        TimeRemainingColumn(),
        console=terminal(stderr=True),
    ) as bars:
        yield _Bars(bars)


class _Bars:
    """One bar for each phase."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, tuple[Any, float]] = {}

    def __call__(self, phase: Phase, done: int, total: int, unit_bytes: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = (self._bars.add_task(phase, total=total, rate=""), time.monotonic())
        task, started = self._tasks[phase]
        self._bars.update(task, completed=done, total=total, rate=_rate(unit_bytes, started))


class _Lines:
    """A line when a phase begins to take long, and when it is done."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._last = time.monotonic()
        self._ended: set[str] = set()

    def __call__(self, phase: Phase, done: int, total: int, unit_bytes: int) -> None:
        now = time.monotonic()
        started = self._started.setdefault(phase, now)
        ended = done >= total
        if phase in self._ended or not (ended or now - self._last >= LINE_EVERY):
            return
        self._last = now
        line = f"{phase}: {done:,} of {total:,} checkpoints, {amount(unit_bytes)}"
        if ended:
            self._ended.add(phase)
        elif done:
            line += f", {(now - started) / done * (total - done):,.0f} s left"
        note(line)


def amount(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _rate(done: int, started: float) -> str:
    seconds = time.monotonic() - started
    return f"{amount(done / seconds)}/s" if seconds > 0.05 else ""
