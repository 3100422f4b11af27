"""The arguments and options that several commands share, and how a DSN is read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persistence.cli.console import invocation
from persistence.errors import DsnError, SettingsError

if TYPE_CHECKING:
    from persistence.contract import Provider
    from persistence.dsn import Dsn

DSN_HELP = "A DSN, or env:NAME for one in an environment variable (arguments are visible to other users)."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
DsnOption = Annotated[
    str | None,
    typer.Option("--dsn", metavar="DSN", help=f"{DSN_HELP} Default: the settings (PERSISTENCE_DSN)."),
]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=DSN_HELP)]
Target = Annotated[str, typer.Argument(metavar="TARGET", help=DSN_HELP)]
Archive = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="The archive's path.")]

_LOOKS_LIKE_A_DSN = re.compile(r"env:|[A-Za-z][A-Za-z0-9+._-]*:|[a-z_]+\s*=")


def read_dsn(text: str) -> Dsn:
    """Parse a DSN argument, ``env:NAME`` too, and remember its secrets for masking."""
    from persistence.dsn import Dsn

    if text.startswith("env:"):
        text = _from_environment(text.removeprefix("env:"))
    try:
        dsn = Dsn.parse(text)
    except DsnError:
        if "@" in text or "=" in text:
            invocation.raw.append(text)
        raise
    invocation.dsns.append(dsn)
    return dsn


def read_dsn_or_path(text: str) -> Dsn | Path:
    """Read an argument that is a DSN or the path of an archive; a path that exists is a path."""
    if _LOOKS_LIKE_A_DSN.match(text) and not os.path.exists(text):  # noqa: PTH110 - False where it may not look
        return read_dsn(text)
    return Path(text)


def configured_dsn(text: str | None) -> Dsn | None:
    """Give the DSN of ``--dsn``, else the one in the settings, else nothing."""
    if text is not None:
        return read_dsn(text)
    from persistence.settings import get_settings

    dsn = get_settings().resolve_dsn()
    if dsn is not None:
        invocation.dsns.append(dsn)
    return dsn


def required_provider(text: str | None) -> Provider:
    """The provider of the configured DSN; there must be one."""
    from persistence.registry import provider_for

    dsn = configured_dsn(text)
    if dsn is None:
        raise SettingsError("no database is configured", hint="set PERSISTENCE_DSN or give --dsn")
    return provider_for(dsn)


def wait_for(provider: Provider) -> None:
    """Connect once, with the attempts that the settings allow: a server may still be starting.

    Raises:
        ConnectError: It does not answer. Memory does not stand in here, whatever the policy.
    """
    import stamina

    from persistence.opening import make_plan, open_backend

    # Where structlog is installed, stamina tells it of each attempt, and it prints to standard output.
    stamina.instrumentation.set_on_retry_hooks([])
    settings = provider.settings.model_copy(update={"setup_on_open": False, "fallback": "never"})
    opened = open_backend(make_plan(provider.dsn, settings))
    if opened.backend is not None:
        opened.backend.close(settings.close_timeout)


def _from_environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise DsnError(f"the environment variable {name!r} is not set", hint="env:NAME reads a DSN from NAME")
    return value
