"""What the console command prints, and how it ends.

Results go to standard output, everything else to standard error. With ``--json`` standard output
carries exactly one JSON document, errors included.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persistence.errors import ConfigurationError, PersistenceError

if TYPE_CHECKING:
    from rich.console import Console

    from persistence.dsn import Dsn

OK = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 130


@dataclass
class Invocation:
    """What one run of the command must know wherever it prints."""

    json: bool = False
    debug: bool = False
    dsns: list[Dsn] = field(default_factory=list)
    """Every DSN read so far, so that its secrets can be taken out of any text."""
    raw: list[str] = field(default_factory=list)
    """DSN texts as given: one that cannot be parsed may hold a secret too."""


invocation = Invocation()


def mask(text: str) -> str:
    """Take out the secrets of every DSN that this run has seen."""
    for raw in invocation.raw:
        text = text.replace(raw, "***")
    if invocation.dsns:
        from persistence.dsn import mask_secrets

        text = mask_secrets(text, *invocation.dsns)
    return text


def terminal(*, stderr: bool = False) -> Console:
    """A rich console that prints text as it is: DSNs hold brackets, which rich would take for markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width; a table must not be folded for it.
    width = None if stream.isatty() else 500
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


def note(text: str) -> None:
    """One line for the person at the terminal."""
    if not invocation.json:
        sys.stderr.write(mask(printable(text)) + "\n")


def printable(text: str) -> str:
    """One line without control characters: ids are anybody's text, and this goes to a terminal."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def emit(document: Mapping[str, Any], human: Iterable[str]) -> None:
    """Print the result: the document with ``--json``, else the lines of text in ``human``."""
    if invocation.json:
        _write_json(document)
        return
    for text in human:
        sys.stdout.write(text + "\n")


def rows(lines: Iterable[tuple[object, ...]]) -> str:
    """Aligned columns, without control characters."""
    texts = [[printable(str(cell)) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in texts
    )


def fail(error: BaseException) -> int:
    """Print what went wrong and give the exit code."""
    code, message, hint, exit_code = explain(error)
    return _report(error, code, message, hint, exit_code)


def explain(error: BaseException) -> tuple[str, str, str | None, int]:
    """What went wrong: the code, the message, what to do next, and the exit code."""
    if isinstance(error, PersistenceError):
        return error.code, error.message, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "interrupted", None, INTERRUPTED
    if isinstance(error, SystemExit):
        return "terminated", "terminated by a signal", None, int(error.code or OK)
    if isinstance(error, FileNotFoundError) and _is_nowhere():
        return explain(
            ConfigurationError(
                "the working directory does not exist any more",
                hint="change to one that exists, or name all files by absolute paths",
            )
        )
    return (
        "internal",
        f"unexpected {type(error).__name__}: {error}",
        "run again with --debug and report this with the traceback",
        FAILED,
    )


def _is_nowhere() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def left_out(count: int, what: str) -> str:
    """How many items of the store do not take part, and what would change that."""
    return f"{count:,} items of the store {what}; --include store adds them"


def fail_usage(message: str, hint: str | None) -> int:
    """Print a mistake in the command line; without a message the help was printed instead."""
    if not message:
        return USAGE
    return _report(None, "usage", message, hint, USAGE)


def _report(error: BaseException | None, code: str, message: str, hint: str | None, exit_code: int) -> int:
    if error is not None and invocation.debug:
        sys.stderr.write(mask("".join(traceback.format_exception(error))))
    message, hint = mask(printable(message)), mask(printable(hint)) if hint else None
    if invocation.json:
        _write_json({"error": {"code": code, "message": message, "hint": hint}})
    else:
        sys.stderr.write(f"error: {message}" + (f" ({hint})" if hint else "") + "\n")
    return exit_code


def _write_json(document: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")
