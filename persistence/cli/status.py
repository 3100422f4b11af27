"""``persistence status`` and ``persistence serve``: is the database usable, asked once or over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persistence.cli.arguments import DsnOption, Json, configured_dsn, required_provider
from persistence.cli.console import OK, emit, rows
from persistence.errors import ConnectError, MissingDriverError

if TYPE_CHECKING:
    from persistence.health import Health

DEFAULT_PORT = 8088


def status(
    dsn: DsnOption = None,
    ready: Annotated[
        bool,
        typer.Option(
            "--ready", help="Exit code 0 only if the database is migrated and can be read and written."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Say which database is in use, whether it can be read and written, and whether its tables are as needed.

    It opens the database, writes one row of its own and reads it back. It makes no table and no file.
    """
    found = _health(dsn, required=ready)
    emit(found.to_json(), [rows(_lines(found))])
    return found.problem.exit_code if ready and found.problem is not None else OK


def serve(
    dsn: DsnOption = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at.")] = DEFAULT_PORT,
) -> int:
    """Answer /livez, /readyz, /health/checkpointer and /metrics over HTTP, until it is stopped.

    The answers name the host, the schema and the tables, never a password: keep them inside your network.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingDriverError(
            "persistence serve needs uvicorn, which is not installed",
            hint='pip install "langgraph-persistence[serve]"',
        ) from error
    from persistence.asgi import Standalone

    provider = required_provider(dsn)
    uvicorn.run(Standalone(provider.dsn, provider.settings), host=host, port=port, log_level="warning")
    return OK


def _health(text: str | None, *, required: bool) -> Health:
    """Open as the application would, but without waiting, without making anything, without a fallback."""
    from persistence.handle import open
    from persistence.health import require_file, settings_to_look, unopened
    from persistence.settings import get_settings

    dsn = required_provider(text).dsn if required else configured_dsn(text)
    settings = settings_to_look(get_settings())
    if dsn is not None and settings.enable_checkpointing:
        try:
            require_file(dsn)
        except ConnectError as error:
            return unopened(dsn, error)
    with open(dsn, settings=settings) as db:
        return db.health()


def _lines(found: Health) -> Iterator[tuple[str, str]]:
    """Names and values for a person."""
    document: dict[str, Any] = found.to_json()
    figures, storage, problem = (document.pop(name) for name in ("figures", "storage", "problem"))
    for name, value in document.items():
        yield name.replace("_", " "), _text(value)
    for name, value in figures.items():
        yield name.replace("_", " "), f"{value:g}"
    for name, value in storage.items():
        yield f"size of {name}", f"{value:,} bytes"
    if problem is not None:
        yield "problem", f"{problem['message']}" + (f" ({problem['hint']})" if problem["hint"] else "")


def _text(value: object) -> str:
    if value is None or value in ((), []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(value) if isinstance(value, list | tuple) else str(value)
