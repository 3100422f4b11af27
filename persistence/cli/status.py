"""``persistence status``: which database is configured, does it answer, are its tables there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from persistence.cli.arguments import DsnOption, Json, configured_dsn
from persistence.cli.console import OK, emit, rows

if TYPE_CHECKING:
    from persistence.contract import Provider


def status(dsn: DsnOption = None, as_json: Json = False) -> int:
    """Say which database is in use, whether it answers, and whether its tables are as needed."""
    from persistence.opening import make_plan

    plan = make_plan(configured_dsn(dsn), None)
    report: dict[str, Any] = {
        "dsn": plan.dsn.masked if plan.dsn else None,
        "backend": plan.mode,
        "reason": plan.reason,
        "degraded": plan.degraded is not None,
    }
    if plan.provider is not None:
        report |= _look(plan.provider)
    emit(report, [rows((name.replace("_", " "), _text(value)) for name, value in report.items())])
    return OK


def _look(provider: Provider) -> dict[str, Any]:
    from persistence import schema
    from persistence.contract import Capability

    path = provider.dsn.path
    if path is not None and not Path(path).exists():
        # Looking must not make it.
        return {
            "connected": False,
            "tables": "not there yet: `persistence setup` or the first use makes them",
        }
    backend = provider.open()
    try:
        server = backend.ping()
        report: dict[str, Any] = {
            "connected": True,
            "server": f"{server.product} {server.version}",
            "checkpointer": type(backend.checkpointer).__name__,
        }
    finally:
        backend.close(provider.settings.close_timeout)
    if Capability.TABLES in provider.capabilities:
        differences = schema.check(provider)
        report |= {
            "schema": provider.settings.db_schema,
            "tables": "not as needed: `persistence schema check` says more" if differences else "as needed",
            "revision": schema.current(provider),
        }
    return report


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
