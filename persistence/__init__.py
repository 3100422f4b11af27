"""One DSN for LangGraph persistence: SQLite, Postgres or memory, one behaviour.

>>> import persistence
>>> with persistence.open("sqlite:///chat.db") as db:
...     graph = builder.compile(checkpointer=db.checkpointer, store=db.store)

The names below are imported when they are first used, so ``import persistence`` costs next to
nothing and needs no driver.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from persistence.errors import (
    ClosedError,
    ConfigurationError,
    ConnectError,
    DsnError,
    InvalidInputError,
    MissingDriverError,
    PersistenceError,
    SchemaError,
    SettingsError,
    UnsupportedError,
    WrongLoopError,
)

if TYPE_CHECKING:
    from persistence.contract import AsyncBackend, Backend, Capability, Probe, Provider, ServerInfo
    from persistence.dsn import Dsn
    from persistence.handle import AsyncPersistence, Persistence, aopen, open
    from persistence.health import Health
    from persistence.process import (
        aclose_checkpointer,
        aget_checkpointer,
        asetup_checkpointer,
        close_checkpointer,
        get_checkpointer,
        setup_checkpointer,
    )
    from persistence.registry import known_schemes, provider_for, register
    from persistence.settings import Settings, get_settings

__all__ = [
    "AsyncBackend",
    "AsyncPersistence",
    "Backend",
    "Capability",
    "ClosedError",
    "ConfigurationError",
    "ConnectError",
    "Dsn",
    "DsnError",
    "Health",
    "InvalidInputError",
    "MissingDriverError",
    "Persistence",
    "PersistenceError",
    "Probe",
    "Provider",
    "SchemaError",
    "ServerInfo",
    "Settings",
    "SettingsError",
    "UnsupportedError",
    "WrongLoopError",
    "aclose_checkpointer",
    "aget_checkpointer",
    "aopen",
    "asetup_checkpointer",
    "close_checkpointer",
    "get_checkpointer",
    "get_settings",
    "known_schemes",
    "open",
    "provider_for",
    "register",
    "setup_checkpointer",
]

_HOMES = {
    "persistence.contract": ("AsyncBackend", "Backend", "Capability", "Probe", "Provider", "ServerInfo"),
    "persistence.dsn": ("Dsn",),
    "persistence.handle": ("AsyncPersistence", "Persistence", "aopen", "open"),
    "persistence.health": ("Health",),
    "persistence.process": (
        "aclose_checkpointer",
        "aget_checkpointer",
        "asetup_checkpointer",
        "close_checkpointer",
        "get_checkpointer",
        "setup_checkpointer",
    ),
    "persistence.registry": ("known_schemes", "provider_for", "register"),
    "persistence.settings": ("Settings", "get_settings"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def _server_factory(name: str) -> Callable[[], Any]:
    return lambda: getattr(import_module("persistence.langgraph_server"), name)()


# LangGraph's agent server cuts "persistence.langgraph_server:store" at the last dot and looks for the rest
# here, among the names of the package; read in langgraph-api 0.16.7.
globals().update({f"langgraph_server:{name}": _server_factory(name) for name in ("checkpointer", "store")})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("langgraph-persistence")
    if (module := _HOME_OF.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
