"""Write ``docs/settings.md`` and ``.env.example`` from the settings; ``--check`` only compares them."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from persistence.settings import DSN_OPTION_FIELDS, Settings, variable_name

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = """\
<!-- Written by tools/settings_table.py from the code: change it there, then run `make generate`. -->

# Settings

Every setting is an environment variable with the prefix `PERSISTENCE_`, in upper or lower case. In code it
is a keyword argument: `Settings(pool_max=20)`, passed on as `persistence.open(settings=...)`.

The first of these that names a setting decides:

1. an option in the [DSN](dsn.md), for the settings that have one;
2. a keyword argument of `Settings`;
3. the environment of the process;
4. `.env.<name>` in the working directory, where `<name>` is the value of `PERSISTENCE_ENV`;
5. `.env` in the working directory;
6. the default.

So a DSN per environment is one line in each of `.env`, `.env.staging` and `.env.production`, and one variable
that says which environment this is. `.env.example` in the repository lists every setting.

A wrong value is an error that names the variable. An empty value counts as not set, as Docker Compose
writes `${VARIABLE:-}`; except for the DSN, the encryption key and their files, where empty is an error, since
it would silently mean memory, or plaintext. An unknown `PERSISTENCE_` name is an error in a `.env` file and a
warning in the environment, where Kubernetes may put `PERSISTENCE_PORT` for a service called `persistence`.
Names that begin with `PERSISTENCE_TEST_` belong to the test suite.

`get_settings()` reads once per process; `get_settings.cache_clear()` makes it read again.

"""

EXAMPLE_INTRODUCTION = """\
# Every setting of langgraph-persistence. Copy this file to .env and take the "#" off the lines that you need;
# .env.production beside it is read as well when PERSISTENCE_ENV=production, and wins.
# Written by tools/settings_table.py from the code. What each setting means in full: docs/settings.md
"""

HEADER = ("Variable", "Value", "Default", "Meaning", "In the DSN")


def settings_page() -> str:
    """The text of ``docs/settings.md``."""
    in_dsn = {field: option for option, field in DSN_OPTION_FIELDS.items()}
    rows = [HEADER, tuple("---" for _ in HEADER)]
    for name, info in Settings.model_fields.items():
        option = f"`{in_dsn[name]}`" if name in in_dsn else ""
        description = info.description or ""
        rows.append((f"`{variable_name(name)}`", _kind(info), _default(info), description, option))
    return INTRODUCTION + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def env_example() -> str:
    """The text of ``.env.example``: every setting, commented out, with its default or an example."""
    parts = [EXAMPLE_INTRODUCTION]
    for name, info in Settings.model_fields.items():
        words = re.sub(r"\[(\w+)\]\((\w+\.md)\)", r"docs/\2", info.description or "").replace("`", "")
        comment = textwrap.fill(words, 100, initial_indent="# ", subsequent_indent="# ")
        value = info.examples[0] if info.examples else _text(info.default)
        parts.append(f"{comment}\n#{variable_name(name)}={value}\n")
    return "\n".join(parts)


def _kind(info: FieldInfo) -> str:
    """What a setting accepts, in words."""
    annotation = info.annotation
    if get_origin(annotation) in {Union, UnionType}:
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if annotation is bool:
        return "`true`, `false`"
    words: dict[Any, str] = {
        int: "whole number",
        float: "number",
        Path: "path",
        SecretStr: "text, secret",
        str: "text",
    }
    kind = words.get(annotation, "list")
    limits: dict[str, Any] = {}
    for constraint in info.metadata:
        limits |= {
            name: value
            for name in ("gt", "ge", "le")
            if (value := getattr(constraint, name, None)) is not None
        }
    if not limits:
        return kind
    low = f"above {limits['gt']}" if "gt" in limits else f"from {limits['ge']}"
    return f"{kind} {low} to {limits['le']:.0f}"


def _default(info: FieldInfo) -> str:
    return "not set" if info.default in (None, ()) else f"`{_text(info.default)}`"


def _text(value: object) -> str:
    """A default as it stands in an environment variable."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Write both files, or with ``--check`` compare them; 1 when one is stale."""
    stale = 0
    for path, text in (
        (ROOT / "docs" / "settings.md", settings_page()),
        (ROOT / ".env.example", env_example()),
    ):
        if path.exists() and path.read_text("utf-8") == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"{path.relative_to(ROOT)} is stale: run make generate", file=sys.stderr)
            stale = 1
        else:
            path.write_text(text, "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
