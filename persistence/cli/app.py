"""The command tree, and the one place where a run begins and ends."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import typing
from types import FrameType
from typing import Annotated, NoReturn

import typer

from persistence.cli import console, follow, inspection, schema, status, transfer, undo
from persistence.cli.console import INTERRUPTED, OK, invocation

app = typer.Typer(
    name="persistence",
    help="LangGraph persistence: look at a database, set it up, move threads between databases, and verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("status")(status.status)
app.command("serve")(status.serve)
app.command("setup")(schema.setup)
app.command("migrate")(transfer.migrate)
app.command("cut-over")(follow.cut_over)
app.command("unseal")(follow.unseal)
app.command("export")(transfer.export)
app.command("import")(transfer.import_)
app.command("verify")(transfer.verify)
app.command("runs")(undo.runs)
app.command("rejects")(undo.rejects)
app.command("retry-rejects")(undo.retry_rejects)
app.command("undo")(undo.undo)
app.command("inspect")(inspection.inspect)
app.add_typer(schema.app, name="schema")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("langgraph-persistence"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="On failure print the traceback too (secrets masked).")
    ] = False,
) -> None:
    """Options that hold for every command; ``--debug`` may also stand behind the command."""


def run(argv: list[str]) -> int:
    """Run one command line and give its exit code. Nothing escapes but what ends the process at once."""
    argv = _take_flags(argv)
    _prepare_streams()
    _prepare_logging()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(argv, prog_name="persistence", standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            return console.fail(KeyboardInterrupt())
        sys.stdout.flush()
    except typer.TyperException as error:
        return console.fail_usage(*_usage(error))
    except BrokenPipeError:
        # The reader went away (``| head``). Python would complain once more at its own last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return console.FAILED
    except (Exception, KeyboardInterrupt, typer.Abort) as error:  # noqa: BLE001 - the last stop: told in a line
        try:
            return console.fail(error)
        except OSError:  # nobody takes that line
            return console.FAILED
    return int(code or OK)


def _take_flags(argv: list[str]) -> list[str]:
    """Note the flags that must be known before the command line is parsed: it may hold mistakes."""
    end = argv.index("--") if "--" in argv else len(argv)
    options, rest = argv[:end], argv[end:]
    invocation.json = "--json" in options
    invocation.debug = "--debug" in options
    return [option for option in options if option != "--debug"] + rest


def _prepare_streams() -> None:
    """Any text can be printed, also where a stream is closed or takes ASCII only."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _prepare_logging() -> None:
    logging.basicConfig(
        level=logging.DEBUG if invocation.debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s" if invocation.debug else "%(message)s",
        handlers=[MaskingHandler()],
    )
    if not invocation.debug:
        # The attempts of connecting and of the pool's workers; the error that ends the command says it once.
        for name in ("persistence", "psycopg", "stamina"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger("persistence.settings").setLevel(logging.WARNING)


class MaskingHandler(logging.StreamHandler[typing.TextIO]):
    """Log lines on standard error, without the secrets of the DSNs at hand."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, masked."""
        return console.mask(super().format(record))


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Leave by exception, so that what is open is closed."""
    sys.exit(128 + signum)


def _usage(error: typer.TyperException) -> tuple[str, str | None]:
    context = getattr(error, "ctx", None)
    hint = f"see {context.command_path} --help" if context is not None else None
    return error.format_message(), hint
