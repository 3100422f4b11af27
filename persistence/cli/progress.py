"""How far a transfer has come: a bar on a terminal, plain lines elsewhere, events with ``--json``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from persistence.cli.console import invocation, note, terminal

if TYPE_CHECKING:
    from persistence.transfer.report import Phase

LINE_EVERY = 10.0
"""Seconds between two plain lines of one phase: enough for a log, not a flood."""
EVENT_EVERY = 1.0
"""Seconds between two events of one phase, but for the first and the last."""
_MEASURABLE = 0.05


@dataclass(slots=True)
class Step:
    """How far one phase has come."""

    phase: str
    done: int = 0
    total: int = 0
    bytes: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=lambda: time.monotonic())
    shown: float = 0.0
    ended: bool = False

    @property
    def checkpoints_per_second(self) -> float | None:
        """``None`` before it can be told."""
        return self.done / self.seconds if self.seconds > _MEASURABLE else None

    @property
    def bytes_per_second(self) -> float | None:
        """``None`` before it can be told."""
        return self.bytes / self.seconds if self.seconds > _MEASURABLE else None

    @property
    def seconds_left(self) -> float | None:
        """``None`` before it can be told."""
        return self.seconds / self.done * (self.total - self.done) if self.done else None

    def figures(self) -> dict[str, Any]:
        """All of it, for an event or a report."""
        return {
            "phase": self.phase,
            "done": self.done,
            "total": self.total,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "checkpoints_per_second": _rounded(self.checkpoints_per_second),
            "bytes_per_second": _rounded(self.bytes_per_second),
            "seconds_left": _rounded(self.seconds_left),
        }


class Display(Protocol):
    """One way to show it."""

    def show(self, step: Step, *, first: bool) -> None:
        """A phase begins, goes on, or has ended."""


class Tracker:
    """Keeps how far each phase has come, and has it shown. This is what a transfer tells."""

    def __init__(self, display: Display) -> None:
        self.steps: dict[str, Step] = {}
        self._display = display

    def __call__(self, phase: Phase, done: int, total: int, unit_bytes: int) -> None:
        """See :class:`persistence.transfer.report.Progress`."""
        first = phase not in self.steps
        step = self.steps.setdefault(phase, Step(phase))
        if step.ended and done >= total:
            step.bytes = unit_bytes
            return
        step.done, step.total, step.bytes = done, total, unit_bytes
        step.seconds = time.monotonic() - step.started
        step.ended = done >= total and not first
        self._display.show(step, first=first)

    def close(self) -> None:
        """A phase may end before its expected total: threads can be left out."""
        for step in self.steps.values():
            if not step.ended:
                step.ended = True
                self._display.show(step, first=False)


@contextmanager
def progress(*, plain: bool = False) -> Iterator[Tracker]:
    """Something to show progress with, right for where standard error goes; ``plain`` is without bars."""
    if plain or invocation.json or not sys.stderr.isatty():
        tracker = Tracker(_Events() if invocation.json else _Lines())
        yield tracker
        tracker.close()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>24}"),
        TimeRemainingColumn(),
        console=terminal(stderr=True),
    ) as bars:
        tracker = Tracker(_Bars(bars))
        yield tracker
        tracker.close()


class _Bars:
    """One bar for each phase."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def show(self, step: Step, *, first: bool) -> None:
        if first:
            self._tasks[step.phase] = self._bars.add_task(step.phase, total=step.total, rate="")
        self._bars.update(
            self._tasks[step.phase], completed=step.done, total=step.total, rate=", ".join(_rates(step))
        )


class _Lines:
    """A line when a phase begins to take long, and when it is done."""

    def show(self, step: Step, *, first: bool) -> None:
        from persistence.transfer.report import amount

        if not (step.ended or step.seconds - step.shown >= LINE_EVERY):
            return
        step.shown = step.seconds
        unit = "items" if step.phase.endswith("store") else "checkpoints"
        parts = [
            f"{step.phase}: {step.done:,} of {step.total:,} {unit}",
            amount(step.bytes),
            *_rates(step),
        ]
        if not step.ended and step.seconds_left is not None:
            parts.append(f"{step.seconds_left:,.0f} s left")
        note(", ".join(parts))


class _Events:
    """One JSON object on a line: when a phase begins, now and then, and when it has ended."""

    def show(self, step: Step, *, first: bool) -> None:
        if first:
            self._write("begin", step)
        if step.ended:
            self._write("end", step)
        elif step.seconds - step.shown >= EVENT_EVERY:
            step.shown = step.seconds
            self._write("progress", step)

    def _write(self, event: str, step: Step) -> None:
        sys.stderr.write(json.dumps({"event": event} | step.figures()) + "\n")
        sys.stderr.flush()


def _rates(step: Step) -> list[str]:
    from persistence.transfer.report import amount

    if step.bytes_per_second is None or step.checkpoints_per_second is None:
        return []
    unit = "items" if step.phase.endswith("store") else "cp"
    return [f"{amount(step.bytes_per_second)}/s", f"{step.checkpoints_per_second:,.0f} {unit}/s"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
