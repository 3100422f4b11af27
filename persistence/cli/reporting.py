"""What a run of a transfer shows while it goes on, and the report file that it leaves however it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from persistence.cli.console import explain, mask, note
from persistence.cli.progress import Tracker, progress
from persistence.errors import ReportError

ReportPath = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="PATH",
        help="Also write a report to PATH, as JSON or as a page by itself: it ends in .json or .html.",
    ),
]


class Run:
    """One run, and its report where one is wanted.

    The report says ``running`` from the beginning on, so that one of an earlier run, or of a run that was
    killed, is not taken for a success.
    """

    def __init__(self, command: str, path: Path | None, show: Tracker, sides: dict[str, str]) -> None:
        self.show = show
        self._path = path
        self._ended = False
        self._document: dict[str, Any] = {
            "command": command,
            **sides,
        }
        self._write("running")

    def ended(self, outcome: str, result: str) -> None:
        """The run has ended by itself.

        Args:
            outcome: What came of it, in a word.
            result: The result as a JSON object.

        Raises:
            ReportError: The report cannot be written.
        """
        self._ended = True
        self._document["result"] = json.loads(result)
        try:
            self._write(outcome)
        except ReportError as error:
            raise ReportError(f"{error.message}; the run itself has ended: {outcome}") from None

    def failed(self, error: BaseException) -> None:
        """The run has ended by an error, which is what will be told; a report that fails too is a note."""
        if self._ended:
            return
        from persistence.transfer import RefusedError

        code, message, hint, _ = explain(error)
        told: dict[str, Any] = {"code": code, "message": message, "hint": hint}
        if isinstance(error, RefusedError):
            told["problems"] = [asdict(problem) for problem in error.problems]
        self._document["error"] = told
        try:
            self._write("failed")
        except ReportError as unwritten:
            note(unwritten.message)

    def _write(self, outcome: str) -> None:
        if self._path is None:
            return
        from persistence import __version__
        from persistence.transfer.report_page import write_report

        now = datetime.now(UTC).isoformat(timespec="seconds")
        steps = [step.figures() for step in self.show.steps.values()]
        made = {"creator": f"langgraph-persistence {__version__}", "outcome": outcome, "written": now}
        write_report(self._path, self._document | made | {"progress": steps}, mask)


@contextmanager
def running(command: str, report: Path | None, **sides: object) -> Iterator[Run]:
    """Show the progress of a command, and leave its report."""
    from persistence.transfer.report_page import SUFFIXES

    if report is not None and report.suffix not in SUFFIXES:
        raise typer.BadParameter(f"{report} ends in neither .json nor .html", param_hint="--report")
    with progress() as show:
        run = Run(
            command, report, show, {name: str(side) for name, side in sides.items() if side is not None}
        )
        try:
            yield run
        except BaseException as error:
            run.failed(error)
            raise
