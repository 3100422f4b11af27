"""Write ``docs/cli.md`` from the command tree; ``--check`` only says whether it is current."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from persistence import errors
from persistence.cli.app import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRODUCTION = """\
<!-- Written by tools/cli_reference.py from the code: change it there, then run `make generate`. -->

# The `persistence` command

Results go to standard output, everything else to standard error. With `--json` standard output carries
exactly one JSON document, for errors too:
`{"error": {"code": "...", "message": "...", "hint": "..."}}`; the codes are those of
[Troubleshooting](troubleshooting.md).

Every DSN argument may be given as `env:NAME`: it is then read from the environment variable `NAME`. Arguments
are visible to other users of the machine (`ps`), so a DSN with a password is better passed that way. Commands
with `--dsn` take the DSN from the settings (`PERSISTENCE_DSN`) if it is not given.

`persistence --debug ...` adds the traceback to a failure, with secrets masked; `persistence --version`
prints the version.
"""


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_commands("persistence", get_command(app)), _exit_codes()]
    return "\n".join(parts)


def _commands(path: str, command: Any) -> Iterator[str]:
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from _commands(f"{path} {name}", child)
        else:
            yield _command(f"{path} {name}", child)


def _command(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = [
        path,
        *(_placeholder(a) if a.required else f"[{_placeholder(a)}]" for a in arguments),
        "[OPTIONS]",
    ]
    lines = [
        f"## `{path}`",
        "",
        inspect.cleandoc(command.help or ""),
        "",
        "```text",
        " ".join(usage),
        "```",
        "",
    ]
    lines += [f"- `{_placeholder(a)}`: {a.help}" for a in arguments]
    lines += [f"- `{_option(o)}`: {o.help}" for o in options]
    return "\n".join(lines) + "\n"


def _placeholder(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _option(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar}"


def _exit_codes() -> str:
    codes: dict[int, list[str]] = {0: ["success"]}
    for _, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, errors.PersistenceError) and cls is not errors.PersistenceError:
            codes.setdefault(cls.exit_code, []).append(f"[`{cls.code}`](troubleshooting.md#{cls.code})")
    codes[1] = ["any other failure", *codes.get(1, [])]
    codes[2] = ["a mistake in the command line", *codes[2]]
    codes[130] = ["interrupted (Ctrl-C)"]
    lines = ["## Exit codes", "", "| code | meaning |", "| --- | --- |"]
    lines += [f"| {code} | {', '.join(meanings)} |" for code, meanings in sorted(codes.items())]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Write the page, or check it."""
    text = render()
    if "--check" not in argv:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not current: run make generate", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
